"""The engine in this process: one thread owns the device, the event loop everything else.

A request's way: admitted in tokens -> its adapters leased -> its entries queued -> taken into
batches with whoever else waits -> answered when its last entry is. Knows no HTTP and no texts.
"""

import asyncio
import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import StrEnum
from uuid import uuid4

from adapters.backbone.model import Backbone
from adapters.errors import InvalidAdapter
from adapters.format.files import validate
from adapters.format.spec import AdapterSpec
from adapters.format.store import AdapterStore
from service.engine.device import Device
from service.engine.device_loader import Placing
from service.engine.host_cache import HostTier
from service.engine.inflight import InFlight
from service.engine.interface import (
    AdapterKey,
    Completion,
    EngineHealth,
    EngineInfo,
    Entry,
    cost_of,
)
from service.engine.observer import EngineObserver, SilentObserver
from service.engine.queue import EntryQueue
from service.engine.residency import Residency
from service.engine.runners.base import Runner
from service.engine.runners.packed import PackedRunner
from service.engine.settings import EngineSettings
from service.errors import EngineUnavailable, InferenceFailed, NotReady

logger = logging.getLogger(__name__)

# Threads that read, check and fold adapters: half the cores, within these bounds; the others have
# requests to answer. One more thread copies them onto the device.
_READING_THREADS = (2, 8)
# Places beside the settings', for adapters that are tried out before they are published.
_SPARE_PLACES = 4
_TRIAL_TEXT = "A first text, to see that the scores are numbers."


class Phase(StrEnum):
    """Where in its life an engine is."""

    CREATED = "not started yet"
    LOADING = "loading the backbone"
    WARMING = "warming up"
    READY = "ready"
    DRAINING = "draining"
    STOPPED = "stopped"
    DEAD = "dead"


_STARTING = (Phase.CREATED, Phase.LOADING, Phase.WARMING)
_OVER = (Phase.STOPPED, Phase.DEAD)


@dataclass(frozen=True, slots=True)
class _Parts:
    """What there is once the backbone is loaded."""

    info: EngineInfo
    runner: Runner
    residency: Residency
    in_flight: InFlight
    device: Device


