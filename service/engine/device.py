"""The threads that drive the device: warm up, then take, launch, wait, hand over.

Knows no adapters. A GPU has one lane; on a device that takes batches ahead, a full one is packed
and started while another still runs, and a batch that is not full waits for whoever else comes. A
CPU has several lanes, each with cores of its own: rows share nothing, so lanes never wait for each
other, where the threads of one product meet after every one of them.
"""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from threading import Thread
from time import monotonic

from service.engine.queue import EntryQueue
from service.engine.requests import Request
from service.engine.runners.base import Asked, Flight, Ran, Runner
from service.engine.scheduler import Selection

logger = logging.getLogger(__name__)

# How often to see whether a large batch is through, or a full one waits. A batch is large from this
# share of the token budget on.
_LOOK_SECONDS = 0.0005
_LARGE = 0.25


@dataclass(frozen=True, slots=True)
class Finished:
    """A selection and what became of its batch of so many tokens. started: of `time.monotonic`."""

    selection: Selection[Request]
    tokens: int
    ran: Ran
    started: float
    seconds: float


@dataclass(frozen=True, slots=True)
class _Launched:
    selection: Selection[Request]
    tokens: int
    flight: Flight
    started: float


class Device:
    """Made on the event loop that it reports to; each batch costs that loop one wake-up.

    Args:
        deliver: called on the loop with every batch.
        die: called on the loop with what ended a lane, if anything did.
        max_batch_tokens: what the warm-up runs at once.

    Attributes:
        warm: done when the device is ready; fails with RuntimeError when it cannot be used.
    """

    def __init__(
        self,
        runner: Runner,
        queue: EntryQueue,
        *,
        deliver: Callable[[Finished], None],
        die: Callable[[BaseException], None],
        max_batch_tokens: int,
    ) -> None:
        self._runner = runner
        self._deliver = deliver
        self._die = die
        self._max_batch_tokens = max_batch_tokens
        self._loop = asyncio.get_running_loop()
        self.warm: asyncio.Future[None] = self._loop.create_future()
        self._lanes = [
            _Lane(
                runner,
                queue,
                deliver=lambda finished: self._tell(self._deliver, finished),
                die=lambda error: self._tell(self._died, error),
                warm_up=self._warm_up if first else None,
                max_batch_tokens=max_batch_tokens,
            )
            for first in (index == 0 for index in range(runner.lanes))
        ]

    def start(self) -> None:
        """Warm up in the first lane; the others begin when it has."""
        self._lanes[0].start()

    def join(self, timeout: float) -> None:
        """Wait at most `timeout` seconds for the lanes to end; closing the queue ends them."""
        until = monotonic() + timeout
        for lane in self._lanes:
            if lane.is_alive():
                lane.join(max(0.0, until - monotonic()))

    @property
    def batch_seconds(self) -> float:
        """How long the oldest batch on the device has been running; 0 when there is none."""
        return max(lane.batch_seconds for lane in self._lanes)

    def _tell(self, call: Callable[..., None], *arguments: object) -> None:
        self._loop.call_soon_threadsafe(call, *arguments)

    def _warm_up(self) -> None:
        self._runner.warm_up(self._max_batch_tokens)
        for lane in self._lanes[1:]:
            lane.start()
        self._tell(self._warmed)

    def _warmed(self) -> None:
        if not self.warm.done():
            self.warm.set_result(None)

    def _died(self, error: BaseException) -> None:
        if not self.warm.done():
            # Wrapped: asyncio lets a SystemExit out of the whole loop.
            self.warm.set_exception(RuntimeError(f"the device cannot be used: {error}"))
        self._die(error)


class _Lane(Thread):
    """One thread that takes batches. A daemon: a device that hangs must not keep the process from
    ending."""

    def __init__(
        self,
        runner: Runner,
        queue: EntryQueue,
        *,
        deliver: Callable[[Finished], None],
        die: Callable[[BaseException], None],
        warm_up: Callable[[], None] | None,
        max_batch_tokens: int,
    ) -> None:
        super().__init__(name="engine", daemon=True)
        self._runner = runner
        self._queue = queue
        self._deliver = deliver
        self._die = die
        self._warm_up = warm_up
        self._max_batch_tokens = max_batch_tokens
        self._running_since: float | None = None
        self._free_since = 0.0

    @property
    def batch_seconds(self) -> float:
        since = self._running_since
        return 0.0 if since is None else monotonic() - since

    def run(self) -> None:
        try:
            self._runner.enter_lane()
            if self._warm_up is not None:
                self._warm_up()
            self._serve()
        except BaseException as error:
            logger.exception("the engine's thread ends")
            self._die(error)

    def _serve(self) -> None:
        launched: _Launched | None = None
        while True:
            if launched is None:
                selection = self._queue.take()
                if selection is None:
                    return
                launched = self._launch(selection)
            following = self._ahead(launched)
            finished = self._finish(launched)
            launched = following
            self._running_since = None if following is None else monotonic()
            self._deliver(finished)

    def _ahead(self, launched: _Launched) -> _Launched | None:
        """The next batch, started behind the one that runs, if waiting would not make it larger.

        While a large batch runs there is time for the next one to fill; a small one is over sooner
        than whoever would look for that.
        """
        if not self._runner.ahead:
            return None
        large = launched.tokens >= _LARGE * self._max_batch_tokens
        patience = _LOOK_SECONDS if large else 0.0
        while True:
            if (selection := self._queue.take_full(patience)) is not None:
                return self._launch(selection)
            if not patience or self._runner.landed(launched.flight):
                return None

    def _launch(self, selection: Selection[Request]) -> _Launched:
        started = monotonic()
        if self._running_since is None:
            self._running_since = started
        rows = []
        for waiting in selection.batch:
            assert waiting.request.lease is not None
            prepared = waiting.request.lease[waiting.entry.adapter].prepared
            assert prepared is not None
            rows.append(Asked(waiting.entry.encoding, prepared, waiting.entry.explain))
        flight = self._runner.launch(rows) if rows else Ran([])
        tokens = sum([waiting.entry.cost for waiting in selection.batch])
        return _Launched(selection, tokens, flight, started)

    def _finish(self, launched: _Launched) -> Finished:
        batch = launched.selection.batch
        ran = self._runner.finish(launched.flight) if batch else Ran([])
        now = monotonic()
        if batch:
            # A batch that was launched behind another one has had the device only since then, and
            # one of several lanes has only its share.
            seconds = (now - max(launched.started, self._free_since)) / self._runner.lanes
            self._queue.drained(launched.tokens, seconds)
        self._free_since = now
        took = now - launched.started
        return Finished(launched.selection, launched.tokens, ran, launched.started, took)
