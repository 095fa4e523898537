"""Every error as HTTP: one table, one shape. Knows no route.

The shape of all that is this project's own; each compatible protocol has another:

    {"error": {"type": "adapter_not_found", "message": "...", "details": [...]}}
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from adapters import errors as adapter_errors
from service import errors
from service.http.bodies import JsonResponse
from service.http.openapi.schemas import BRANCHES

MAX_DETAILS = 100
MAX_SHOWN_CHARACTERS = 64
UNAVAILABLE_RETRY_SECONDS = 2
# The client is gone: counted and never seen.
DISCONNECTED = "disconnected"


@dataclass(frozen=True, slots=True)
class ErrorKind:
    """How one class of errors looks from outside."""

    status: int
    type: str
    meaning: str


@dataclass(frozen=True, slots=True)
class Refusal:
    """An error as callers may see it, before it has a protocol's shape.

    details: the list behind it: its faults, or the names that do exist.
    """

    kind: ErrorKind
    message: str
    details: tuple[str, ...] = ()
    headers: Mapping[str, str] = field(default_factory=dict)

    def response(self, content: Any, *, status: int | None = None) -> Response:
        """With a protocol's body, and its status where that differs."""
        return JsonResponse(
            content, status_code=status or self.kind.status, headers=dict(self.headers)
        )


# The order is that of the documentation. A class that is missing here falls back to its nearest
# base class.
ERRORS: Mapping[type[Exception], ErrorKind] = MappingProxyType(
    {
        errors.MalformedRequest: ErrorKind(
            400, "malformed_request", "The body is not JSON, or not the form it claims."
        ),
        errors.RequestError: ErrorKind(400, "bad_request", "The request cannot be used."),
        errors.Unauthorized: ErrorKind(401, "unauthorized", "No key, or an unknown one."),
        errors.Forbidden: ErrorKind(403, "forbidden", "The key may not change adapters."),
        adapter_errors.UnknownAdapter: ErrorKind(
            404, "adapter_not_found", "No such adapter; the message names what exists."
        ),
        adapter_errors.UnknownRevision: ErrorKind(
            404, "revision_not_found", "No single stored revision begins like this."
        ),
        adapter_errors.IncompatibleAdapter: ErrorKind(
            409, "adapter_incompatible", "Made for another backbone; every difference is named."
        ),
        adapter_errors.UnloadedAdapter: ErrorKind(
            409, "adapter_unloaded", "Taken out of service until it is loaded or published again."
        ),
        adapter_errors.RevisionConflict: ErrorKind(
            412, "revision_conflict", "`If-Match` or `If-None-Match` does not hold."
        ),
        errors.TooLarge: ErrorKind(
            413, "too_large", "The body or the number of inputs is over its limit."
        ),
        adapter_errors.InvalidAdapter: ErrorKind(
            422, "adapter_invalid", "The file is not an adapter; every fault is named."
        ),
        adapter_errors.InvalidName: ErrorKind(
            422, "adapter_name_invalid", "Names are `[a-z0-9][a-z0-9._-]{0,63}`."
        ),
        errors.InvalidRequest: ErrorKind(
            422, "invalid_request", "Wrong types or values; every fault is named with its place."
        ),
        errors.NoInputs: ErrorKind(
            422, "invalid_request", "Wrong types or values; every fault is named with its place."
        ),
        errors.Overloaded: ErrorKind(
            429, "overloaded", "Too much is waiting. `Retry-After` says when it will have drained."
        ),
        errors.InferenceFailed: ErrorKind(
            500,
            "inference_failed",
            "The device failed on this request, or its scores are not finite.",
        ),
        errors.AdapterLoadFailed: ErrorKind(
            500,
            "adapter_load_failed",
            "The adapter's file vanished or rotted since it was published.",
        ),
        adapter_errors.DamagedFile: ErrorKind(
            500, "adapter_damaged", "The stored file is not what was published."
        ),
        adapter_errors.StoreError: ErrorKind(
            500, "store_failed", "The adapter store cannot do this."
        ),
        adapter_errors.UnsupportedBackbone: ErrorKind(
            500, "backbone_unsupported", "This family cannot be served; the start fails with it."
        ),
        adapter_errors.UnusableBackbone: ErrorKind(
            500,
            "backbone_unusable",
            "The backbone's files are not usable; the start fails with it.",
        ),
        adapter_errors.AdapterError: ErrorKind(
            500, "adapter_error", "Another failure around an adapter."
        ),
        errors.ServiceError: ErrorKind(500, "service_error", "Another failure of the service."),
        errors.NotReady: ErrorKind(
            503, "not_ready", "Loading or warming up. `Retry-After` is set."
        ),
        errors.EngineUnavailable: ErrorKind(
            503, "unavailable", "Draining, stopped or dead. `Retry-After` is set."
        ),
        errors.Unavailable: ErrorKind(
            503, "unavailable", "Draining, stopped or dead. `Retry-After` is set."
        ),
        errors.DeadlineExceeded: ErrorKind(
            504, "deadline_exceeded", "No answer within `timeout_ms`."
        ),
    }
)

