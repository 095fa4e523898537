"""The service's life: loading, ready, draining, stopped. Knows no route; routes hold a `Service`.

Everything slow happens in the background, so that probes are answered meanwhile:

    start   the backend starts -> ready
    drain   not ready -> what is in flight is answered -> stopped
"""

import asyncio
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic

from starlette.requests import Request

from adapters.backbone.tokenizer import TextEncoder
from service.backend import Backend
from service.catalog.view import CatalogView
from service.engine.interface import EngineHealth, Predictor
from service.engine.observer import Observer
from service.errors import EngineUnavailable
from service.observability.tracing import Tracing
from service.settings import Settings

logger = logging.getLogger(__name__)


class Service:
    """Everything that routes need, and when it may be used.

    Args:
        backend: started and stopped with the service.
    """

    def __init__(self, settings: Settings, backend: Backend, metrics: Observer) -> None:
        self.settings = settings
        self.metrics = metrics
        self.starting: asyncio.Task[None] | None = None
        self.tracing = Tracing(settings.otlp_endpoint)
        self._backend = backend
        self._draining = False
        self._in_flight = 0
        self._quiet = asyncio.Event()
        self._quiet.set()

    @property
    def engine(self) -> Predictor:
        return self._backend.engine

    @property
    def catalog(self) -> CatalogView:
        return self._backend.catalog

    @property
    def encoder(self) -> TextEncoder:
        return self.engine.info.encoder

    def start(self) -> None:
        """Begin to load; `starting` is the task that does, and it holds what went wrong."""
        self.starting = asyncio.create_task(self._backend.start())

    def refuse_unless_ready(self) -> None:
        """
        Raises:
            NotReady: loading or warming up.
            EngineUnavailable: draining, stopped or dead.
        """
        if self._draining:
            raise EngineUnavailable("the service is draining")
        self._backend.refuse_unless_ready()

    def health(self) -> EngineHealth:
        """The backend's health, and whether the service drains."""
        health = self._backend.health()
        if health.ready and self._draining:
            return EngineHealth(health.live, ready=False, reason="draining", details=health.details)
        return health

    @contextmanager
    def in_flight(self) -> Iterator[None]:
        """A request that draining waits for."""
        self._in_flight += 1
        self._quiet.clear()
        try:
            yield
        finally:
            self._in_flight -= 1
            if self._in_flight == 0:
                self._quiet.set()

    async def drain(self) -> None:
        """Refuse new requests and wait for those in flight, at most `drain_seconds`; then stop."""
        self._draining = True
        logger.info("draining requests=%d", self._in_flight)
        until = monotonic() + self.settings.drain_seconds
        try:
            async with asyncio.timeout(self.settings.drain_seconds):
                await self._quiet.wait()
                await self.engine.drain()
        except TimeoutError:
            logger.warning("not drained in time requests=%d", self._in_flight)
        await self.stop()
        logger.info("drained seconds_left=%.1f", until - monotonic())

    async def stop(self) -> None:
        """End the backend; requests still in flight fail."""
        self._draining = True
        if self.starting is not None:
            self.starting.cancel()
        await self._backend.stop()
        await asyncio.to_thread(self.tracing.close)


def service_of(request: Request) -> Service:
    """The service that a request was sent to."""
    service = request.app.state.service
    assert isinstance(service, Service)
    return service
