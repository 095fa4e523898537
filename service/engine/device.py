"""The threads that drive the device: warm up, then take a batch, launch it, wait, hand it over.

A GPU has one lane. Where the runner launches ahead, the next batch is packed and started while one
still runs, but only a full one: a batch that is not full gains more from entries that still arrive.
After a batch of few texts the lane waits until the answers are sent: the event loop sends them
under the same interpreter, and what their clients ask next belongs into the next batch.
A CPU has several lanes, each with its own share of the cores. Lanes never wait for each other,
whereas the threads of one matrix product meet after every product.
"""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from threading import Event, Thread
from time import monotonic

from service.engine.affinity import SharedCore
from service.engine.requests import LaunchedBatch, Request, rows_of
from service.engine.runners.base import BatchResult, Runner
from service.engine.scheduler import Scheduler, Selection

logger = logging.getLogger(__name__)

# While a large batch runs, how often to look whether it is done or the next one is full.
_POLL_SECONDS = 0.0005
# A lane waits until the answers of a batch are sent if it has so few texts, and at most so long:
# the loop may be busy with something else. Measured with up to 16 connections, one text each.
_FEW_TEXTS = 16
_HAND_OVER_SECONDS = 0.001
# A batch of this share of the token budget or more is large.
_LARGE_SHARE = 0.25


@dataclass(slots=True, eq=False)
class _Lane:
    """What one thread is doing. Times are of `time.monotonic`.

    running_since: since when the device has been running its oldest batch; None while it is idle.
    free_since: when its last batch ended. handed_over: set when that one's answers have been sent.
    """

    running_since: float | None = None
    free_since: float = 0.0
    handed_over: Event = field(default_factory=Event)


class Device:
    """Runs what the scheduler selects. Created on the event loop that it reports to.

    Args:
        deliver: called on the loop with every batch, so a batch wakes the loop once.
        die: called on the loop with the error that ended a lane.
        max_batch_tokens: the size of the warm-up batch.
        core: that the single lane shares with the event loop.

    Attributes:
        warm: done when the device is ready; fails with RuntimeError if it cannot be used.
    """

    def __init__(
        self,
        runner: Runner,
        scheduler: Scheduler[Request],
        *,
        deliver: Callable[[LaunchedBatch, BatchResult, float], None],
        die: Callable[[BaseException], None],
        max_batch_tokens: int,
        core: SharedCore | None = None,
    ) -> None:
        self._runner = runner
        self._core = core
        self._scheduler = scheduler
        self._deliver = deliver
        self._die = die
        self._max_batch_tokens = max_batch_tokens
        self._loop = asyncio.get_running_loop()
        self.warm: asyncio.Future[None] = self._loop.create_future()
        self._lanes = [_Lane() for _ in range(runner.lanes)]
        # Daemons: a device that hangs must not keep the process from ending.
        self._threads = [
            Thread(target=self._run_lane, args=(lane,), name="engine", daemon=True)
            for lane in self._lanes
        ]

    def start(self) -> None:
        """Warm up in the first lane; the others start once that is done."""
        self._threads[0].start()

    def join(self, timeout: float) -> None:
        """Wait at most `timeout` seconds for the lanes to end. Closing the scheduler ends them."""
        until = monotonic() + timeout
        for thread in self._threads:
            if thread.is_alive():
                thread.join(max(0.0, until - monotonic()))

    @property
    def batch_seconds(self) -> float:
        """How long the oldest batch on the device has been running; 0 when there is none."""
        started = [since for lane in self._lanes if (since := lane.running_since) is not None]
        return monotonic() - min(started) if started else 0.0

    def _run_lane(self, lane: _Lane) -> None:
        try:
            self._runner.enter_lane()
            if lane is self._lanes[0]:
                self._warm_up()
            self._run_batches(lane)
        except BaseException as error:
            logger.exception("an engine thread ended with an error")
            self._loop.call_soon_threadsafe(self._died, error)

    def _warm_up(self) -> None:
        for tokens, seconds in self._runner.warm_up(self._max_batch_tokens):
            self._scheduler.measured(tokens, seconds)
        for thread in self._threads[1:]:
            thread.start()
        self._loop.call_soon_threadsafe(self._warmed_up)

    def _run_batches(self, lane: _Lane) -> None:
        """Take a batch, launch it, wait for it, hand it over; until the scheduler is closed."""
        launched: LaunchedBatch | None = None
        lane.free_since = monotonic()
        while True:
            if launched is None and (launched := self._launch_next(lane)) is None:
                return
            following = self._launch_ahead(lane, launched)
            running = launched.running
            result = running.wait()
            seconds = self._record(lane, launched, following)
            lane.handed_over.clear()
            self._loop.call_soon_threadsafe(self._hand_over, lane, launched, result, seconds)
            few = len(launched.selection.batch) <= _FEW_TEXTS
            launched = following
            # An idle lane keeps nothing of its last batch alive.
            spun = running.spins
            del following, result, running
            if self._core is not None:
                self._core.keep(lane.free_since, spun=spun)
            if few and spun and launched is None:
                lane.handed_over.wait(_HAND_OVER_SECONDS)

    def _hand_over(
        self, lane: _Lane, launched: LaunchedBatch, result: BatchResult, seconds: float
    ) -> None:
        """Runs on the loop."""
        self._deliver(launched, result, seconds)
        # In its next turn the callers go on, and what they send leaves in the turn after that.
        self._loop.call_soon(self._loop.call_soon, lane.handed_over.set)

    def _launch_next(self, lane: _Lane) -> LaunchedBatch | None:
        """Wait for a batch and launch it; None once the scheduler is closed."""
        selection = self._scheduler.take()
        return None if selection is None else self._launch(lane, selection)

    def _launch(self, lane: _Lane, selection: Selection[Request]) -> LaunchedBatch:
        started = monotonic()
        if lane.running_since is None:
            lane.running_since = started
        rows = rows_of(selection.batch)
        running = self._runner.launch(rows) if rows else BatchResult([])
        return LaunchedBatch(selection, running, started)

    def _launch_ahead(self, lane: _Lane, launched: LaunchedBatch) -> LaunchedBatch | None:
        """Launch the next batch while one runs, if it is full.

        A large batch leaves time for the next one to fill, so this waits until then. A small one is
        over before waiting would pay.
        """
        if not self._runner.launches_ahead:
            return None
        large = launched.selection.tokens >= _LARGE_SHARE * self._max_batch_tokens
        patience = _POLL_SECONDS if large else 0.0
        while True:
            if (selection := self._scheduler.take_full(patience)) is not None:
                return self._launch(lane, selection)
            if not patience or launched.running.is_done():
                return None

    def _record(self, lane: _Lane, ended: LaunchedBatch, following: LaunchedBatch | None) -> float:
        """Note that a batch has ended; returns the seconds since its launch."""
        now = monotonic()
        if ended.selection.batch:
            # The device has worked on a batch that was launched ahead only since the one before it
            # ended. A lane that did not have to wait was making this batch since then.
            idle = ended.selection.waited
            begun = max(ended.started, lane.free_since) if idle else lane.free_since
            self._scheduler.record_batch(ended.selection, now - begun, now)
        lane.free_since = now
        lane.running_since = None if following is None else now
        return now - ended.started

    def _warmed_up(self) -> None:
        if not self.warm.done():
            self.warm.set_result(None)

    def _died(self, error: BaseException) -> None:
        if not self.warm.done():
            # Wrapped, because asyncio would let a SystemExit end the whole loop.
            self.warm.set_exception(RuntimeError(f"the device cannot be used: {error}"))
        self._die(error)
