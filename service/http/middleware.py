"""What every request passes: an id, a key, readiness, and being counted.

This is also where a path decides what it needs: a key, a service that is ready, and which
protocol's shape its errors have.
"""

import hashlib
import hmac
import logging
import re
import secrets
from collections.abc import Iterable, Mapping
from time import perf_counter
from types import MappingProxyType
from typing import NamedTuple

from opentelemetry.trace import Span
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.engine.observer import Outcome
from service.errors import Forbidden, Unauthorized
from service.http.error_shapes import shape_of
from service.http.errors import DISCONNECTED, INTERNAL, own_shape, refusal_of
from service.http.lifecycle import Service
from service.http.open_paths import OPEN_PATHS, PROBES
from service.http.predict import PATH, predict
from service.observability.logs import request_id
from service.observability.tracing import answered
from service.settings import Settings

logger = logging.getLogger(__name__)

_ADMIN_PATHS = ("/v1/adapters", "/v2/repository/models/")
_READING_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_OUTCOMES: Mapping[int, Outcome] = MappingProxyType(
    {429: "overloaded", 503: "unavailable", 504: "deadline"}
)


class Gate:
    """ASGI middleware around the whole app. It answers the errors that nothing else has handled."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._service = service
        self._keyring = Keyring(service.settings)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status, method = perf_counter(), 0, scope["method"]
        if method == "HEAD":
            # Answered as GET, everywhere; the server sends no body after the headers.
            scope = {**scope, "method": "GET"}
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
                await self._answer(scope, headers, receive, send_with_id)
            except Exception as error:
                if status:
                    raise
                response = await handle_error(Request(scope), error)
                await response(scope, receive, send_with_id)
            finally:
                self._count(scope, span, method, status, perf_counter() - started)
                request_id.reset(token)

    async def _answer(self, scope: Scope, headers: Headers, receive: Receive, send: Send) -> None:
        method, path = scope["method"], scope["path"]
        client = self._keyring.check(method=method, path=path, headers=headers)
        scope["idspam.client"], scope["idspam.weight"] = client.name, client.weight
        if not _needs_service(path):
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
        logger.debug(
            "request method=%s path=%r status=%d outcome=%s ms=%.2f",
            method,
            scope["path"],
            status,
            outcome,
            seconds * 1000,
        )


class KeyHolder(NamedTuple):
    """Who sent a request.

    name: of the key; empty without one. weight: its share when several compete, relative to others.
    """

    name: str = ""
    weight: float = 1.0


NOBODY = KeyHolder()


class Keyring:
    """The accepted keys, as hashes: a comparison takes equally long whatever key was sent."""

    def __init__(self, settings: Settings) -> None:
        self._admin_keys = _hashed("admin", settings.admin_keys)
        self._api_keys = _hashed("api", settings.api_keys)

    def check(self, *, method: str, path: str, headers: Mapping[str, str]) -> KeyHolder:
        """Who sent this request, if it may be sent.

        Raises:
            Unauthorized: no key, or an unknown one.
            Forbidden: an API key where an admin key is needed.
        """
        if path in OPEN_PATHS:
            return NOBODY
        changes_adapters = method not in _READING_METHODS and path.startswith(_ADMIN_PATHS)
        needs_admin = bool(self._admin_keys) and changes_adapters
        if not (self._api_keys or needs_admin):
            return NOBODY
        key = _key_of(headers)
        digest = _hash(key or "")
        admin = _found(digest, self._admin_keys)
        holder = _found(digest, self._api_keys) or admin
        if key is None or holder is None:
            raise Unauthorized("send a key as `Authorization: Bearer KEY` or `X-API-Key: KEY`")
        if needs_admin and admin is None:
            raise Forbidden("changing adapters asks for an admin key")
        return admin or holder


async def handle_error(request: Request, error: Exception) -> Response:
    """The app's one exception handler: any error, in the shape of the path's protocol."""
    refusal = refusal_of(error)
    request.scope["idspam.error"] = refusal.kind.type
    if refusal.kind is INTERNAL:
        logger.error("request failed with an unexpected error", exc_info=error)
    elif refusal.kind.status == 500:
        logger.error("request failed: %s: %s", refusal.kind.type, error)
    return shape_of(request.scope["path"])(refusal)


def _needs_service(path: str) -> bool:
    """Whether a path needs a service that is ready; a drain then waits for its answer."""
    if path.startswith("/v1/"):
        return True
    return path != "/v2" and path not in PROBES and shape_of(path) is not own_shape


def _id_of(headers: Headers) -> str:
    """The client's own id if it is a plain one, so that both logs have it; else a new one."""
    id_ = headers.get("x-request-id", "")
    return id_ if _REQUEST_ID.fullmatch(id_) else secrets.token_hex(8)


def _outcome(status: int, error: str | None) -> Outcome:
    if error == DISCONNECTED:
        return "disconnected"
    if status in _OUTCOMES:
        return _OUTCOMES[status]
    if 200 <= status < 400:
        return "success"
    return "client_error" if 400 <= status < 500 else "server_error"


def _key_of(headers: Mapping[str, str]) -> str | None:
    scheme, _, credentials = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and credentials.strip():
        return credentials.strip()
    return headers.get("x-api-key") or None


def _found(digest: bytes, known: Mapping[bytes, KeyHolder]) -> KeyHolder | None:
    # Compares with every hash: stopping at the first match would tell how far the search went.
    matches = [holder for key, holder in known.items() if hmac.compare_digest(digest, key)]
    return matches[0] if matches else None


def _hashed(kind: str, keys: Iterable[str]) -> dict[bytes, KeyHolder]:
    """Keys of the environment have no names of their own, only a position."""
    return {_hash(key): KeyHolder(f"{kind}-{number}") for number, key in enumerate(keys, start=1)}


def _hash(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
