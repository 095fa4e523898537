"""Every error as HTTP: one table from exception classes to statuses, one JSON shape.

The shape below is that of this project's own routes; each compatible protocol has another:

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

from adapters.errors import (
    AdapterError,
    CollectedEntries,
    CurrentRevision,
    DamagedFile,
    DamagedStore,
    IncompatibleAdapter,
    InvalidAdapter,
    InvalidName,
    NewerStore,
    NoCard,
    NoTraffic,
    OtherBackbone,
    RevisionConflict,
    RevisionServed,
    RevisionTried,
    StoreDenied,
    StoreError,
    StoreFailed,
    StoreFull,
    StoreInUse,
    StoreUnreachable,
    UncuttableText,
    UnforcedReplacement,
    UnknownAdapter,
    UnknownOutcome,
    UnknownRevision,
    UnlikeRevision,
    UnloadedAdapter,
    UnsupportedBackbone,
    UnusableBackbone,
)
from service.errors import (
    AdapterLoadFailed,
    AuditFailed,
    BodyTimeout,
    DeadlineExceeded,
    EngineUnavailable,
    Forbidden,
    InferenceFailed,
    InvalidRequest,
    KeyExpired,
    KeyRevoked,
    LeaseExpired,
    MalformedRequest,
    NoInputs,
    NotReady,
    Overloaded,
    QuotaExceeded,
    RequestError,
    RolloutRefused,
    RolloutTimeout,
    ServiceError,
    TextsNotKept,
    TooLarge,
    TooManyFailures,
    Unauthorized,
    Unavailable,
)
from service.http.bodies import MAX_DETAILS, JsonResponse, faults_of

UNAVAILABLE_RETRY_SECONDS = 2
# The client has closed the connection: metrics count this type, no client ever sees it.
DISCONNECTED = "disconnected"


@dataclass(frozen=True, slots=True)
class ErrorKind:
    """How a class of errors appears to clients: its status, `type` and documentation."""

    status: int
    type: str
    meaning: str


@dataclass(frozen=True, slots=True)
class Refusal:
    """An error as clients may see it, before a protocol gives it a shape.

    details: every fault, or the names that do exist.
    """

    kind: ErrorKind
    message: str
    details: tuple[str, ...] = ()
    headers: Mapping[str, str] = field(default_factory=dict)

    def response(self, content: Any, *, status: int | None = None) -> Response:
        """The HTTP response with a protocol's body, and its status where that differs."""
        return JsonResponse(
            content, status_code=status or self.kind.status, headers=dict(self.headers)
        )


