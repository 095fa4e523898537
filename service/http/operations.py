"""Probes and metrics: what keeps answering while the service loads, drains or fails.

Knows no adapter.
"""

from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import Request
from starlette.responses import Response

from service.engine.interface import EngineHealth
from service.http.bodies import JsonResponse
from service.http.lifecycle import service_of
from service.http.openapi.documentation import HEALTHZ, METRICS, READYZ

router = APIRouter()


@router.get("/healthz", **HEALTHZ)
async def healthz(request: Request) -> Response:
    """Whether the process can do its work. When not, restarting it is the remedy."""
    health = service_of(request).health()
    return _answer(health, well=health.live)


@router.get("/readyz", **READYZ)
async def readyz(request: Request) -> Response:
    """Whether requests should be sent here now; the reason says why not."""
    health = service_of(request).health()
    return _answer(health, well=health.ready)


@router.get("/metrics", **METRICS)
async def metrics(request: Request) -> Response:
    """Everything measured, in Prometheus' text format."""
    content = await service_of(request).metrics.scrape()
    return Response(content, media_type=CONTENT_TYPE_LATEST)


def _answer(health: EngineHealth, *, well: bool) -> Response:
    content = {
        "status": "ok" if well else "unavailable",
        "reason": health.reason,
        "details": dict(health.details),
    }
    return JsonResponse(content, status_code=200 if well else 503)
