"""Bytes in and out: bounded bodies, JSON both ways. Knows no route and no adapter."""

from collections.abc import AsyncGenerator
from typing import Any

import orjson
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from service.errors import MalformedRequest, TooLarge


class JsonResponse(Response):
    """JSON by orjson, several times faster than the standard library's on answers full of floats.

    Always UTF-8, and a NaN could only become null, never the bare word that breaks clients.
    """

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return orjson.dumps(content)


async def read_body(request: Request, limit: int) -> bytes:
    """The whole body, if it is small enough.

    The announced length is looked at before a byte is read; a chunked body is given up at the
    limit. What the client still sends is discarded by the server as it comes.

    Raises:
        TooLarge: over `limit` bytes.
        ClientDisconnect: the client went away while sending.
    """
    chunks = [chunk async for chunk in limited_stream(request, limit)]
    return chunks[0] if len(chunks) == 1 else b"".join(chunks)


async def limited_stream(request: Request, limit: int) -> AsyncGenerator[bytes, None]:
    """The body as it comes, for parsers that need not have it whole; raises as `read_body` does."""
    announced = request.headers.get("content-length", "0")
    if announced.isdecimal() and int(announced[:20]) > limit:
        raise _too_large(limit)
    total, more = 0, True
    while more:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        chunk = message.get("body", b"")
        total += len(chunk)
        if total > limit:
            raise _too_large(limit)
        more = message.get("more_body", False)
        if chunk:
            yield chunk


async def read_json(request: Request, limit: int) -> Any:
    """The body parsed as JSON. Repeated keys: the last one counts. NaN, lone surrogates and bad
    UTF-8 are no JSON.

    Raises:
        HTTPException: 415, the body is not announced as JSON.
        TooLarge: over `limit` bytes.
        MalformedRequest: not JSON, or nested deeper than a thousand levels.
    """
    kind = request.headers.get("content-type", "none").partition(";")[0].strip().lower()
    # Asked for strictly: a web page cannot send this type to another origin without the browser
    # asking first.
    if kind != "application/json" and not (
        kind.startswith("application/") and kind.endswith("+json")
    ):
        raise HTTPException(415, f"Content-Type is {kind}, expected application/json")
    body = await read_body(request, limit)
    if not body:
        raise MalformedRequest("the body is empty, expected JSON")
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise MalformedRequest(f"the body is not JSON: {error}") from None


def _too_large(limit: int) -> TooLarge:
    return TooLarge(f"the body is larger than {limit} bytes")