_INVALID = "Wrong types or values; every fault is named with its place."
_CURRENT = "The current revision cannot be deleted alone, nor be tried beside itself."
_STORE_FAILED = "The store's disk fails, is read-only, gone or another service's; nothing changed."
_STORE_CANNOT = "The adapter store cannot do this."
_UNUSABLE_BACKBONE = (
    "A start error: unusable backbone files, or a shared store of another backbone."
)
_UNKNOWN_OUTCOME = "The shared store failed in the middle: the change may be made, or not."
_UNAVAILABLE = "Draining, stopped or dead. `Retry-After` is set."
# In the order of the documentation. A class that is missing here gets the row of its nearest base.
_TABLE: tuple[tuple[type[Exception], int, str, str], ...] = (
    (MalformedRequest, 400, "malformed_request", "The body is not JSON, or not a valid form."),
    (RequestError, 400, "bad_request", "The request cannot be used."),
    (Unauthorized, 401, "unauthorized", "No key, or an unknown one."),
    (KeyExpired, 401, "key_expired", "The key is right, but its time is over."),
    (KeyRevoked, 401, "key_revoked", "The key is right, but it was revoked."),
    (Forbidden, 403, "forbidden", "Not with this key, or not from a web page of another origin."),
    (UnknownAdapter, 404, "adapter_not_found", "No such adapter; the message names what exists."),
    (UnknownRevision, 404, "revision_not_found", "No single stored revision begins like this."),
    (NoCard, 404, "card_not_found", "No model card was stored with this revision."),
    (NoTraffic, 404, "traffic_not_found", "No second revision reads texts, or ever did."),
    (TextsNotKept, 404, "texts_not_kept", "The settings keep no texts of low confidence."),
    (BodyTimeout, 408, "request_timeout", "The body stalls, or comes too slowly."),
    (IncompatibleAdapter, 409, "adapter_incompatible", "Made for another backbone; see `details`."),
    (UnloadedAdapter, 409, "adapter_unloaded", "Not served until it is loaded or published again."),
    (CurrentRevision, 409, "revision_current", _CURRENT),
    (RevisionServed, 409, "revision_current", _CURRENT),
    (RevisionTried, 409, "revision_tried", "It reads some of the texts: end that first."),
    (
        UnlikeRevision,
        409,
        "revision_unlike",
        "It has other labels or another task, so it can only be a shadow.",
    ),
    (
        UnforcedReplacement,
        409,
        "replacement_not_forced",
        "It has other labels or another task; `?force=true` replaces all the same.",
    ),
    (
        RolloutRefused,
        409,
        "rollout_refused",
        "A replica cannot serve this revision, and says why; nothing changed.",
    ),
    (RevisionConflict, 412, "revision_conflict", "`If-Match` or `If-None-Match` does not hold."),
    (TooLarge, 413, "too_large", "The body, its values, its inputs or the answer exceed a limit."),
    (InvalidAdapter, 422, "adapter_invalid", "The file is not an adapter; every fault is named."),
    (InvalidName, 422, "adapter_name_invalid", "Names are `[a-z0-9][a-z0-9._-]{0,63}`."),
    (InvalidRequest, 422, "invalid_request", _INVALID),
    (UncuttableText, 422, "invalid_request", _INVALID),
    (NoInputs, 422, "invalid_request", _INVALID),
    (Overloaded, 429, "overloaded", "Too much is waiting; `Retry-After` says when to come back."),
    (QuotaExceeded, 429, "quota_exceeded", "The key's quota is used up; `Retry-After` is set."),
    (TooManyFailures, 429, "too_many_failures", "Wrong keys from here; `Retry-After` is set."),
    (InferenceFailed, 500, "inference_failed", "The device failed, or the scores are not finite."),
    (AdapterLoadFailed, 500, "adapter_load_failed", "Its stored file has vanished or is damaged."),
    (DamagedFile, 500, "adapter_damaged", "The stored file is not what was published."),
    (StoreError, 500, "store_failed", _STORE_CANNOT),
    (NewerStore, 500, "store_failed", _STORE_CANNOT),
    (DamagedStore, 500, "store_failed", _STORE_CANNOT),
    (CollectedEntries, 503, "store_failed", _STORE_FAILED),
    (StoreInUse, 503, "store_failed", _STORE_FAILED),
    (StoreFailed, 503, "store_failed", _STORE_FAILED),
    (StoreFull, 507, "store_failed", "The store's disk or quota is full; nothing changed."),
    (StoreUnreachable, 503, "store_unreachable", "The shared store does not answer, or failed."),
    (StoreDenied, 503, "store_denied", "The shared store refuses the service's credentials."),
    (UnknownOutcome, 503, "outcome_unknown", _UNKNOWN_OUTCOME),
    (UnsupportedBackbone, 500, "backbone_unsupported", "A start error: unsupported model family."),
    (OtherBackbone, 500, "backbone_unusable", _UNUSABLE_BACKBONE),
    (UnusableBackbone, 500, "backbone_unusable", _UNUSABLE_BACKBONE),
    (AdapterError, 500, "adapter_error", "Another failure around an adapter."),
    (ServiceError, 500, "service_error", "Another failure of the service."),
    (AuditFailed, 503, "audit_failed", "The audit log cannot be written; nothing changed."),
    (
        LeaseExpired,
        503,
        "lease_expired",
        "This replica cannot read the shared store, so it does not answer. `Retry-After` is set.",
    ),
    (NotReady, 503, "not_ready", "Loading or warming up. `Retry-After` is set."),
    (EngineUnavailable, 503, "unavailable", _UNAVAILABLE),
    (Unavailable, 503, "unavailable", _UNAVAILABLE),
    (
        RolloutTimeout,
        504,
        "rollout_timeout",
        "Replicas were not ready for this revision in time; nothing changed.",
    ),
    (DeadlineExceeded, 504, "deadline_exceeded", "No answer within `timeout_ms`."),
)
ERRORS: Mapping[type[Exception], ErrorKind] = MappingProxyType(
    {cls: ErrorKind(status, type_, meaning) for cls, status, type_, meaning in _TABLE}
)
# Errors of the web framework: no such route, no such method, a body of the wrong kind,
# a part of a file that it does not have.
STATUS_TYPES: Mapping[int, str] = MappingProxyType(
    {
        404: "not_found",
        405: "method_not_allowed",
        415: "unsupported_media_type",
        416: "range_not_satisfiable",
    }
)
INTERNAL = ErrorKind(500, "internal", "A defect; the log has it under the request id.")


