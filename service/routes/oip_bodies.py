"""Bodies of the Open Inference Protocol V2: JSON and bytes behind it, compressed or not.

Knows no tensor and no adapter.
"""

import asyncio
import zlib
from typing import Any, TypeVar

import orjson
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request

from service.errors import InvalidRequest, MalformedRequest, TooLarge
from service.routes.bodies import read_body
from service.routes.errors import faults_of

M = TypeVar("M", bound=BaseModel)

LENGTH_HEADER = "Inference-Header-Content-Length"
# What `zlib.decompressobj` must be told of a format.
_WINDOWS = {"gzip": 31, "deflate": 15}


async def read_parts(request: Request, limit: int) -> tuple[bytes, bytes]:
    """The JSON of a request, empty if it has no body, and the bytes behind it.

    Args:
        limit: of the body in bytes, as it comes and decompressed.

    Raises:
        HTTPException: 415, another kind of body.
        TooLarge: over `limit` bytes.
        MalformedRequest: it cannot be decompressed, or has no JSON of the announced length.
        ClientDisconnect: the client went away while sending.
    """
    _check_kind(request)
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding != "identity" and encoding not in _WINDOWS:
        known = ", ".join(_WINDOWS)
        raise HTTPException(415, f"Content-Encoding is {encoding[:64]}, expected {known} or none")
    body = await read_body(request, limit)
    if encoding in _WINDOWS:
        body = await asyncio.to_thread(_decompressed, body, encoding, limit)
    announced = request.headers.get(LENGTH_HEADER)
    if announced is None:
        return body, b""
    # Digits of other scripts are digits, too.
    plain = announced.isascii() and announced.isdigit()
    if not plain or int(announced[:20]) > len(body):
        raise MalformedRequest(
            f"{LENGTH_HEADER} is {announced[:20]!r}, the body has {len(body)} bytes"
        )
    length = int(announced[:20])
    return body[:length], body[length:]


def parsed(model: type[M], text: bytes) -> M:
    """JSON as a model.

    Raises:
        MalformedRequest: not JSON.
        InvalidRequest: with every fault and its place.
    """
    try:
        content: Any = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise MalformedRequest(f"the body is not JSON: {error}") from None
    try:
        return model.model_validate(content)
    except ValidationError as error:
        raise InvalidRequest(faults_of(error.errors())) from None


def _check_kind(request: Request) -> None:
    """
    Raises:
        HTTPException: 415.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    # Triton's client names none. A web page may do so too without its browser asking first whether
    # it may, but its requests have an origin.
    if not kind and "origin" in request.headers:
        raise HTTPException(415, "no Content-Type, expected application/json")
    if kind not in ("", "application/json", "application/octet-stream"):
        raise HTTPException(415, f"Content-Type is {kind[:64]}, expected application/json")


def _decompressed(data: bytes, encoding: str, limit: int) -> bytes:
    stream = zlib.decompressobj(_WINDOWS[encoding])
    try:
        found = stream.decompress(data, limit + 1)
    except zlib.error as error:
        raise MalformedRequest(f"the body is not {encoding}: {error}") from None
    if len(found) > limit:
        raise TooLarge(f"the body is larger than {limit} bytes when decompressed")
    if not stream.eof or stream.unused_data:
        fault = "has bytes behind its end" if stream.eof else "is cut off"
        raise MalformedRequest(f"the body's {encoding} stream {fault}")
    return found
