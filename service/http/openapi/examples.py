"""Examples of this project's own requests, answers and errors; a test validates each of them.

`examples.json` has the requests and answers; error bodies are made as those for clients are.
"""

from pathlib import Path
from typing import Any

import orjson
from starlette.exceptions import HTTPException

from adapters import errors as adapter_errors
from service import errors
from service.http.errors import own_shape, refusal_of

REVISION = "5f2c8a0e4d3b1f6a7c9e8d0b2a4f6c8e1d3b5a7f9c0e2d4b6a8f1c3e5d7b9a0f"
OLDER = "0c9d1e2f3a4b5c6d7e8f90a1b2c3d4e5f60718293a4b5c6d7e8f90a1b2c3d4e5"

ERRORS: tuple[Exception, ...] = (
    errors.RequestError("the request cannot be used"),
    errors.MalformedRequest("the body is not JSON: unexpected end of data: line 1 column 12"),
    errors.Unauthorized("send a key as `Authorization: Bearer KEY` or `X-API-Key: KEY`"),
    errors.KeyExpired("the key 'batch' has expired"),
    errors.KeyRevoked("the key 'batch' was revoked"),
    errors.Forbidden("changing adapters asks for an admin key"),
    HTTPException(404, "no adapter is named: ask /adapters/NAME/predict"),
    adapter_errors.UnknownAdapter("sms-spm", ["banking77", "clinc150", "sentiment", "sms-spam"]),
    adapter_errors.UnknownRevision("sms-spam", "77", [REVISION, OLDER]),
    adapter_errors.NoCard("sms-spam", REVISION),
    adapter_errors.NoTraffic("sms-spam"),
    errors.TextsNotKept(),
    errors.BodyTimeout("the body stalls: nothing came for 30 seconds"),
    adapter_errors.IncompatibleAdapter(
        ["backbone: made for 'roberta-large', loaded is 'all-MiniLM-L6-v2'"]
    ),
    adapter_errors.UnloadedAdapter("sms-spam"),
    adapter_errors.CurrentRevision("sms-spam", REVISION),
    adapter_errors.RevisionServed("sms-spam", REVISION),
    adapter_errors.RevisionTried("sms-spam", OLDER),
    adapter_errors.UnlikeRevision("sms-spam", OLDER, ["labels removed: ham"]),
    adapter_errors.UnforcedReplacement("sms-spam", ["labels removed: ham"]),
    errors.RolloutRefused("sms-spam", "gpu-2", "no space is left on the device"),
    adapter_errors.RevisionConflict("sms-spam", OLDER, REVISION),
    errors.TooLarge("2000 inputs in one request, at most 1024 are allowed"),
    HTTPException(415, "Content-Type is text/plain, expected application/json"),
    HTTPException(
        416,
        "Range is bytes=99999999-, the file has 1065353 bytes",
        headers={"Content-Range": "bytes */1065353"},
    ),
    adapter_errors.InvalidAdapter(["tensor head.out.bias: missing, expected shape [2]"]),
    adapter_errors.InvalidName("adapter name 'SMS Spam': expected 1 to 64 of a-z 0-9 . _ -"),
    errors.InvalidRequest(
        ["inputs.1.text: Field required", "top_k: Input should be a valid integer"]
    ),
    errors.NoInputs(),
    errors.QuotaExceeded("the key's quota is used up", retry_after=0.4),
    errors.TooManyFailures("too many wrong keys from this address", retry_after=12.0),
    errors.Overloaded("262000 tokens are waiting, at most 262144 may", retry_after=1.7),
    errors.InferenceFailed("adapter 'sms-spam': the scores are not finite"),
    errors.AdapterLoadFailed("sms-spam", REVISION, "the file is gone"),
    adapter_errors.DamagedFile(f"the file of adapter 'sms-spam', revision {REVISION}, is gone"),
    adapter_errors.StoreFailed("the adapter store cannot publish: Read-only file system"),
    adapter_errors.StoreFull("the adapter store cannot publish: No space left on device"),
    adapter_errors.StoreUnreachable(
        "the adapter store s3://bucket/idspam cannot read log/000000000017.json: no answer in time"
    ),
    adapter_errors.StoreDenied(
        "the adapter store s3://bucket/idspam refuses the credentials, or there are none"
    ),
    adapter_errors.UnknownOutcome("whether a change of 'sms-spam' is in the log is not known"),
    RuntimeError("what the log says, and the client does not see"),
    errors.AuditFailed("the change cannot be recorded: No space left on device"),
    errors.LeaseExpired(
        "the replica's lease is over; it read the shared store 6.0 seconds ago: connection refused"
    ),
    errors.NotReady("warming up"),
    errors.EngineUnavailable("the service is draining"),
    errors.RolloutTimeout("sms-spam", ["gpu-2"], 60.0),
    errors.DeadlineExceeded("the deadline passed before the answer was there"),
)

# Requests are by name.
_BODIES = orjson.loads(Path(__file__).with_suffix(".json").read_bytes())
PREDICT_REQUESTS: dict[str, Any] = _BODIES["predict_requests"]
PREDICT_RESPONSE: dict[str, Any] = _BODIES["predict_response"]
STREAM_LINES: list[dict[str, Any]] = _BODIES["stream_lines"]
STREAM_ANSWERS: list[dict[str, Any]] = _BODIES["stream_answers"]
PUBLISHED: dict[str, Any] = _BODIES["published"]
HEALTHY: dict[str, Any] = _BODIES["healthy"]
NOT_READY: dict[str, Any] = _BODIES["not_ready"]
LIST_PAGE: dict[str, Any] = _BODIES["list_page"]
DETAIL: dict[str, Any] = _BODIES["detail"]
DIFFERENCE: dict[str, Any] = _BODIES["difference"]
ROLLBACKS: dict[str, Any] = _BODIES["rollbacks"]
TRAFFIC_REQUESTS: dict[str, Any] = _BODIES["traffic_requests"]
TRAFFIC: dict[str, Any] = _BODIES["traffic"]
DRIFT: dict[str, Any] = _BODIES["drift"]
UNCERTAIN: dict[str, Any] = _BODIES["uncertain"]


def stream_error(error: Exception, line: int | None, id: str | None = None) -> dict[str, Any]:
    """What a client gets in place of a line's answer."""
    return {"id": id, "line": line, **error_body(error)}


def error_body(error: Exception) -> Any:
    """What a client gets."""
    return orjson.loads(bytes(own_shape(refusal_of(error)).body))
