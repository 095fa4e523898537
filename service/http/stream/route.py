"""POST /v1/predict/stream: lines in, lines out, on one connection."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from service.errors import MalformedRequest
from service.http.bodies import content_type, refuse_encoded, validated
from service.http.errors import DISCONNECTED
from service.http.openapi.documentation import STREAM
from service.http.openapi.schemas import StreamQuery
from service.http.stream.job import Job

NDJSON = "application/x-ndjson"
PATH = "/v1/predict/stream"
router = APIRouter()


@router.post(PATH, **STREAM)
async def predict_stream(request: Request) -> Response:
    """Classify texts as they come, each line by its own adapter.

    Every line of the body gets one line of the answer, in order and as soon as it is done; the body
    may go on for hours. A line that cannot be answered gets an error in its place. Read the answer
    while you send: the service reads no further while its answers are not taken.
    """
    if request.scope["http_version"] == "1.0":
        # Its client would read the chunks' sizes as lines.
        raise MalformedRequest("a stream needs HTTP/1.1, which has chunks")
    kind = content_type(request) or "none"
    if kind != NDJSON:
        raise HTTPException(415, f"Content-Type is {kind}, expected {NDJSON}")
    refuse_encoded(request)
    query = validated(StreamQuery, dict(request.query_params))
    return StreamedResponse(Job(request, query).answer(), request)


class StreamedResponse(Response):
    """Sends pieces as they come, while the body is still being read by whoever makes them.

    Starlette's own streaming response reads the body, too.
    """

    media_type = NDJSON

    def __init__(self, pieces: AsyncGenerator[bytes, None], request: Request) -> None:
        # For nginx, which would collect the answer.
        super().__init__(headers={"X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._pieces = pieces
        self._request = request

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002
        start: dict[str, Any] = {"type": "http.response.start", "status": self.status_code}
        async with aclosing(self._pieces) as pieces:
            try:
                async for piece in pieces:
                    if start:
                        await send({**start, "headers": self.raw_headers})
                        start = {}
                    if piece:
                        await send({"type": "http.response.body", "body": piece, "more_body": True})
                await send({"type": "http.response.body", "body": b"", "more_body": False})
            except ClientDisconnect:
                self._request.scope["idspam.error"] = DISCONNECTED