class LocalEngine:
    """`service.engine.interface.Engine` with the device in this process.

    Args:
        load: makes the backbone; called once, in a thread.
        store: where the adapters' files are.
        settings: limits.
        observer: told of everything worth counting, from the event loop.
    """

    def __init__(
        self,
        load: Callable[[], Backbone],
        store: AdapterStore,
        settings: EngineSettings,
        observer: EngineObserver | None = None,
    ) -> None:
        self._load = load
        self._store = store
        self._settings = settings
        self._observer = observer or SilentObserver()
        self._phase = Phase.CREATED
        self._reason: str | None = None
        self._parts: _Parts | None = None
        self._reading = ThreadPoolExecutor(_reading_threads(), thread_name_prefix="reading")
        self._placing = ThreadPoolExecutor(1, thread_name_prefix="placing")
        self._queue = EntryQueue(settings)

    @property
    def info(self) -> EngineInfo:
        return self._loaded.info

    async def start(self) -> EngineInfo:
        assert self._phase is Phase.CREATED, "an engine is started once"
        try:
            self._phase = Phase.LOADING
            loop = asyncio.get_running_loop()
            runner = await loop.run_in_executor(self._reading, self._load_runner)
            self._proceed(Phase.LOADING, Phase.WARMING)
            self._parts = parts = self._assemble(runner)
            parts.device.start()
            await parts.device.warm
            self._proceed(Phase.WARMING, Phase.READY)
        except BaseException as error:
            self._die(error)
            raise
        return parts.info

    async def predict(
        self, entries: Sequence[Entry], *, deadline: float | None = None
    ) -> Completion:
        parts = self._ready()
        if not entries:
            return Completion((), 0.0, 0.0)
        adapters = tuple({entry.adapter: None for entry in entries})
        async with parts.in_flight.admitted(entries, deadline) as request:
            lease = await parts.residency.acquire(adapters)
            return await parts.in_flight.answer(request, lease)

    async def check(self, data: bytes) -> AdapterSpec:
        key = AdapterKey("(unpublished)", uuid4().hex)
        parts = self._ready()
        hosted = await asyncio.get_running_loop().run_in_executor(
            self._reading, lambda: parts.runner.adopt(validate(data))
        )
        lease = await parts.residency.try_out(key, hosted)
        prepared = lease[key].prepared
        assert prepared is not None
        spec = prepared.spec
        encoding = self.info.encoder.encode(_TRIAL_TEXT, max_length=spec.max_length)
        trial = [Entry(key, encoding, cost_of(encoding, spec))]
        in_flight = self._ready().in_flight
        try:
            async with in_flight.admitted(trial, deadline=None) as request:
                await in_flight.answer(request, lease)
        except InferenceFailed as error:
            if error.reason == "not_finite":
                raise InvalidAdapter(["scores: not finite for a plain text"]) from None
            raise
        return spec

    async def preload(self, key: AdapterKey) -> None:
        residency = self._ready().residency
        if residency.has_room(key):
            residency.release(await residency.acquire((key,)))

    async def drain(self) -> None:
        if self._phase is Phase.READY:
            self._phase, self._reason = Phase.DRAINING, "the engine is draining"
        if self._phase is Phase.DRAINING:
            await self._loaded.in_flight.idle()

    async def stop(self) -> None:
        self._end(Phase.STOPPED, "the engine is stopped")
        for executor in (self._reading, self._placing):
            executor.shutdown(wait=False, cancel_futures=True)
        if self._parts is not None:
            await asyncio.to_thread(self._parts.device.join, self._settings.stall_seconds)

    def health(self) -> EngineHealth:
        live = self._phase not in _OVER
        reason = None if self._phase is Phase.READY else self._reason or f"it is {self._phase}"
        stalled = 0.0 if self._parts is None else self._parts.device.batch_seconds
        if live and stalled > self._settings.stall_seconds:
            live, reason = False, f"a batch has been running for {stalled:.0f} seconds"
        return EngineHealth(
            live=live,
            ready=live and self._phase is Phase.READY,
            reason=reason,
            details={
                "phase": str(self._phase),
                "waiting_entries": len(self._queue),
                "waiting_tokens": self._queue.tokens,
                "batch_seconds": stalled,
            },
        )

    def _die(self, error: BaseException) -> None:
        self._end(Phase.DEAD, f"the engine died: {type(error).__name__}: {error}")

    def _end(self, phase: Phase, reason: str) -> None:
        self._queue.close()
        if self._phase not in _OVER:
            self._phase, self._reason = phase, reason
            if self._parts is not None:
                self._parts.in_flight.fail_all(reason)

    @property
    def _loaded(self) -> _Parts:
        if self._parts is None:
            raise NotReady(f"the engine is not ready: {self._phase}")
        return self._parts

    def _assemble(self, runner: Runner) -> _Parts:
        settings = self._settings
        places = settings.max_active_adapters
        host = HostTier(
            self._store,
            runner,
            reading=self._reading,
            observer=self._observer,
            capacity=settings.max_registered_adapters,
        )
        residency = Residency(
            host,
            Placing(runner, self._placing),
            observer=self._observer,
            places=places,
            spare=_SPARE_PLACES,
        )
        in_flight = InFlight(self._queue, residency, self._observer)
        device = Device(
            runner,
            self._queue,
            deliver=in_flight.deliver,
            die=self._die,
            max_batch_tokens=settings.max_batch_tokens,
        )
        return _Parts(_info(runner.backbone), runner, residency, in_flight, device)

    def _load_runner(self) -> Runner:
        """In a thread: seconds, and where kernels are compiled more of them."""
        return _runner(self._load(), self._settings)

    def _proceed(self, before: Phase, after: Phase) -> None:
        if self._phase is not before:
            raise EngineUnavailable(self._reason or "the engine was stopped while it started")
        self._phase = after

    def _ready(self) -> _Parts:
        if self._phase in _STARTING:
            raise NotReady(f"the engine is not ready: {self._phase}")
        if self._phase is not Phase.READY:
            raise EngineUnavailable(self._reason or "the engine is not available")
        return self._loaded


def _reading_threads() -> int:
    least, most = _READING_THREADS
    return min(most, max(least, (os.cpu_count() or 1) // 2))


def _runner(backbone: Backbone, settings: EngineSettings) -> Runner:
    if backbone.device.type != "cuda":
        return PackedRunner(backbone, lanes=settings.lanes)
    try:
        # Imported here: its kernels need a compiler that comes with PyTorch for CUDA alone.
        from service.engine.runners.slotted import SlottedRunner

        runner = SlottedRunner(
            backbone,
            places=settings.max_active_adapters + _SPARE_PLACES,
            max_tokens=settings.max_batch_tokens,
        )
        runner.check()
    except Exception:
        # A device or compiler that nobody has tried yet must still serve, if slowly.
        logger.exception("the slots' kernels cannot be used here: adapters run one by one")
        return PackedRunner(backbone)
    return runner


def _info(backbone: Backbone) -> EngineInfo:
    return EngineInfo(
        encoder=backbone.encoder,
        identity=backbone.identity,
        max_tokens=backbone.max_tokens,
        hidden_size=backbone.hidden_size,
        layers=backbone.layers,
        device=str(backbone.device),
        dtype=str(backbone.dtype).removeprefix("torch."),
    )
