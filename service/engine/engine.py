"""The engine in this process: its life, and whether a request may enter.

The event loop admits requests and answers them (`requests.py`); the device's threads run their
batches (`device.py`).
"""

import asyncio
import contextlib
import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from time import monotonic
from typing import cast
from uuid import uuid4

import torch

from adapters.backbone.model import Backbone
from adapters.errors import InvalidAdapter
from adapters.format.files import validate_file
from adapters.format.store import AdapterStore
from adapters.heap import trim_heap
from service.engine.affinity import shared_core
from service.engine.answers import AnswerListener
from service.engine.device import Device
from service.engine.device_loader import DeviceLoader
from service.engine.fair_executor import FairExecutor
from service.engine.host_cache import HostCache
from service.engine.images import Images
from service.engine.interface import (
    EMBEDDING,
    AdapterKey,
    CheckedAdapter,
    Completion,
    EngineHealth,
    EngineInfo,
    Entry,
    cost_of,
)
from service.engine.load import Load
from service.engine.observer import ImageEvent, Observer
from service.engine.promptness import BESIDE_HTTP_SECONDS, restore_turns, shorten_turns
from service.engine.requests import TRIALS, InFlight, LaunchedBatch, Request
from service.engine.residency import Residency
from service.engine.runners.base import BatchResult, HostAdapter, Runner
from service.engine.runners.packed import PackedRunner
from service.engine.scheduler import Scheduler
from service.engine.settings import EngineSettings
from service.engine.shadows import Shadows
from service.engine.trials import TrialListener
from service.engine.turns import NOBODY
from service.errors import EngineUnavailable, InferenceFailed, NotReady

logger = logging.getLogger(__name__)

# Threads that read, check and fold adapters: half the cores, within these bounds, because the rest
# answer requests.
_MIN_READING_THREADS, _MAX_READING_THREADS = 2, 8
# Of `asyncio.to_thread`.
_OTHER_THREADS = 32
# Slots beyond the settings', for adapters that are tried out before they are published.
_TRIAL_SLOTS = 4
_TRIAL_TEXT = "A first text, to see that the scores are numbers."


class Phase(StrEnum):
    """The phase of an engine's life, in words for people."""

    CREATED = "not started yet"
    LOADING = "loading the backbone"
    WARMING = "warming up"
    READY = "ready"
    DRAINING = "draining"
    STOPPED = "stopped"
    DEAD = "dead"


_OVER = (Phase.STOPPED, Phase.DEAD)
# Between two trims of the heap.
_TRIM_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class _Parts:
    """What exists only once the backbone is loaded."""

    info: EngineInfo
    runner: Runner
    host_cache: HostCache
    images: Images | None
    residency: Residency
    in_flight: InFlight
    shadows: Shadows
    device: Device