# Of the framework itself: no such route, no such method, a body of the wrong kind.
STATUS_TYPES: Mapping[int, str] = MappingProxyType(
    {404: "not_found", 405: "method_not_allowed", 415: "unsupported_media_type"}
)
OTHER_STATUS = "bad_request"
INTERNAL = ErrorKind(
    500, "internal", "A defect of the service; the log has it under the request id."
)


def error_types() -> list[str]:
    """Every `type` that an error can have."""
    kinds = [*(kind.type for kind in ERRORS.values()), *STATUS_TYPES.values()]
    return sorted({*kinds, OTHER_STATUS, INTERNAL.type, DISCONNECTED})


def kind_of(error: BaseException) -> ErrorKind:
    """The row of `ERRORS` for an error: its own class's, else its nearest base's."""
    for cls in type(error).__mro__:
        if cls in ERRORS:
            return ERRORS[cls]
    return INTERNAL


def refusal_of(error: Exception) -> Refusal:
    """What a caller may see of any error. A defect's own words stay in the log."""
    if isinstance(error, RequestValidationError):
        return refusal_of(errors.InvalidRequest(faults_of(error.errors())))
    if isinstance(error, ClientDisconnect):
        return Refusal(ErrorKind(499, DISCONNECTED, ""), "the client closed the connection")
    if isinstance(error, HTTPException):
        kind = ErrorKind(error.status_code, STATUS_TYPES.get(error.status_code, OTHER_STATUS), "")
        return Refusal(kind, _encodable(str(error.detail)), headers=dict(error.headers or {}))
    kind = kind_of(error)
    if kind is INTERNAL:
        return Refusal(kind, "internal error")
    details = tuple(_encodable(item) for item in _details(error))
    return Refusal(kind, _encodable(str(error)), details, _headers(error, kind))


def own_shape(refusal: Refusal) -> Response:
    """The shape of every error of this project's own routes."""
    content = {
        "type": refusal.kind.type,
        "message": refusal.message,
        "details": list(refusal.details),
    }
    return refusal.response({"error": content})


def faults_of(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """Pydantic's errors as one sentence each, with the place in the caller's JSON."""
    faults = [f"{_place(item['loc'])}: {item['msg']}" for item in found[:MAX_DETAILS]]
    if len(found) > MAX_DETAILS:
        faults.append(f"and {len(found) - MAX_DETAILS} more")
    return faults


def _details(error: Exception) -> Sequence[str]:
    """The list behind an error: its faults, or the names that do exist."""
    match error:
        case errors.InvalidRequest():
            return error.details
        case adapter_errors.InvalidAdapter() | adapter_errors.IncompatibleAdapter():
            return error.faults
        case adapter_errors.UnknownAdapter() | adapter_errors.UnknownRevision():
            return error.known[:MAX_DETAILS]
        case _:
            return ()


def _headers(error: Exception, kind: ErrorKind) -> Mapping[str, str]:
    if isinstance(error, errors.Overloaded):
        return {"Retry-After": str(max(1, math.ceil(error.retry_after)))}
    if kind.status == 503:
        return {"Retry-After": str(UNAVAILABLE_RETRY_SECONDS)}
    if kind.status == 401:
        return {"WWW-Authenticate": "Bearer"}
    return {}


def _place(location: tuple[int | str, ...]) -> str:
    """Pydantic names the branch of a union behind the field or index that holds it; callers never
    wrote that."""
    parts: list[str] = []
    for index, part in enumerate(location):
        branch = (
            part in BRANCHES
            and index > 0
            and (location[index - 1] == "inputs" or isinstance(location[index - 1], int))
        )
        if not branch:
            parts.append(str(part)[:MAX_SHOWN_CHARACTERS])
    return ".".join(parts) or "body"


def _encodable(text: str) -> str:
    """File names and headers may carry lone surrogates, which are not UTF-8."""
    return text.encode("utf-8", "replace").decode()
