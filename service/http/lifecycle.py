"""The service's life: loading, ready, draining, stopped. Routes reach everything through `Service`.

Slow work happens in the background, so that probes are answered meanwhile:

    start   the backend loads -> ready
    drain   new requests are refused -> those in flight are answered -> stopped
"""

import asyncio
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from time import monotonic

from starlette.requests import Request

from service.access.guard import Guard, current_key
from service.access.quotas import Quotas
from service.backend import Backend
from service.catalog.entry import Origin
from service.catalog.restricted import RestrictedCatalog
from service.catalog.view import CatalogView
from service.engine.interface import EngineHealth
from service.engine.observer import Observer
from service.errors import EngineUnavailable
from service.http.body_budget import BodyBudget
from service.http.step_pool import StepPool
from service.observability.logs import request_id
from service.observability.tracing import Tracing
from service.records.audit import AccessRecords, audit_file, audit_log
from service.records.decisions import decision_log
from service.settings import Settings

logger = logging.getLogger(__name__)

# Where a request's scope has its service.
SERVICE = "idspam.service"

# Loading mostly takes longer; probes are then answered while it goes on.
_SOON_SECONDS = 1.0


class Service:
    """What routes use, and whether they may use it now.

    Args:
        backend: started and stopped with the service.
        quotas: as `Guard`.

    Attributes:
        body_budget: of the bodies in flight in this process.
        drains: set once the service drains.
        busy_jobs: streams with lines that wait for their answers.
        starting: the task that loads; its exception says why the service could not start.
        guard: decides who may do what.
        audit: where it is recorded who reads kept texts, or removes them.
        decisions: where answers are recorded, if anywhere.
        drift: how texts differ from those of training, and which to label next.

    Raises:
        BadKeys: the keys cannot be used.
    """

    starting: "asyncio.Task[None]"
    _watching: "asyncio.Task[None]"

    def __init__(
        self,
        settings: Settings,
        backend: Backend,
        metrics: Observer,
        quotas: Quotas | None = None,
    ) -> None:
        self.settings = settings
        self.metrics = metrics
        self.guard = Guard(settings, metrics, quotas)
        self._access_records = AccessRecords(
            audit_file(settings), dropped=partial(metrics.records_dropped, "access")
        )
        self.guard.listen(self._access_records.listen)
        self.audit = audit_log(settings, metrics.audit_failed)
        self.decisions = decision_log(settings, partial(metrics.records_dropped, "decisions"))
        self.tracing = Tracing(settings.otlp_endpoint)
        self.engine = backend.engine
        self.drift = backend.drift
        self.body_budget = BodyBudget(settings.body_bytes_share)
        self.step_pool = StepPool()
        self._backend = backend
        self._draining = False
        self.drains = asyncio.Event()
        self.busy_jobs = 0
        self._in_flight = 0
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def catalog(self) -> CatalogView:
        """The adapters that this request's key may see; requests that are admitted may use it."""
        key = current_key.get()
        whole = self._backend.catalog
        return whole if key.sees_every_name else RestrictedCatalog(whole, key)

    async def start(self) -> None:
        """Begin to load; returns when that is done, or soon.

        No connection is accepted before this returns. A worker that replaces another is ready in
        no time: what the kernel has given to it meanwhile is answered, and not refused.
        """
        self.starting = asyncio.create_task(self._backend.start())
        self._watching = asyncio.create_task(self.guard.watch())
        await asyncio.wait({self.starting}, timeout=_SOON_SECONDS)

    @contextmanager
    def admitted(self) -> Iterator[None]:
        """The one check of readiness that a request passes; draining waits for the block to end.

        Raises:
            NotReady: loading or warming up.
            EngineUnavailable: draining, stopped or dead.
        """
        if self._draining:
            raise EngineUnavailable("the service is draining")
        self.refuse_unless_ready()
        self._in_flight += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._in_flight -= 1
            if self._in_flight == 0:
                self._idle.set()

    def refuse_unless_ready(self) -> None:
        """The check of what an admitted request does later; it may go on while the service drains.

        Raises:
            NotReady, EngineUnavailable: as `admitted`.
        """
        self._backend.refuse_unless_ready()

    def health(self) -> EngineHealth:
        """The backend's health; not ready while the service drains."""
        health = self._backend.health()
        if health.ready and self._draining:
            return EngineHealth(health.live, ready=False, reason="draining", details=health.details)
        return health

    async def drain(self) -> None:
        """Refuse new requests, wait at most `drain_seconds` for those in flight, then stop."""
        self._draining = True
        self.drains.set()
        logger.info("draining requests=%d", self._in_flight)
        until = monotonic() + self.settings.drain_seconds
        try:
            async with asyncio.timeout(self.settings.drain_seconds):
                await self._idle.wait()
                await self.engine.drain()
        except TimeoutError:
            logger.warning("not drained in time requests=%d", self._in_flight)
        await self.stop()
        logger.info("drained seconds_left=%.1f", until - monotonic())

    async def stop(self) -> None:
        """Stop the backend; requests still in flight fail."""
        self._draining = True
        self.starting.cancel()
        self._watching.cancel()
        await self._backend.stop()
        self.step_pool.close()
        await asyncio.to_thread(self.tracing.close)
        await asyncio.to_thread(self._access_records.close)
        if self.decisions is not None:
            await asyncio.to_thread(self.decisions.close)


def origin_of(request: Request) -> Origin:
    """Who sent a request, for the records of what it changes."""
    host = request.client.host if request.client else ""
    return Origin(request.scope.get("idspam.client", ""), request_id.get(), host)


def service_of(request: Request) -> Service:
    """The service that a request was sent to."""
    service: Service = request.scope[SERVICE]
    return service
