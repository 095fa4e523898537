"""The one thread that drives the device: warm up, then take, launch, wait, hand over.

Knows no adapters. On a device that takes batches ahead, a full one is packed and started while
another still runs; a batch that is not full waits for whoever else comes until the device is free.
"""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from threading import Thread
from time import monotonic

from service.engine.queue import EntryQueue
from service.engine.requests import Request
from service.engine.runner import Asked, Flight, Ran, Runner
from service.engine.scheduler import Selection

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Finished:
    """A selection and what became of its batch. started: of `time.monotonic`."""

    selection: Selection[Request]
    ran: Ran
    started: float
    seconds: float


@dataclass(frozen=True, slots=True)
class _Launched:
    selection: Selection[Request]
    flight: Flight
    started: float


class DeviceThread:
    """Made on the event loop that it reports to; each batch costs that loop one wake-up.

    Args:
        deliver: called on the loop with every batch.
        die: called on the loop with what ended the thread, if anything did.
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
        self._queue = queue
        self._deliver = deliver
        self._die = die
        self._max_batch_tokens = max_batch_tokens
        self._running_since: float | None = None
        self._free_since = 0.0
        self._loop = asyncio.get_running_loop()
        self.warm: asyncio.Future[None] = self._loop.create_future()
        # A daemon: a device that hangs must not keep the process from ending.
        self._thread = Thread(target=self._serve, name="engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def join(self, timeout: float) -> None:
        """Wait at most `timeout` seconds for the thread to end; closing the queue ends it."""
        if self._thread.is_alive():
            self._thread.join(timeout)

    @property
    def batch_seconds(self) -> float:
        """How long the batch on the device has been running; 0 when there is none."""
        since = self._running_since
        return 0.0 if since is None else monotonic() - since

    def _serve(self) -> None:
        try:
            self._runner.warm_up(self._max_batch_tokens)
            self._loop.call_soon_threadsafe(self._warmed)
            launched: _Launched | None = None
            while True:
                if launched is None:
                    selection = self._queue.take()
                    if selection is None:
                        return
                    launched = self._launch(selection)
                following = self._ahead()
                finished = self._finish(launched)
                launched = following
                self._running_since = None if following is None else monotonic()
                self._loop.call_soon_threadsafe(self._deliver, finished)
        except BaseException as error:
            logger.exception("the engine's thread ends")
            self._loop.call_soon_threadsafe(self._died, error)

    def _ahead(self) -> "_Launched | None":
        """The next batch, started behind the one that runs, if waiting would not make it larger."""
        if not self._runner.ahead or (selection := self._queue.take_full()) is None:
            return None
        return self._launch(selection)

    def _launch(self, selection: Selection[Request]) -> "_Launched":
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
        return _Launched(selection, flight, started)

    def _finish(self, launched: "_Launched") -> Finished:
        batch = launched.selection.batch
        ran = self._runner.finish(launched.flight) if batch else Ran([])
        now = monotonic()
        if batch:
            # A batch that was launched behind another one has had the device only since then.
            since = max(launched.started, self._free_since)
            self._queue.drained(sum(item.entry.cost for item in batch), now - since)
        self._free_since = now
        return Finished(launched.selection, ran, launched.started, now - launched.started)

    def _warmed(self) -> None:
        if not self.warm.done():
            self.warm.set_result(None)

    def _died(self, error: BaseException) -> None:
        if not self.warm.done():
            # Wrapped: asyncio lets a SystemExit out of the whole loop.
            self.warm.set_exception(RuntimeError(f"the device cannot be used: {error}"))
        self._die(error)
