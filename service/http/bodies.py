"""Request and response bodies: reading with a size limit, JSON both ways, validation."""

from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import orjson
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Scope

from service.errors import InvalidRequest, MalformedRequest, ServiceError, TooLarge
from service.http.body_budget import FREE_BYTES, BodyShare, Place
from service.http.lifecycle import service_of
from service.http.openapi.schemas import BRANCHES

M = TypeVar("M", bound=BaseModel)

MAX_DETAILS = 100
# Smaller bodies are parsed in a few milliseconds, whatever they are made of.
_UNCOUNTED_BYTES = 2**17
# Parsed in less than a twentieth of a second.
MOST_VALUES = 2**17
_NOT_COUNTED = bytes(set(range(256)) - set(b'"[{,'))
# Far more than any model has.
_MOST_FIELDS = 1000
MAX_SHOWN_CHARACTERS = 64
# In the state of a request's scope, which copies of the scope share: the error that ended its body,
# which reading it raises.
BODY_FAULT = "idspam.body_fault"
# In the same place, set by a route that watches the pace of its body itself: called when the client
# has gone.
BODY_WATCHED = "idspam.body_watched"


class JsonResponse(Response):
    """JSON by orjson, several times faster than the standard library on answers full of floats.

    Always UTF-8. A NaN would become null, never the bare word that breaks clients.
    """

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        # float32 arrays are written with as many digits as they have.
        return _dumped(content)


def in_json(content: Any) -> orjson.Fragment:
    """A part of a `JsonResponse` that is written now, so that the whole is copied and not made at
    once."""
    return orjson.Fragment(_dumped(content))


def _dumped(content: Any) -> bytes:
    return orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY)


async def read_json(request: Request, limit: int) -> Any:
    """The body of a request, which must be announced as JSON.

    Raises:
        HTTPException: 415, another content type, or encoded.
        TooLarge: over `limit` bytes.
        MalformedRequest: as `parse_json`, or the body is empty.
        ClientDisconnect: the client went away while sending.
    """
    kind = content_type(request) or "none"
    # A web page cannot send this type to another origin unless the browser asks that origin first.
    if kind != "application/json" and not (
        kind.startswith("application/") and kind.endswith("+json")
    ):
        raise HTTPException(415, f"Content-Type is {kind}, expected application/json")
    refuse_encoded(request)
    most = service_of(request).settings.max_values
    return parse_json(await read_body(request, limit), most=most)


def refuse_encoded(request: Request) -> None:
    """
    Raises:
        HTTPException: 415, the body is compressed or encoded in another way.
    """
    encodings = request.headers.getlist("content-encoding")
    if encodings and any(item.strip().lower() not in ("", "identity") for item in encodings):
        shown = ", ".join(encodings)[:MAX_SHOWN_CHARACTERS]
        # RFC 9110 names the encodings that are accepted in this header.
        raise HTTPException(
            415,
            f"Content-Encoding is {shown}: send the body as it is, not encoded",
            headers={"Accept-Encoding": "identity"},
        )


def parse_json(body: bytes, what: str = "body", *, most: int = MOST_VALUES) -> Any:
    """The last one of repeated keys counts.

    Args:
        what: it is called in errors.
        most: commas and opening brackets outside its strings. Every value is the first of a list or
            object, or follows a comma.

    Raises:
        MalformedRequest: empty or not JSON (so are NaN, lone surrogates and bad UTF-8), or nested
        more than a thousand levels deep.
        TooLarge: more values than `most`.
    """
    if not body:
        raise MalformedRequest(f"the {what} is empty, expected JSON")
    if len(body) > _UNCOUNTED_BYTES and _has_more_values(body, most):
        raise TooLarge(f"the {what} has more than {most} values")
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise MalformedRequest(f"the {what} is not JSON: {error}") from None


def _has_more_values(body: bytes, most: int) -> bool:
    """Counts before parsing: a body of `[],` or of short keys would become millions of objects, and
    while they are made nothing else runs."""
    if sum(map(body.count, (b"[", b"{", b","))) <= most:
        return False
    # Most of a text may be brackets and commas.
    body = body.replace(rb"\\", b"").replace(rb"\"", b"").translate(None, _NOT_COUNTED)
    # So many strings, keys and values, are more values. They are not made to be counted.
    if body.count(b'"') > 4 * (most + 1):
        return True
    return sum(map(len, body.split(b'"')[::2])) > most


