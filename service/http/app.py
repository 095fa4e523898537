"""The application: every route, the gate around them, and the service that they use."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.routing import iter_route_contexts
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Receive, Scope, Send

from adapters import __version__
from adapters.errors import AdapterError
from service.access.quotas import Quotas
from service.access.scopes import needs
from service.backend import Backend
from service.engine.observer import Observer
from service.errors import ServiceError
from service.http import adapters, cards, docs_page, drift, operations, predict, traffic
from service.http.console import routes as console
from service.http.lifecycle import Service
from service.http.middleware import Gate, handle_error
from service.http.openapi.documentation import describe
from service.http.predict import PATH
from service.http.protocols import openai, tei, vllm
from service.http.protocols.oip import repository as oip_repository
from service.http.protocols.oip import routes as oip
from service.http.proxies import BehindProxy
from service.http.request_log import RequestLog
from service.http.stream import route as stream
from service.settings import Settings

DESCRIPTION = "Text classification by many small adapters on one frozen encoder, in mixed batches."
_ROUTERS = tuple(
    module.router
    for module in (
        predict,
        stream,
        adapters,
        cards,
        traffic,
        drift,
        operations,
        docs_page,
        console,
        tei,
        oip,
        oip_repository,
        vllm,
        openai,
    )
)
_ERRORS = (HTTPException, RequestValidationError, ClientDisconnect, AdapterError, ServiceError)


class App(FastAPI):
    """Requests that classify go to the gate at once, without what the framework puts around it:
    a few per cent of what a request of one text takes.

    Attributes:
        shortcut: the gate, if nothing of ours is around it.
    """

    shortcut: ASGIApp | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_short = scope["type"] == "http" and scope["path"] == PATH and scope["method"] == "POST"
        if is_short and self.shortcut is not None:
            await self.shortcut(scope, receive, send)
        else:
            await super().__call__(scope, receive, send)


def create_app(
    settings: Settings, backend: Backend, metrics: Observer, quotas: Quotas | None = None
) -> App:
    """The app; its service, `app.state.service`, starts and stops with its lifespan.

    Args:
        quotas: shared by the processes of the service; by default this process's own.

    Raises:
        BadKeys: the keys cannot be used.
    """
    service = Service(settings, backend, metrics, quotas)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await service.start()
        yield
        await service.stop()

    app = App(
        title="ID-SPAM service",
        version=__version__,
        description=DESCRIPTION,
        lifespan=lifespan,
        # The documentation's routes are in `docs_page`.
        openapi_url=None,
        # A redirect would make clients send an upload twice; a wrong path is simply not found.
        redirect_slashes=False,
    )
    for router in _ROUTERS:
        app.include_router(router)
    app.state.service = service
    for error in _ERRORS:
        app.add_exception_handler(error, handle_error)
    require_scopes(app)
    log = RequestLog()
    app.add_middleware(Gate, service=service, log=log)
    if settings.allowed_origins:
        # Around the gate: it answers preflights, which carry no key.
        app.add_middleware(CORSMiddleware, **_cross_origin(settings))
    if settings.root_path or settings.trusted_proxies:
        # Outside of the gate, which goes by paths and clients.
        app.add_middleware(
            BehindProxy, root_path=settings.root_path, trusted=settings.trusted_proxies
        )
    if len(app.user_middleware) == 1:
        app.shortcut = Gate(app, service, log)
    describe(app, has_keys=service.guard.has_keys)
    return app


def _cross_origin(settings: Settings) -> dict[str, Any]:
    return {
        "allow_origins": settings.allowed_origins,
        "allow_methods": ["GET", "HEAD", "POST", "PUT", "DELETE"],
        "allow_headers": [
            "Authorization",
            "Content-Type",
            "If-Match",
            "If-None-Match",
            "X-API-Key",
            "X-Request-ID",
            "X-Request-Key",
        ],
        "expose_headers": ["ETag", "Retry-After", "X-Adapter-Revision", "X-Request-ID"],
    }


def require_scopes(app: FastAPI) -> None:
    """Every route has its row in the table of scopes, without which no request reaches it.

    Raises:
        RuntimeError: naming the routes that have none.
    """
    routes = {
        (method, str(context.path))
        for context in iter_route_contexts(app.routes)
        for method in context.methods or ()
    }
    # The gate answers HEAD as GET.
    missing = sorted(route for route in routes - needs().keys() if route[0] != "HEAD")
    if missing:
        raise RuntimeError(f"no scope in service/access/scopes.py for {missing}")


def route_paths() -> list[str]:
    """The path template of every route; metrics count requests by it."""
    app = FastAPI(openapi_url=None)
    for router in _ROUTERS:
        app.include_router(router)
    paths = (context.path for context in iter_route_contexts(app.routes))
    return sorted({path for path in paths if path is not None})