def error_types() -> list[str]:
    """Every `type` that an error can have."""
    kinds = [*(kind.type for kind in ERRORS.values()), *STATUS_TYPES.values()]
    return sorted({*kinds, INTERNAL.type, DISCONNECTED})


def kind_of(error: BaseException) -> ErrorKind:
    """The row of `ERRORS` for an error: that of its class, else of its nearest base class."""
    for cls in type(error).__mro__:
        if cls in ERRORS:
            return ERRORS[cls]
    return INTERNAL


def refusal_of(error: Exception) -> Refusal:
    """What a client may see of any error. The message of an unexpected one stays in the log."""
    if isinstance(error, RequestValidationError):
        return refusal_of(InvalidRequest(faults_of(error.errors())))
    if isinstance(error, ClientDisconnect):
        return Refusal(ErrorKind(499, DISCONNECTED, ""), "the client closed the connection")
    if isinstance(error, HTTPException):
        status = error.status_code
        kind = ErrorKind(status, STATUS_TYPES.get(status, ERRORS[RequestError].type), "")
        return Refusal(kind, _encodable(str(error.detail)), headers=dict(error.headers or {}))
    kind = kind_of(error)
    if kind is INTERNAL:
        return Refusal(kind, "internal error")
    details = tuple(_encodable(item) for item in _details(error))
    return Refusal(kind, _encodable(str(error)), details, _headers(error, kind))


def own_shape(refusal: Refusal) -> Response:
    """The shape of every error of this project's own routes."""
    kind, details = refusal.kind, list(refusal.details)
    content = {"type": kind.type, "message": refusal.message, "details": details}
    return refusal.response({"error": content})


def _details(error: Exception) -> Sequence[str]:
    """Every fault of the request, or the names that do exist."""
    match error:
        case InvalidRequest():
            return error.details
        case InvalidAdapter() | IncompatibleAdapter():
            return error.faults
        case UnforcedReplacement() | UnlikeRevision():
            return error.changes
        case UnknownAdapter() | UnknownRevision():
            return error.known[:MAX_DETAILS]
        case _:
            return ()


def _headers(error: Exception, kind: ErrorKind) -> Mapping[str, str]:
    if isinstance(error, Overloaded | QuotaExceeded | TooManyFailures):
        return {"Retry-After": str(max(1, math.ceil(error.retry_after)))}
    if kind.status == 503:
        return {"Retry-After": str(UNAVAILABLE_RETRY_SECONDS)}
    if kind.status == 401:
        return {"WWW-Authenticate": "Bearer"}
    return {}


def _encodable(text: str) -> str:
    """File names and headers may carry lone surrogates, which are not UTF-8."""
    return text.encode("utf-8", "replace").decode()
