"""The application: routes, gate and service put together. Knows no socket and no process."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.routing import iter_route_contexts
from prometheus_client import CollectorRegistry, ProcessCollector
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from adapters import __version__
from adapters.backbone import Backbone
from adapters.errors import AdapterError
from adapters.store import AdapterStore
from service.errors import ServiceError
from service.lifecycle import Service
from service.metrics import Metrics
from service.routes import adapters, operations, predict
from service.routes.documentation import describe
from service.routes.errors import error_types, handle_error
from service.routes.gate import Gate
from service.settings import Settings

DESCRIPTION = "Text classification by many small adapters on one frozen encoder, in mixed batches."


def create_app(settings: Settings, store: AdapterStore, *, load: Callable[[], Backbone]) -> FastAPI:
    """The app; its service, `app.state.service`, starts and stops with its lifespan.

    Args:
        load: makes the backbone; called once, in a thread.

    Raises:
        UnusableBackbone: there is no such device.
    """

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
    for surface in (predict, adapters, operations):
        app.include_router(surface.router)
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    metrics = Metrics(registry, routes=paths(app), error_types=error_types())
    service = Service(settings, store, load=load, metrics=metrics)
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


def paths(app: FastAPI) -> list[str]:
    """The path of every route, as a template."""
    found = (context.path for context in iter_route_contexts(app.routes))
    return sorted({path for path in found if path is not None})
