"""All surfaces: their routes, and the shape that each gives its errors. Knows no route's work."""

from collections.abc import Callable

from starlette.responses import Response

from service.http import adapters, operations, predict
from service.http.errors import Refusal, own_shape
from service.http.protocols import tei, vllm
from service.http.protocols.oip import repository as oip_repository
from service.http.protocols.oip import routes as oip

SURFACES = (predict, adapters, operations, tei, oip, oip_repository, vllm)

_TEI_PATHS = frozenset({"/", "/predict", "/invocations", "/info", "/health", "/ping"})
# Answered while the service loads, drains or fails.
_PROBES = frozenset({"/health", "/ping", "/v2", "/v2/health/live", "/v2/health/ready"})


def shape_of(path: str) -> Callable[[Refusal], Response]:
    """How an error on a path looks, whether there is such a route or not."""
    if path in _TEI_PATHS or path.startswith("/adapters/"):
        return tei.shape
    if path == "/v2" or path.startswith("/v2/"):
        return oip.shape
    if path == "/classify":
        return vllm.shape
    return own_shape


def needs_service(path: str) -> bool:
    """Whether a path asks for a service that is ready, and makes a drain wait for its answer."""
    return path.startswith("/v1/") or (path not in _PROBES and shape_of(path) is not own_shape)
