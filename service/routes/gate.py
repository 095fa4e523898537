"""What every request passes: an id, a key, readiness, and being counted. Knows no route's work."""

import logging
import re
import secrets
from collections.abc import Awaitable, Callable, Mapping
from time import perf_counter
from types import MappingProxyType

from opentelemetry.trace import Span
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.lifecycle import Service
from service.logs import request_id
from service.reporting import Outcome
from service.routes.auth import Keyring
from service.routes.errors import DISCONNECTED, INTERNAL, refusal_of
from service.routes.predict import PATH, predict
from service.routes.surfaces import needs_service, shape_of
from service.tracing import answered

logger = logging.getLogger(__name__)

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
# Called from here. The framework's way to an endpoint (routing, dependencies, exit stacks) takes as
# long as all the rest of a one-text request but its tokens; these endpoints use nothing of it. They
# are routes as well, for the documentation and for other methods.
_DIRECT: Mapping[tuple[str, str], Callable[[Request], Awaitable[Response]]] = MappingProxyType(
    {("POST", PATH): predict}
)


async def handle_error(request: Request, error: Exception) -> Response:
    """The one exception handler of the app: any error, in the shape of the path's protocol."""
    refusal = refusal_of(error)
    request.scope["idspam.error"] = refusal.kind.type
    if refusal.kind is INTERNAL:
        logger.error("request failed with an unexpected error", exc_info=error)
    elif refusal.kind.status == 500:
        logger.error("request failed: %s: %s", refusal.kind.type, error)
    return shape_of(request.scope["path"])(refusal)


class Gate:
    """ASGI middleware around the whole app; it answers every error that nobody else has."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._service = service
        self._keyring = Keyring(service.settings)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = perf_counter(), 0
        headers = Headers(scope=scope)
        mark = _id_of(headers)
        token = request_id.set(mark)

        async def send_marked(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", mark.encode())]
            await send(message)

        with self._service.tracing.request(scope["method"], scope["path"], headers) as span:
            try:
                await self._pass(scope, headers, receive, send_marked)
            except Exception as error:
                if status:
                    raise
                response = await handle_error(Request(scope), error)
                await response(scope, receive, send_marked)
            finally:
                self._count(scope, span, status, perf_counter() - started)
                request_id.reset(token)

    async def _pass(self, scope: Scope, headers: Headers, receive: Receive, send: Send) -> None:
        method, path = scope["method"], scope["path"]
        self._keyring.admit(method=method, path=path, headers=headers)
        if not needs_service(path):
            await self._app(scope, receive, send)
            return
        self._service.refuse_unless_ready()
        with self._service.in_flight():
            if (endpoint := _DIRECT.get((method, path))) is None:
                await self._app(scope, receive, send)
                return
            scope["idspam.route"] = path
            response = await endpoint(Request(scope, receive))
            await response(scope, receive, send)

    def _count(self, scope: Scope, span: Span, status: int, seconds: float) -> None:
        route: str = scope.get("idspam.route", getattr(scope.get("route"), "path", "other"))
        error = scope.get("idspam.error")
        outcome = _outcome(status, error)
        self._service.metrics.request_done(route, outcome, seconds=seconds, error=error)
        answered(span, method=scope["method"], route=route, status=status, error=error)
        logger.debug(
            "request method=%s path=%r status=%d outcome=%s ms=%.2f",
            scope["method"],
            scope["path"],
            status,
            outcome,
            seconds * 1000,
        )


def _id_of(headers: Headers) -> str:
    """The caller's own id if it is a plain one, so that it can be found in both logs."""
    given = headers.get("x-request-id", "")
    return given if _REQUEST_ID.fullmatch(given) else secrets.token_hex(8)


def _outcome(status: int, error: str | None) -> Outcome:
    if error == DISCONNECTED:
        return "disconnected"
    match status:
        case 429:
            return "overloaded"
        case 503:
            return "unavailable"
        case 504:
            return "deadline"
        case _ if 200 <= status < 400:
            return "success"
        case _ if 400 <= status < 500:
            return "client_error"
        case _:
            return "server_error"
