"""What every request passes: an id, a key, readiness, and being counted. Knows no route's work."""

import hashlib
import hmac
import logging
import re
import secrets
from collections.abc import Awaitable, Callable, Iterable, Mapping
from enum import Enum, auto
from time import perf_counter
from types import MappingProxyType

from opentelemetry.trace import Span
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.engine.observer import Outcome
from service.errors import Forbidden, Unauthorized
from service.http.errors import DISCONNECTED, INTERNAL, refusal_of
from service.http.lifecycle import Service
from service.http.predict import PATH, predict
from service.http.surfaces import needs_service, shape_of
from service.observability.logs import request_id
from service.observability.tracing import answered
from service.settings import Settings

# --- merged from service.routes.auth

OPEN_PATHS = frozenset(
    {
        "/healthz",
        "/readyz",
        "/metrics",
        "/docs",
        "/docs/oauth2-redirect",
        "/openapi.json",
        # The probes of other protocols.
        "/health",
        "/ping",
        "/v2/health/live",
        "/v2/health/ready",
    }
)
READING_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
CHANGING_PATHS = ("/v1/adapters", "/v2/repository/models/")


class _Role(Enum):
    ADMIN = auto()
    USER = auto()


class Keyring:
    """The keys, as hashes: comparison takes the same time whatever was sent, of whatever length."""

    def __init__(self, settings: Settings) -> None:
        self._admin = _hashes(settings.admin_keys)
        self._user = _hashes(settings.api_keys)

    def admit(self, *, method: str, path: str, headers: Mapping[str, str]) -> None:
        """Let a request pass or refuse it; a path that is not named open is closed.

        Raises:
            Unauthorized: no key, or an unknown one.
            Forbidden: an API key where an admin key is asked for.
        """
        if path in OPEN_PATHS:
            return
        changes_adapters = method not in READING_METHODS and path.startswith(CHANGING_PATHS)
        needs_admin = bool(self._admin) and changes_adapters
        if not (self._user or needs_admin):
            return
        role = self._role(_presented(headers))
        if role is None:
            raise Unauthorized("send a key as `Authorization: Bearer KEY` or `X-API-Key: KEY`")
        if needs_admin and role is not _Role.ADMIN:
            raise Forbidden("changing adapters asks for an admin key")

    def _role(self, key: str | None) -> _Role | None:
        digest = _hash(key or "")
        # Every hash is compared, without stopping at the first that matches.
        admin = sum(hmac.compare_digest(digest, known) for known in self._admin)
        user = sum(hmac.compare_digest(digest, known) for known in self._user)
        if key is None or not (admin or user):
            return None
        return _Role.ADMIN if admin else _Role.USER


def _presented(headers: Mapping[str, str]) -> str | None:
    scheme, _, credentials = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and credentials.strip():
        return credentials.strip()
    return headers.get("x-api-key") or None


def _hashes(keys: Iterable[str]) -> tuple[bytes, ...]:
    return tuple(_hash(key) for key in keys)


def _hash(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


# --- merged from service.routes.gate

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
