"""What Ray's HTTP proxy does for this service: ASGI middleware that runs in every proxy.

The proxy routes a request before it has its body, and answers with plain text when a replica is
gone. So this

- reads the beginning of a body and leaves the names of its adapters where the router finds them,
- asks once more, and then another replica, where a prediction's replica ended before it answered,
  or may not answer now: it drains, or its lease is over,
- ends a prediction some seconds after its own time limit: a replica answers in time, but one whose
  node is gone says nothing until Ray has noticed,
- gives the proxy's own errors the shape that the path's protocol has, with `Retry-After`.

`RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=deploy.ray.edge:middleware` installs it. Without it
everything is answered, but requests are routed by queues alone.
"""

import asyncio
from contextlib import suppress
from time import monotonic

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deploy.ray import hints
from deploy.ray.headers import REPLICA
from service.access.scopes import match
from service.errors import DeadlineExceeded, EngineUnavailable, ServiceError
from service.http.error_shapes import shape_of
from service.http.errors import refusal_of

# What the proxy passes on to the router, as the session id of a request.
HINT = b"x-session-id"
# The proxy gives up a request after so long, and answers 408.
LIMIT = b"x-request-timeout-seconds"
_TOO_LATE = 408
# After its time limit a replica still has to say that it is over, also on a busy machine.
_GRACE_SECONDS = 5.0
# How long a body may take to begin before its request is routed without it.
_PATIENCE_SECONDS = 0.05
# The proxy's own paths, such as `/-/healthz`.
_OF_PROXY = "/-/"
# Statuses of the proxy itself: a replica that died, no replica, a full queue, its own time limit.
_PROXY_ERRORS = (408, 429, 500, 503)
# What a replica answers that may not answer now. Another may; the router has not heard of it yet.
_NOT_NOW = 503
_REQUEST_ID = b"x-request-id"
# How often a prediction is sent, and the pause before the second time, doubled before the third.
_ATTEMPTS = 3
_PAUSE_SECONDS = 0.1


def middleware() -> list[Middleware]:
    """For Ray Serve, which calls it in each proxy."""
    return [Middleware(Edge)]


class Edge:
    """Hints for the router, and errors in the service's shape."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"].startswith(_OF_PROXY):
            await self._app(scope, receive, send)
            return
        headers: list[tuple[bytes, bytes]] = list(scope["headers"])
        request = _Request(receive)
        if scope["method"] == "POST":
            await request.look()
        names = hints.in_path(scope["path"]) or hints.in_body(request.body)
        if names and all(name != HINT for name, _ in headers):
            headers.append((HINT, hints.pack(names).encode()))
        again = request.whole and _is_prediction(scope["path"])
        attempts = _ATTEMPTS if again else 1
        seconds = hints.seconds_in(scope["path"], request.body) if again else None
        until = None if seconds is None else monotonic() + seconds + _GRACE_SECONDS
        error: ServiceError = EngineUnavailable("no replica answered: it ended, or none is ready")
        for attempt in range(attempts):
            if attempt:
                await asyncio.sleep(_PAUSE_SECONDS * attempt)
            answer = _Answer(send, elsewhere=attempt + 1 < attempts)
            # Serve's own middleware adds to the headers in place.
            asked = {**scope, "headers": [*headers, *_limit(until)]}
            await self._app(asked, request.again(), answer.send)
            if answer.started or request.disconnected:
                return
            if again and answer.too_late:
                error = DeadlineExceeded("no answer in time: its replica or its node may be gone")
                break
        await shape_of(scope["path"])(refusal_of(error))(scope, receive, send)


def _is_prediction(path: str) -> bool:
    """Whether a POST changes nothing, so that it can be sent twice."""
    route = match("POST", path)
    return route is not None and "predict" in route.need.scopes


def _limit(until: float | None) -> list[tuple[bytes, bytes]]:
    """The header that ends a request at a time of the monotonic clock."""
    return [] if until is None else [(LIMIT, f"{max(0.1, until - monotonic()):.3f}".encode())]


class _Request:
    """A request whose beginning is looked at, and which may be received several times.

    Attributes:
        body: what has been received of it. whole: whether that is all.
    """

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._taken: list[Message] = []
        self._coming: asyncio.Task[Message] | None = None
        self.body = b""
        self.whole = self.disconnected = False

    async def look(self) -> None:
        """Receive its beginning, if that comes in time."""
        with suppress(TimeoutError):
            async with asyncio.timeout(_PATIENCE_SECONDS):
                while not (self.whole or self.disconnected) and len(self.body) < hints.LOOKED_AT:
                    await self._take()

    async def _take(self) -> None:
        self._coming = asyncio.create_task(self._next())
        # Cancelled with the one who waits, it would take the message along.
        message = await asyncio.shield(self._coming)
        self._coming = None
        self._taken.append(message)
        self.body += message.get("body", b"")
        self.whole = not message.get("more_body", False)

    def again(self) -> Receive:
        """How to receive the request from its beginning."""
        taken = list(self._taken)

        async def receive() -> Message:
            if taken:
                return taken.pop(0)
            if self._coming is not None:
                message = await asyncio.shield(self._coming)
                self._coming = None
                return message
            return await self._next()

        return receive

    async def _next(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.disconnect":
            self.disconnected = True
        return message


class _Answer:
    """Passes a replica's answer on, and keeps back an error of the proxy itself.

    Args:
        elsewhere: another replica can still be asked, so one that may not answer now is kept back.

    Attributes:
        started: something was passed on. too_late: the proxy has given up.
    """

    def __init__(self, send: Send, *, elsewhere: bool) -> None:
        self._send = send
        self._elsewhere = elsewhere
        self._kept_back = False
        self.started = self.too_late = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = list(message.get("headers", ()))
            if any(name == REPLICA for name, _ in headers):
                self._kept_back = self._elsewhere and message["status"] == _NOT_NOW
            else:
                self._kept_back = message["status"] in _PROXY_ERRORS
                self.too_late = message["status"] == _TOO_LATE
            message = {**message, "headers": _once(headers, _REQUEST_ID)}
        if not self._kept_back:
            self.started = True
            await self._send(message)


def _once(headers: list[tuple[bytes, bytes]], name: bytes) -> list[tuple[bytes, bytes]]:
    """Headers without repetitions of one that proxy and replica both set."""
    kept, seen = [], False
    for key, value in headers:
        if key.lower() == name:
            if seen:
                continue
            seen = True
        kept.append((key, value))
    return kept
