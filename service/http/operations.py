"""Probes and metrics: they answer also while the service loads, drains or fails."""

from typing import Annotated

from fastapi import APIRouter, Query
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import Request
from starlette.responses import Response

from service.engine.interface import EngineHealth
from service.http.bodies import JsonResponse
from service.http.lifecycle import service_of
from service.http.openapi.documentation import METRICS, PROBE

router = APIRouter()


@router.get("/healthz", **PROBE)
async def healthz(request: Request) -> Response:
    """Whether the process can do its work. When not, restarting it is the remedy."""
    health = service_of(request).health()
    return _answer(health, ok=health.live)


@router.get("/readyz", **PROBE)
async def readyz(request: Request) -> Response:
    """Whether requests should be sent here now; the reason says why not."""
    health = service_of(request).health()
    return _answer(health, ok=health.ready)


@router.get("/metrics", **METRICS)
async def metrics(
    request: Request, names: Annotated[list[str] | None, Query(alias="name[]")] = None
) -> Response:
    """Everything measured, in Prometheus' text format, or only the metrics of these names.

    With thousands of adapters, the whole takes a second to write.
    """
    content = await service_of(request).metrics.scrape(names)
    return Response(content, media_type=CONTENT_TYPE_LATEST)


def _answer(health: EngineHealth, *, ok: bool) -> Response:
    status = "ok" if ok else "unavailable"
    content = {"status": status, "reason": health.reason, "details": dict(health.details)}
    return JsonResponse(content, status_code=200 if ok else 503)
