"""The requests in flight, from admission to their answer, on the event loop. Knows no device.

Every entry is settled exactly once: delivered by a batch, expired, or taken back from the queue.
When the last one of a request is, its lease ends.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from time import monotonic

from service.engine.device import Finished
from service.engine.interface import Completion, Entry
from service.engine.observer import BatchReport, EngineObserver, failure_reason
from service.engine.queue import EntryQueue
from service.engine.requests import Request
from service.engine.residency import Lease, Residency
from service.engine.runners.base import RowFailure
from service.errors import DeadlineExceeded, EngineUnavailable, InferenceFailed, ServiceError


class InFlight:
    """Admits requests, answers them, and knows when none is left."""

    def __init__(self, queue: EntryQueue, residency: Residency, observer: EngineObserver) -> None:
        self._queue = queue
        self._residency = residency
        self._observer = observer
        self._open: set[Request] = set()
        self._settled = asyncio.Event()
        self._over: str | None = None
        self._waking = False

    @asynccontextmanager
    async def admitted(
        self, entries: Sequence[Entry], deadline: float | None
    ) -> AsyncIterator[Request]:
        """Room for a request, until its deadline. Whatever ends it, nothing of it stays queued.

        Raises:
            TooLarge, Overloaded: no room.
            DeadlineExceeded: the block took too long and was cancelled.
        """
        now = monotonic()
        request = Request(entries, deadline, now, asyncio.get_running_loop().create_future())
        try:
            self._queue.admit(request)
            self._open.add(request)
            try:
                async with asyncio.timeout(None if deadline is None else deadline - now):
                    yield request
            finally:
                self._close(request)
        except TimeoutError:
            self._observer.failed("deadline", len(entries))
            raise DeadlineExceeded("the deadline passed before the answer was there") from None
        except asyncio.CancelledError:
            self._observer.failed("cancelled", len(entries))
            raise
        except ServiceError as error:
            if (reason := failure_reason(error)) is not None:
                self._observer.failed(reason, len(entries))
            raise

    async def answer(self, request: Request, lease: Lease) -> Completion:
        """Queue an admitted request's entries and wait for the last of them."""
        request.lease = lease
        if self._over is not None:
            raise EngineUnavailable(self._over)
        self._queue.put(request)
        self._wake_soon()
        self._observer.waiting_tokens(self._queue.tokens)
        return await request.answer

    def deliver(self, finished: Finished) -> None:
        """Hand a batch's outcomes to their requests."""
        batch = finished.selection.batch
        for waiting in finished.selection.expired:
            waiting.request.fail(DeadlineExceeded("an entry waited past the deadline"))
            self._settle(waiting.request, 1)
        for waiting, outcome in zip(batch, finished.ran.outcomes, strict=True):
            if isinstance(outcome, RowFailure):
                waiting.request.fail(InferenceFailed(outcome.message, reason=outcome.reason))
            else:
                waiting.request.rows[waiting.index] = outcome
        queue_seconds = [finished.started - waiting.since for waiting in batch]
        # A request at a time: its entries mostly leave together.
        for request, entries in Counter([waiting.request for waiting in batch]).items():
            request.note(finished.started - request.admitted, finished.seconds)
            self._settle(request, entries)
        if batch:
            self._observer.batch_done(_report(finished, queue_seconds))
        self._observer.waiting_tokens(self._queue.tokens)

    def fail_all(self, reason: str) -> None:
        """Fail whoever waits, now and from now on, with EngineUnavailable."""
        self._over = reason
        self._residency.fail_all(reason)
        for request in self._open:
            # One without a lease has just been failed by the residency.
            if request.lease is not None:
                request.fail(EngineUnavailable(reason))
        self._settled.set()

    async def idle(self) -> None:
        """Return when no request is in flight."""
        while self._open and self._over is None:
            self._settled.clear()
            await self._settled.wait()

    def _wake_soon(self) -> None:
        """Wake an idle device behind all that the loop is about to run.

        Answering a batch resumes all its callers in one turn of the loop; whatever they ask next
        becomes one batch again, not one for the first of them and one for the rest.
        """
        if not self._waking:
            self._waking = True
            asyncio.get_running_loop().call_soon(self._wake)

    def _wake(self) -> None:
        self._waking = False
        self._queue.wake()

    def _close(self, request: Request) -> None:
        """Nobody waits for this request any more; most have nothing left to take back."""
        request.give_up()
        if request.left > 0:
            self._settle(request, self._queue.remove(request))
            self._observer.waiting_tokens(self._queue.tokens)

    def _settle(self, request: Request, entries: int) -> None:
        if not request.settle(entries):
            return
        self._open.discard(request)
        if request.lease is not None:
            self._residency.release(request.lease)
        if not self._open:
            self._settled.set()


def _report(finished: Finished, queue_seconds: Sequence[float]) -> BatchReport:
    batch = finished.selection.batch
    return BatchReport(
        rows=len(batch),
        tokens=finished.tokens,
        adapters=len({waiting.entry.adapter for waiting in batch}),
        queue_seconds=queue_seconds,
        generator_seconds=finished.ran.generator_seconds,
        backbone_seconds=finished.ran.backbone_seconds,
        inference_seconds=finished.seconds,
        passes=finished.ran.passes,
        graphs=finished.ran.graphs,
    )
