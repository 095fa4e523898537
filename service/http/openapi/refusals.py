"""The errors that a route documents: which types can occur there, and how its protocol shows them.

The tuples say what can go wrong in one kind of step; a route lists the kinds of its steps. A new
type of error is added to the tuple of its step, and an example of it to `examples.ERRORS`.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import orjson
from pydantic import BaseModel

from service.http.bounded_http import LARGE_HEAD, LONG_URL, EarlyAnswer
from service.http.error_shapes import ErrorShape, oip_shape, tei_shape, vllm_shape
from service.http.errors import INTERNAL, own_shape, refusal_of
from service.http.openapi import examples
from service.http.openapi.schemas import ErrorResponse, OipError, TeiError, VllmError

# By status, as FastAPI takes them.
Responses = dict[int | str, dict[str, Any]]

# The gate, before any route: the key, and whether there is room.
KEY = ("unauthorized", "key_expired", "key_revoked", "forbidden", "too_many_failures")
# The connection, before anything reads the request as one of a protocol.
CONNECTION = ("uri_too_long", "headers_too_large", "request_timeout")
GATE = (
    *KEY,
    *CONNECTION,
    "quota_exceeded",
    "overloaded",
    "not_ready",
    "lease_expired",
    "unavailable",
    INTERNAL.type,
)
# Reading a body of any kind, and one of JSON.
BODY = ("bad_request", "malformed_request", "too_large", "unsupported_media_type")
JSON_BODY = (*BODY, "invalid_request")
# Finding the adapter or the revision that a request names, and one that can be served.
NAMED = ("adapter_not_found", "revision_not_found")
SERVED = (*NAMED, "adapter_incompatible", "adapter_unloaded", "adapter_damaged")
# The adapter of a request that names none.
DEFAULT = (*SERVED, "not_found")
INFERENCE = ("inference_failed", "adapter_load_failed", "deadline_exceeded")
CHANGE = (
    "adapter_name_invalid",
    "revision_conflict",
    "store_failed",
    "store_unreachable",
    "store_denied",
    "outcome_unknown",
    "audit_failed",
)
# What every live replica must agree to.
ROLLOUT = ("rollout_refused", "rollout_timeout")
FILE = (
    "adapter_incompatible",
    "adapter_invalid",
    "replacement_not_forced",
)

_MODELS: Mapping[ErrorShape, type[BaseModel]] = MappingProxyType(
    {own_shape: ErrorResponse, tei_shape: TeiError, vllm_shape: VllmError, oip_shape: OipError}
)
_MEANINGS: Mapping[str, str] = MappingProxyType(
    {
        "not_found": "The request names no adapter, and there is no default one.",
        "unsupported_media_type": "Another `Content-Type` or `Content-Encoding` is expected.",
        "range_not_satisfiable": "None of the file is in the `Range`.",
        INTERNAL.type: INTERNAL.meaning,
    }
)
# Of every response, or of the server.
_COMMON_HEADERS = frozenset({"content-length", "content-type"})


def refusals(*types: str, shape: ErrorShape = own_shape) -> Responses:
    """The responses for types of errors, one example of each."""
    responses: Responses = {}
    for error in examples.ERRORS:
        refusal = refusal_of(error)
        name = refusal.kind.type
        if name not in types:
            continue
        shown = shape(refusal)
        response = responses.setdefault(shown.status_code, _response(_MODELS[shape]))
        meaning = _MEANINGS.get(name, refusal.kind.meaning)
        response["description"] = f"{response['description']} `{name}`: {meaning}".strip()
        response["content"]["application/json"]["examples"][name] = {
            "summary": meaning,
            "value": orjson.loads(bytes(shown.body)),
        }
        for header in set(shown.headers) - _COMMON_HEADERS:
            response["headers"][header.title()] = {"schema": {"type": "string"}}
    for early in (LONG_URL, LARGE_HEAD):
        if early.type in types:
            responses[early.status] = _early(early)
    return responses


def _early(answer: EarlyAnswer) -> dict[str, Any]:
    """One of the connection's own answers, which are of one shape on all paths."""
    response = _response(ErrorResponse)
    value = {"error": {"type": answer.type, "message": answer.message, "details": []}}
    example = {"summary": answer.message, "value": value}
    response["description"] = f"`{answer.type}`: {answer.message}"
    response["content"]["application/json"]["examples"][answer.type] = example
    return response


def _response(model: type[BaseModel]) -> dict[str, Any]:
    content: dict[str, Any] = {"application/json": {"examples": {}}}
    return {"description": "", "model": model, "content": content, "headers": {}}
