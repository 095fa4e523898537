"""The service's life: loading, ready, draining, stopped. Knows no route; routes hold a `Service`.

Everything slow happens in the background, so that probes are answered meanwhile:

    start   backbone -> warm-up -> store and zoo -> ready
    drain   not ready -> what is in flight is answered -> stopped
"""

import asyncio
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic

from starlette.requests import Request

from adapters import __version__
from adapters.backbone import Backbone
from adapters.loading import resolve_device
from adapters.store import AdapterStore
from adapters.tokenizer import TextEncoder
from service.catalog import Catalog
from service.engine.engine import LocalEngine
from service.engine.interface import Engine, EngineHealth
from service.engine.settings import EngineSettings
from service.errors import EngineUnavailable, NotReady
from service.metrics import Metrics
from service.settings import Settings

logger = logging.getLogger(__name__)

CPU_BATCH_TOKENS = 2048
GPU_BATCH_TOKENS = 16384


class Service:
    """Everything that routes need, and when it may be used.

    Args:
        load: makes the backbone; called once, in a thread.

    Raises:
        UnusableBackbone: there is no such device.
    """

    def __init__(
        self,
        settings: Settings,
        store: AdapterStore,
        *,
        load: Callable[[], Backbone],
        metrics: Metrics,
    ) -> None:
        self.settings = settings
        self.metrics = metrics
        self.engine: Engine = LocalEngine(load, store, engine_settings(settings), metrics)
        self.starting: asyncio.Task[None] | None = None
        self._store = store
        self._catalog: Catalog | None = None
        self._draining = False
        self._in_flight = 0
        self._quiet = asyncio.Event()
        self._quiet.set()

    @property
    def catalog(self) -> Catalog:
        assert self._catalog is not None, "requests are refused until the service is ready"
        return self._catalog

    @property
    def encoder(self) -> TextEncoder:
        return self.engine.info.encoder

    def start(self) -> None:
        """Begin to load; `starting` is the task that does, and it holds what went wrong."""
        self.starting = asyncio.create_task(self._start())

    def refuse_unless_ready(self) -> None:
        """
        Raises:
            NotReady: loading or warming up.
            EngineUnavailable: draining, stopped or dead.
        """
        if self._draining:
            raise EngineUnavailable("the service is draining")
        if self._catalog is None:
            health = self.health()
            raise (NotReady if health.live else EngineUnavailable)(health.reason or "starting")

    def health(self) -> EngineHealth:
        """The engine's health, seen together with the rest of the service."""
        health = self.engine.health()
        if health.ready and self._draining:
            return EngineHealth(health.live, ready=False, reason="draining", details=health.details)
        if health.ready and self._catalog is None:
            reason = "reading the adapters"
            return EngineHealth(health.live, ready=False, reason=reason, details=health.details)
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
        """End the engine; requests still in flight fail."""
        self._draining = True
        if self.starting is not None:
            self.starting.cancel()
        await self.engine.stop()

    async def _start(self) -> None:
        started = monotonic()
        info = await self.engine.start()
        catalog = Catalog(self._store, self.engine, observer=self.metrics)
        await catalog.load(self.settings.zoo_dir)
        self.metrics.started(
            version=__version__, backbone=info.identity.name, device=info.device, dtype=info.dtype
        )
        self._catalog = catalog
        logger.info(
            "ready backbone=%s device=%s dtype=%s adapters=%d seconds=%.1f",
            info.identity.name,
            info.device,
            info.dtype,
            len(catalog),
            monotonic() - started,
        )


def service_of(request: Request) -> Service:
    """The service that a request was sent to."""
    service = request.app.state.service
    assert isinstance(service, Service)
    return service


def engine_settings(settings: Settings) -> EngineSettings:
    """
    Raises:
        UnusableBackbone: there is no such device.
    """
    on_gpu = resolve_device(settings.device).type == "cuda"
    default = GPU_BATCH_TOKENS if on_gpu else CPU_BATCH_TOKENS
    return EngineSettings(
        max_batch_tokens=settings.max_batch_tokens or default,
        max_waiting_tokens=settings.max_waiting_tokens,
        max_active_adapters=settings.max_active_adapters,
        # Host memory is cheaper than the device's, and whatever is active is registered too.
        max_registered_adapters=4 * settings.max_active_adapters,
    )
