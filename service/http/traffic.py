"""/v1/adapters/{name}/traffic: let a second revision read some of the texts, watch it, end that."""

from dataclasses import asdict
from typing import Any

from fastapi import APIRouter, Depends
from starlette.requests import Request
from starlette.responses import Response

from adapters.errors import NoTraffic
from service.catalog.entry import CatalogEntry, ChangeResult, Wait
from service.catalog.traffic import Figures, Rule, Traffic
from service.http.adapters import condition_of, etag, published
from service.http.bodies import JsonResponse, read_as
from service.http.lifecycle import origin_of, service_of
from service.http.openapi.documentation import (
    DELETE_TRAFFIC,
    PROMOTE,
    PUT_TRAFFIC,
    SHOW_TRAFFIC,
)
from service.http.openapi.schemas import TrafficRequest
from service.http.queries import refuse_unknown_query

router = APIRouter(dependencies=[Depends(refuse_unknown_query)])


@router.put("/v1/adapters/{name}/traffic", **PUT_TRAFFIC)
async def put_traffic(request: Request, name: str, wait: Wait = "all") -> Response:
    """Let a second revision read some of a name's texts, or change how many.

    As a canary it answers them. As a shadow it only reads them, and the current revision answers.
    Either way they are compared. A rule ends this if the second revision does badly.
    """
    service = service_of(request)
    body = await read_as(TrafficRequest, request)
    rule = Rule() if body.rule is None else Rule(**body.rule.model_dump())
    traffic = Traffic(body.revision, "", body.percent, body.shadow, rule)
    await service.catalog.divide(
        name, traffic, condition_of(request), wait=wait, by=origin_of(request)
    )
    return await _shown(request, name)


@router.get("/v1/adapters/{name}/traffic", **SHOW_TRAFFIC)
async def show_traffic(request: Request, name: str) -> Response:
    """How a name's texts are divided, or were last; what was seen, and why it ended."""
    return await _shown(request, name)


@router.delete("/v1/adapters/{name}/traffic", **DELETE_TRAFFIC)
async def delete_traffic(request: Request, name: str, wait: Wait = "all") -> Response:
    """Let the current revision read all texts again."""
    catalog = service_of(request).catalog
    await catalog.end_traffic(name, condition_of(request), wait=wait, by=origin_of(request))
    return Response(status_code=204)


@router.post("/v1/adapters/{name}/traffic/promote", **PROMOTE)
async def promote_traffic(request: Request, name: str, wait: Wait = "all") -> Response:
    """Make the second revision the current one. Rolling back undoes it."""
    catalog = service_of(request).catalog
    revision = await catalog.promote(name, condition_of(request), wait=wait, by=origin_of(request))
    return published(name, ChangeResult(revision, created=False, changed=True))


async def _shown(request: Request, name: str) -> Response:
    """
    Raises:
        UnknownAdapter, NoTraffic: there is none, and never was.
    """
    catalog = service_of(request).catalog
    if catalog.entry(name).traffic is None:
        raise NoTraffic(name)
    figures = await catalog.figures(name)
    # Read afterwards, so that it is not older than the figures.
    entry = catalog.entry(name)
    if entry.traffic is None:
        raise NoTraffic(name)
    return JsonResponse(_content(entry, entry.traffic, figures), headers=etag(entry.current))


def _content(entry: CatalogEntry, traffic: Traffic, figures: Figures | None) -> dict[str, Any]:
    """The shape of `schemas.TrafficDetail`."""
    return {
        "name": entry.name,
        "current": entry.current,
        "state": "active" if traffic.in_force else "ended",
        "revision": traffic.revision or None,
        "baseline": traffic.baseline or None,
        "percent": traffic.percent,
        "shadow": traffic.shadow,
        "rule": asdict(traffic.rule),
        "since": traffic.since or None,
        "ended": None if traffic.ended is None else asdict(traffic.ended),
        "figures": None if figures is None else asdict(figures),
    }
