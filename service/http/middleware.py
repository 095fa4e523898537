"""What every request passes: an id, a key, readiness, and being counted.

This is also where a path decides what it needs: a key, a service that is ready, and which
protocol's shape its errors have.
"""

import logging
import re
import secrets
from collections.abc import Mapping
from random import Random
from time import perf_counter
from types import MappingProxyType

from opentelemetry.trace import Span
from starlette._utils import get_route_path
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.access.guard import Client, current_key, headers_for_guard
from service.access.scopes import match, methods_of, needs
from service.engine.observer import Outcome
from service.errors import QuotaExceeded, TooManyFailures, without_frames
from service.http.bodies import fault_of
from service.http.body_budget import SHARE
from service.http.error_shapes import shape_of
from service.http.errors import DISCONNECTED, ERRORS, INTERNAL, own_shape, refusal_of
from service.http.lifecycle import SERVICE, Service
from service.http.predict import PATH, predict
from service.http.request_log import RequestLog
from service.observability.logs import request_id
from service.observability.tracing import answered

logger = logging.getLogger(__name__)

_PROBES = frozenset(path for (_, path), need in needs().items() if need.is_probe)
# Not secret. Asking the system for random bytes would hand the interpreter to another thread.
_IDS = Random(secrets.randbits(128))
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_LIMITED = frozenset({ERRORS[QuotaExceeded].type, ERRORS[TooManyFailures].type})
_OUTCOMES: Mapping[int, Outcome] = MappingProxyType(
    {429: "overloaded", 503: "unavailable", 504: "deadline"}
)


class Gate:
    """ASGI middleware around the whole app. It answers the errors that nothing else has handled."""

    def __init__(self, app: ASGIApp, service: Service, log: RequestLog) -> None:
        self._app = app
        self._service = service
        self._guard = service.guard
        self._log = log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status, method = perf_counter(), 0, scope["method"]
        if method == "HEAD":
            # Answered as GET, everywhere; the server sends no body after the headers.
            scope = {**scope, "method": "GET"}
        scope[SERVICE] = self._service
        headers = Headers(scope=scope)
        id_ = _id_of(headers)
        token = request_id.set(id_)

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", id_.encode())]
            await send(message)

        with self._service.tracing.request(method, scope["path"], headers) as span:
            try:
                await self._answer(scope, receive, send_with_id)
            except Exception as error:
                if status:
                    raise
                response = await handle_error(Request(scope), error)
                await response(scope, receive, send_with_id)
            finally:
                if (share := scope.get(SHARE)) is not None:
                    share.release()
                if (fault := fault_of(scope)) is not None:
                    # Its frames hold the body, and the scope holds the fault.
                    without_frames(fault)
                self._count(scope, span, method, status, perf_counter() - started)
                request_id.reset(token)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        method, path = scope["method"], get_route_path(scope)
        route = scope["idspam.asked"] = match(method, path)
        if route is not None and route.adapter:
            scope["idspam.adapters"] = {route.adapter: None}
        address = (scope.get("client") or ("",))[0]
        sent = headers_for_guard(scope["headers"])
        key = self._guard.authorise(route, sent, Client(address, method, path))
        scope["idspam.client"], scope["idspam.weight"] = key.name, key.weight
        if route is None:
            # Not left to the router: only what the table of scopes has reaches a route.
            raise _no_route(path)
        token = current_key.set(key)
        try:
            await self._admit(scope, receive, send, method, path)
        finally:
            current_key.reset(token)

    async def _admit(
        self, scope: Scope, receive: Receive, send: Send, method: str, path: str
    ) -> None:
        if not _needs_service(method, path):
            await self._app(scope, receive, send)
            return
        with self._service.admitted():
            if method != "POST" or path != PATH:
                await self._app(scope, receive, send)
                return
            # Called from here: routing, dependencies and exit stacks of the framework take as long
            # as everything else in a one-text request except its tokens, and `predict` uses none of
            # it. It is a route too, for the documentation and for other methods.
            scope["idspam.route"] = PATH
            response = await predict(Request(scope, receive))
            await response(scope, receive, send)

    def _count(self, scope: Scope, span: Span, method: str, status: int, seconds: float) -> None:
        route: str = scope.get("idspam.route", getattr(scope.get("route"), "path", "other"))
        error = scope.get("idspam.error")
        outcome = _outcome(status, error)
        self._service.metrics.request_done(route, outcome, seconds=seconds, error=error)
        answered(span, method=method, route=route, status=status, error=error)
        self._log.done(
            scope,
            scope.get("idspam.asked"),
            method=method,
            route=route,
            status=status,
            outcome=outcome,
            seconds=seconds,
        )


async def handle_error(request: Request, error: Exception) -> Response:
    """The app's one exception handler: any error, in the shape of the path's protocol."""
    refusal = refusal_of(error)
    request.scope["idspam.error"] = refusal.kind.type
    if refusal.kind is INTERNAL:
        logger.error("request failed with an unexpected error", exc_info=error)
    elif refusal.kind.status == 500:
        logger.error("request failed: %s: %s", refusal.kind.type, error)
    return shape_of(request.scope["path"])(refusal)


def _no_route(path: str) -> HTTPException:
    """As the router would answer."""
    if methods := methods_of(path):
        return HTTPException(405, headers={"Allow": ", ".join(methods)})
    return HTTPException(404)


def _needs_service(method: str, path: str) -> bool:
    """Whether a route needs a service that is ready; a drain then waits for its answer."""
    if path.startswith("/v1/"):
        return True
    if path == "/" and method == "GET":
        # The console, which says itself that the service is not ready.
        return False
    return path != "/v2" and path not in _PROBES and shape_of(path) is not own_shape


def _id_of(headers: Headers) -> str:
    """The client's own id if it is a plain one, so that both logs have it; else a new one."""
    id_ = headers.get("x-request-id", "")
    return id_ if id_ and _REQUEST_ID.fullmatch(id_) else f"{_IDS.getrandbits(64):016x}"


def _outcome(status: int, error: str | None) -> Outcome:
    if error == DISCONNECTED:
        return "disconnected"
    if error in _LIMITED:
        # Of this client alone: the service itself has room.
        return "client_error"
    if status in _OUTCOMES:
        return _OUTCOMES[status]
    if 200 <= status < 400:
        return "success"
    return "client_error" if 400 <= status < 500 else "server_error"