async def read_as(model: type[M], request: Request) -> M:
    """The JSON body of a request as a model.

    Each wrong item of a list and each unknown field is a fault, which is far larger than what it
    names. So both are counted before any of them is looked at.

    Raises:
        TooLarge: a list of more than `IDSPAM_MAX_INPUTS` items.
        InvalidRequest: far too many fields, or as `validated`.
        HTTPException, MalformedRequest, ...: as `read_json`.
    """
    settings = service_of(request).settings
    content = await read_json(request, settings.max_body_bytes)
    fields = len(content) if isinstance(content, dict) else 0
    for name, value in _known_fields(model, content):
        if isinstance(value, list) and len(value) > settings.max_inputs:
            raise TooLarge(f"{name}: {len(value)} items, at most {settings.max_inputs} are allowed")
        fields += len(value) if isinstance(value, dict) else 0
    if fields > _MOST_FIELDS and model.model_config.get("extra") == "forbid":
        raise InvalidRequest([f"body: {fields} fields, far more than there are"])
    return validated(model, content)


def validated(model: type[M], content: Any) -> M:
    """JSON content as a model.

    Raises:
        InvalidRequest: with every fault and its place.
    """
    try:
        return model.model_validate(content)
    except ValidationError as error:
        faults = error.errors(include_url=False, include_context=False, include_input=False)
        raise InvalidRequest(faults_of(faults)) from None


def _known_fields(model: type[BaseModel], content: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(content, dict):
        yield from ((name, content[name]) for name in model.model_fields if name in content)


def faults_of(errors: Sequence[Mapping[str, Any]]) -> list[str]:
    """Pydantic's errors as one sentence each, with the place in the client's JSON."""
    faults = [f"{_place(error['loc'])}: {error['msg']}" for error in errors[:MAX_DETAILS]]
    if len(errors) > MAX_DETAILS:
        faults.append(f"and {len(errors) - MAX_DETAILS} more")
    return faults


async def read_body(request: Request, limit: int) -> bytes:
    """The whole body, if it is small enough.

    The announced length is checked before any byte is read; reading a chunked body stops at the
    limit. The server discards what the client sends after that.

    Raises:
        TooLarge: over `limit` bytes.
        BodyTimeout: it stalls, or comes too slowly.
        MalformedRequest: its chunks are not valid.
        Overloaded: with all other bodies in flight it is over `IDSPAM_MAX_BODY_BYTES_IN_FLIGHT`.
        EngineUnavailable: the service drains, and the body has not come completely.
        ClientDisconnect: the client went away while sending.
    """
    chunks = [chunk async for chunk in _stream(request, limit, "memory")]
    return chunks[0] if len(chunks) == 1 else b"".join(chunks)


def limited_stream(request: Request, limit: int) -> AsyncGenerator[bytes, None]:
    """The body chunk by chunk, for readers that write it to disk; raises as `read_body`."""
    return _stream(request, limit, "disk")


def hold(request: Request, size: int) -> None:
    """Count bytes that were made from a body, as by decompression.

    Raises:
        Overloaded: they are over the bound of all bodies in flight.
    """
    if size > FREE_BYTES:
        _share_of(request).take(size, "memory")


async def _stream(request: Request, limit: int, place: Place) -> AsyncGenerator[bytes, None]:
    announced = request.headers.get("content-length", "0")
    if announced.isdecimal() and (length := int(announced[:20])) > FREE_BYTES:
        if length > limit:
            raise _too_large(limit)
        _share_of(request).refuse_unless_fits(length, place)
    total, counted, more = 0, 0, True
    while more:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        chunk = message.get("body", b"")
        total += len(chunk)
        if total > limit:
            raise _too_large(limit)
        more = message.get("more_body", False)
        if more and (fault := fault_of(request.scope)) is not None:
            raise fault
        if total > FREE_BYTES:
            _share_of(request).take(total - counted, place)
            counted = total
        if chunk:
            yield chunk


def _share_of(request: Request) -> BodyShare:
    return service_of(request).body_budget.share_of(request.scope)


def fault_of(scope: Scope) -> ServiceError | None:
    """What ended the body of a request before its end, if anything did."""
    fault: ServiceError | None = scope.get("state", {}).get(BODY_FAULT)
    return fault


def content_type(request: Request) -> str:
    """The media type of the body in lower case, without parameters; empty if there is none."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def _place(location: tuple[int | str, ...]) -> str:
    """A fault's place as the client wrote it: Pydantic adds the branch of a union after the field
    or index that holds it."""
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


def _too_large(limit: int) -> TooLarge:
    return TooLarge(f"the body is larger than {limit} bytes")
