"""How an error looks in each protocol; the path decides which one it is."""

from collections.abc import Callable
from typing import TypeAlias

from starlette.responses import Response

from service.errors import NoInputs
from service.http.errors import ERRORS, Refusal, own_shape

ErrorShape: TypeAlias = Callable[[Refusal], Response]

_TEI_PATHS = frozenset(
    {"/", "/predict", "/invocations", "/embed", "/rerank", "/info", "/health", "/ping"}
)
_VLLM_PATHS = frozenset({"/classify", "/v1/rerank", "/v2/rerank", "/v1/embeddings"})
_VLLM_TYPES = {401: "AuthenticationError", 403: "PermissionDeniedError", 404: "NotFoundError"}


def shape_of(path: str) -> ErrorShape:
    """How errors on a path look, also where there is no such route."""
    if path in _TEI_PATHS or path.startswith("/adapters/"):
        return tei_shape
    if path in _VLLM_PATHS:
        return vllm_shape
    if path == "/v2" or path.startswith("/v2/"):
        return oip_shape
    return own_shape


def tei_shape(refusal: Refusal) -> Response:
    """TEI's error body: a sentence and one of its types, each with its status."""
    match refusal.kind.status:
        case 503:
            kind, status = "Unhealthy", 503
        case 429:
            kind, status = "Overloaded", 429
        case code if code >= 500:
            kind, status = "Backend", 424
        case _ if refusal.kind is ERRORS[NoInputs]:
            kind, status = "Empty", 400
        case code:
            kind, status = "Validation", code
    return refusal.response({"error": refusal.message, "error_type": kind}, status=status)


def vllm_shape(refusal: Refusal) -> Response:
    """vLLM's error body; it answers 400 where this service answers 422."""
    status = 400 if refusal.kind.status == 422 else refusal.kind.status
    name = _VLLM_TYPES.get(status, "BadRequestError" if status < 500 else "InternalServerError")
    content = {"message": refusal.message, "type": name, "param": None, "code": status}
    return refusal.response({"error": content}, status=status)


def oip_shape(refusal: Refusal) -> Response:
    """The Open Inference Protocol's error body: one sentence, which has the details already."""
    # Neither Triton nor KServe answers 422.
    status = 400 if refusal.kind.status == 422 else refusal.kind.status
    return refusal.response({"error": refusal.message}, status=status)
