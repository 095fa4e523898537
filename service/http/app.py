"""The application: routes, gate and service put together. Knows no socket and no process."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.routing import iter_route_contexts
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from adapters import __version__
from adapters.errors import AdapterError
from service.backend import Backend
from service.engine.observer import Observer
from service.errors import ServiceError
from service.http.lifecycle import Service
from service.http.middleware import Gate, handle_error
from service.http.openapi.documentation import describe
from service.http.surfaces import SURFACES
from service.settings import Settings

DESCRIPTION = "Text classification by many small adapters on one frozen encoder, in mixed batches."


def create_app(settings: Settings, backend: Backend, metrics: Observer) -> FastAPI:
    """The app; its service, `app.state.service`, starts and stops with its lifespan."""
    service = Service(settings, backend, metrics)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        await service.stop()

    app = FastAPI(
        title="ID-SPAM service",
        version=__version__,
        description=DESCRIPTION,
        lifespan=lifespan,
        redoc_url=None,
        # A redirected upload would be sent twice; a wrong path is simply not found.
        redirect_slashes=False,
    )
    for surface in SURFACES:
        app.include_router(surface.router)
    app.state.service = service
    handled = (
        HTTPException,
        RequestValidationError,
        ClientDisconnect,
        AdapterError,
        ServiceError,
    )
    for error in handled:
        app.add_exception_handler(error, handle_error)
    app.add_middleware(Gate, service=service)
    describe(app)
    return app


def route_paths() -> list[str]:
    """The path of every route, as a template: what requests are counted by."""
    app = FastAPI(redoc_url=None)
    for surface in SURFACES:
        app.include_router(surface.router)
    found = (context.path for context in iter_route_contexts(app.routes))
    return sorted({path for path in found if path is not None})