class LocalEngine:
    """`service.engine.interface.Engine` with the device in this process.

    Args:
        load: builds the backbone; called once, in a thread.
        store: holds the adapters' files.
        settings: limits.
        observer: receives every event worth counting, on the event loop.
        trials: is told what is seen of names that try a second revision.
        answers: is told of every request that was answered.
    """

    def __init__(
        self,
        load: Callable[[], Backbone],
        store: AdapterStore,
        settings: EngineSettings,
        observer: Observer | None = None,
        trials: TrialListener | None = None,
        answers: AnswerListener | None = None,
    ) -> None:
        self._load = load
        self._store = store
        self._settings = settings
        self._observer = observer or Observer()
        self._trials = trials or TrialListener()
        self._answers = answers or AnswerListener()
        self._phase = Phase.CREATED
        # Why requests are refused, once the engine drains or has ended.
        self._reason = ""
        self._parts: _Parts | None = None
        self._core = shared_core() if settings.one_core else None
        readers = min(_MAX_READING_THREADS, max(_MIN_READING_THREADS, (os.cpu_count() or 1) // 2))
        leave = (lambda: None) if self._core is None else self._core.leave
        self._reading = FairExecutor(readers, name="reading", begin=leave)
        # One thread: what waits for it is copied by the same few calls (`device_loader`).
        self._copying = self._threads(1, "copying")
        self._scheduler: Scheduler[Request] = Scheduler(settings)
        self._trimming: asyncio.Task[None] | None = None
        self._shortened = False

    @property
    def info(self) -> EngineInfo:
        return self._loaded().info

    async def start(self) -> EngineInfo:
        assert self._phase is Phase.CREATED, "an engine is started once"
        try:
            self._enter(Phase.LOADING)
            if self._core is not None:
                asyncio.get_running_loop().set_default_executor(
                    self._threads(_OTHER_THREADS, "asyncio")
                )
            # In a thread: it takes seconds, and more where kernels are compiled.
            runner = await self._reading.submit(
                lambda: _make_runner(self._load(), self._settings), NOBODY
            )
            self._enter(Phase.WARMING)
            self._parts = parts = self._assemble(runner)
            if self._settings.beside_http:
                shorten_turns(BESIDE_HTTP_SECONDS)
                self._shortened = True
            parts.device.start()
            await parts.device.warm
            self._enter(Phase.READY)
            self._trimming = asyncio.create_task(_trim_regularly())
        except BaseException as error:
            self._die(error)
            raise
        return parts.info

    @property
    def load(self) -> Load:
        return self._scheduler.load(monotonic())

    def foresee(
        self, adapters: Sequence[str], *, timeout: float, client: str = "", weight: float = 1.0
    ) -> None:
        self._scheduler.foresee(adapters, timeout=timeout, client=client, weight=weight)

    async def predict(
        self,
        entries: Sequence[Entry],
        *,
        deadline: float | None = None,
        client: str = "",
        weight: float = 1.0,
        bulk: bool = False,
        elsewhere: bool = False,
    ) -> Completion:
        parts = self._require_ready()
        if not entries:
            return Completion((), 0.0, 0.0)
        tries = [entry for entry in entries if entry.trial is not None]
        answering = parts.shadows if tries else parts.in_flight
        completion = await answering.predict(
            entries, deadline, client=client, weight=weight, bulk=bulk, elsewhere=elsewhere
        )
        uncertain = self._answers.answered(entries, completion.rows)
        return replace(completion, uncertain=uncertain) if uncertain else completion

    async def check(self, file: Path) -> CheckedAdapter:
        runner = self._require_ready().runner
        adapter = await self._reading.submit(lambda: runner.prepare(validate_file(file)), TRIALS)
        spec = adapter.spec
        encoding = self.info.encoder.encode(_TRIAL_TEXT, max_length=spec.max_length)
        key = AdapterKey("(unpublished)", uuid4().hex)
        try:
            await self._require_ready().in_flight.try_out(
                Entry(key, encoding, cost_of(encoding, spec)), adapter
            )
        except InferenceFailed as error:
            if error.reason == "not_finite":
                raise InvalidAdapter(["scores: not finite for a plain text"]) from None
            raise
        # Where the device has no memory of its own, tensors are the mapped file, which may change.
        return CheckedAdapter(spec, adapter if runner.copies else None)

    def in_use(self, name: str) -> frozenset[str]:
        return self._loaded().residency.in_use(name)

    def active_adapters(self, most: int) -> list[str]:
        """Names of the adapters on the device, most recently used first, at most so many."""
        return [] if self._parts is None else self._parts.residency.active_names(most)

    async def preload(self, key: AdapterKey, checked: CheckedAdapter | None = None) -> None:
        parts = self._require_ready()
        if checked is not None and checked.prepared is not None:
            adapter = cast(HostAdapter, checked.prepared)
            parts.host_cache.keep_image(key, adapter)
            if parts.residency.has_room(key):
                parts.host_cache.add(key, adapter)
        await parts.residency.preload(key)
        # Without room on the device it was not read.
        parts.host_cache.make_image(key)

    def sweep_images(self) -> None:
        """Remove images that nothing refers to; it blocks on the disk."""
        if (images := self._loaded().images) is not None:
            images.sweep()

    def retire(self, key: AdapterKey) -> None:
        self._loaded().residency.retire(key)

    async def drain(self) -> None:
        if self._phase is Phase.READY:
            self._phase, self._reason = Phase.DRAINING, "the engine is draining"
        if self._phase is Phase.DRAINING:
            await self._loaded().in_flight.idle()

    async def stop(self) -> None:
        self._end(Phase.STOPPED, "the engine is stopped")
        if self._shortened:
            self._shortened = False
            restore_turns(BESIDE_HTTP_SECONDS)
        if self._trimming is not None:
            self._trimming.cancel()
        if self._parts is not None:
            self._parts.host_cache.close()
        self._reading.shutdown()
        self._copying.shutdown(wait=False, cancel_futures=True)
        if self._parts is not None:
            await asyncio.to_thread(self._parts.device.join, self._settings.stall_seconds)
        if self._core is not None:
            self._core.leave()

    def health(self) -> EngineHealth:
        live, ready = self._phase not in _OVER, self._phase is Phase.READY
        reason = None if ready else self._reason or f"it is {self._phase}"
        batch_seconds = 0.0 if self._parts is None else self._parts.device.batch_seconds
        if live and batch_seconds > self._settings.stall_seconds:
            live = ready = False
            reason = f"a batch has been running for {batch_seconds:.0f} seconds"
        return EngineHealth(
            live=live,
            ready=ready,
            reason=reason,
            details={
                "phase": str(self._phase),
                "waiting_entries": len(self._scheduler),
                "waiting_tokens": self._scheduler.waiting_tokens,
                "batch_seconds": batch_seconds,
            },
        )

    def _threads(self, count: int, name: str) -> ThreadPoolExecutor:
        """Threads that run on any core, wherever the event loop is kept."""
        leave = None if self._core is None else self._core.leave
        return ThreadPoolExecutor(count, thread_name_prefix=name, initializer=leave)

    def _require_ready(self) -> _Parts:
        """The one place that decides whether a request may enter.

        Raises:
            NotReady: the engine has not started yet.
            EngineUnavailable: it is draining, stopped or dead.
        """
        if self._phase is Phase.READY:
            return self._loaded()
        if self._reason:
            raise EngineUnavailable(self._reason)
        raise NotReady(f"the engine is not ready: {self._phase}")

    def _loaded(self) -> _Parts:
        if self._parts is None:
            raise NotReady(f"the engine is not ready: {self._phase}")
        return self._parts

    def _enter(self, phase: Phase) -> None:
        """Go on with the start, unless the engine ended meanwhile."""
        if self._phase in _OVER:
            raise EngineUnavailable(self._reason)
        self._phase = phase

    def _die(self, error: BaseException) -> None:
        self._end(Phase.DEAD, f"the engine died: {type(error).__name__}: {error}")

    def _end(self, phase: Phase, reason: str) -> None:
        self._scheduler.close()
        if self._phase not in _OVER:
            self._phase, self._reason = phase, reason
            if self._parts is not None:
                self._parts.shadows.close()
                self._parts.in_flight.fail_all(reason)

    def _assemble(self, runner: Runner) -> _Parts:
        settings, observer, scheduler = self._settings, self._observer, self._scheduler
        images = None
        if settings.max_image_bytes is not None:
            images = Images(
                self._store,
                runner,
                max_bytes=settings.max_image_bytes,
                report=_on_the_loop(observer.adapter_image),
                writes=settings.writes_images,
            )
        host_cache = HostCache(
            self._store,
            runner,
            reading=self._reading,
            observer=observer,
            capacity=settings.max_registered_adapters,
            max_bytes=settings.max_registered_bytes,
            images=images,
        )
        residency = Residency(
            host_cache,
            DeviceLoader(runner, self._copying),
            observer=observer,
            slots=settings.max_active_adapters,
            trial_slots=_TRIAL_SLOTS,
            max_bytes=_active_bytes(settings, runner.backbone.device),
            built_in={EMBEDDING: runner.embedder},
        )
        in_flight = InFlight(scheduler, residency, observer)
        shadows = Shadows(scheduler, in_flight, residency, self._trials)

        def deliver(launched: LaunchedBatch, result: BatchResult, seconds: float) -> None:
            if launched.selection.spare:
                shadows.delivered(launched, result, seconds)
            else:
                in_flight.deliver(launched, result, seconds)

        device = Device(
            runner,
            scheduler,
            deliver=deliver,
            die=self._die,
            max_batch_tokens=settings.max_batch_tokens,
            core=self._core,
        )
        return _Parts(
            _info(runner.backbone),
            runner,
            host_cache,
            images,
            residency,
            in_flight,
            shadows,
            device,
        )


def _on_the_loop(report: Callable[[ImageEvent], None]) -> Callable[[ImageEvent], None]:
    """The same for threads: it is called on this event loop, while that runs."""
    loop = asyncio.get_running_loop()

    def reported(event: ImageEvent) -> None:
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(report, event)

    return reported


def _active_bytes(settings: EngineSettings, device: torch.device) -> int | None:
    """The limit of what adapters take on the device."""
    if settings.active_share is None or device.type != "cuda":
        return settings.max_active_bytes
    free, _ = torch.cuda.mem_get_info(device)
    limit = int(settings.active_share * free)
    logger.info("adapters may take %d MiB of the device", limit >> 20)
    return limit


def _make_runner(backbone: Backbone, settings: EngineSettings) -> Runner:
    if backbone.device.type != "cuda":
        return PackedRunner(backbone, lanes=settings.lanes, sharing=settings.sharing)
    try:
        # Imported here: its kernels need a compiler that only PyTorch for CUDA brings.
        from service.engine.runners.slotted import SlottedRunner

        runner = SlottedRunner(
            backbone,
            slots=settings.max_active_adapters + _TRIAL_SLOTS,
            max_tokens=settings.max_batch_tokens,
            sharing=settings.sharing,
        )
        runner.check()
    except Exception:
        # An untried device or compiler must still serve, if slowly.
        logger.exception("the slot kernels cannot be used on this device: adapters run one by one")
        return PackedRunner(backbone, sharing=settings.sharing)
    return runner


def _info(backbone: Backbone) -> EngineInfo:
    return EngineInfo(
        encoder=backbone.encoder,
        identity=backbone.identity,
        max_tokens=backbone.max_tokens,
        hidden_size=backbone.hidden_size,
        intermediate_size=backbone.intermediate_size,
        embedding_size=backbone.embedding_size,
        layers=backbone.layers,
        device=str(backbone.device),
        dtype=backbone.computes,
    )


async def _trim_regularly() -> None:
    while True:
        await asyncio.sleep(_TRIM_SECONDS)
        await asyncio.to_thread(trim_heap)
