"""Requests from admission to their answers, on the event loop.

A request is admitted in tokens, leases its adapters and queues its entries. Every entry is settled
exactly once: delivered by a batch, expired, or taken back from the queue. When the last entry of a
request is settled, its lease ends.
"""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from time import monotonic

from service.engine.interface import EMBEDDING, Completion, Entry, RowResult
from service.engine.observer import BatchReport, Observer, failure_reason
from service.engine.residency import Lease, Residency
from service.engine.runners.base import BatchResult, BatchRow, HostAdapter, RowFailure, RunningBatch
from service.engine.scheduler import QueuedEntry, Scheduler, Selection, Ticket
from service.engine.turns import Client
from service.errors import (
    DeadlineExceeded,
    EngineUnavailable,
    InferenceFailed,
    Overloaded,
    ServiceError,
)

# Trying out an uploaded adapter shares the device like the requests of a client.
TRIALS = Client("(trials)", 1.0)
_PACE_SECONDS = 0.25


@dataclass(slots=True, eq=False)
class Request:
    """Entries that are answered together. Only the event loop changes it.

    admitted, deadline: on the clock of `time.monotonic`. unsettled: entries not yet answered,
    failed or dropped. ticket: its room, once it is admitted. lease: their adapters, set before the
    entries are queued and unchanged while one of them may run.
    """

    entries: Sequence[Entry]
    deadline: float | None
    admitted: float
    answer: asyncio.Future[Completion]
    unsettled: int = field(init=False)
    rows: list[RowResult | None] = field(init=False)
    ticket: Ticket["Request"] | None = None
    lease: Lease | None = None
    queue_seconds: float = 0.0
    inference_seconds: float = 0.0

    def __post_init__(self) -> None:
        self.unsettled = len(self.entries)
        self.rows = [None] * len(self.entries)

    def fail(self, error: ServiceError) -> None:
        """Fail the request as a whole; only the first failure counts."""
        if not self.answer.done():
            self.answer.set_exception(error)

    def expire(self) -> None:
        """Its deadline has passed: the caller gets a TimeoutError."""
        if not self.answer.done():
            self.answer.set_exception(TimeoutError())

    def note_seconds(self, queue_seconds: float, inference_seconds: float) -> None:
        """Some of its entries waited and ran this long; the slowest count."""
        self.queue_seconds = max(self.queue_seconds, queue_seconds)
        self.inference_seconds = max(self.inference_seconds, inference_seconds)

    def settle(self, entries: int) -> bool:
        """Count this many entries as settled; returns whether all are."""
        self.unsettled -= entries
        assert self.unsettled >= 0
        if self.unsettled == 0 and not self.answer.done():
            rows = tuple([row for row in self.rows if row is not None])
            assert len(rows) == len(self.entries)
            completion = Completion(
                rows,
                self.queue_seconds,
                self.inference_seconds,
                shared=sum([row.shared for row in rows]),
            )
            self.answer.set_result(completion)
        return self.unsettled == 0

    def abandon(self) -> None:
        """The caller waits no longer."""
        if not self.answer.cancel() and not self.answer.cancelled():
            # Retrieved, so that asyncio does not report the exception as never retrieved.
            self.answer.exception()


@dataclass(frozen=True, slots=True)
class LaunchedBatch:
    """A selection whose batch was launched. started: of `time.monotonic`."""

    selection: Selection[Request]
    running: RunningBatch
    started: float


def rows_of(batch: Sequence[QueuedEntry[Request]]) -> list[BatchRow]:
    """The rows that a runner gets. Their requests' leases keep the adapters on the device."""
    rows = []
    for queued in batch:
        assert queued.request.lease is not None
        adapter = queued.request.lease[queued.entry.adapter].adapter
        assert adapter is not None
        rows.append(BatchRow(queued.entry.encoding, adapter, queued.entry.explain))
    return rows


class InFlight:
    """The requests in flight: admits and answers them, and knows when none is left.

    Attributes:
        on_row_failure: called with an entry of a trial whose row has no answer.
        on_late: called with the entries of an admitted request whose deadline has passed.
    """

    def __init__(
        self, scheduler: Scheduler[Request], residency: Residency, observer: Observer
    ) -> None:
        self._scheduler = scheduler
        self._residency = residency
        self._observer = observer
        self._open: set[Request] = set()
        self._all_settled = asyncio.Event()
        self._wake_scheduled = False
        self._pace_reported = 0.0
        self.on_row_failure: Callable[[Entry], None] = lambda _: None
        self.on_late: Callable[[Sequence[Entry]], None] = lambda _: None
        observer.waiting_limit(scheduler.limit)

    async def predict(
        self,
        entries: Sequence[Entry],
        deadline: float | None,
        *,
        client: str,
        weight: float,
        bulk: bool = False,
        elsewhere: bool = False,
    ) -> Completion:
        """Answer a request.

        Raises:
            As `service.engine.interface.Predictor.predict`.
        """
        keys = tuple({entry.adapter: None for entry in entries})
        return await self._run(
            entries,
            deadline,
            client,
            weight,
            lambda: (
                self._residency.acquire_loaded(keys)
                or self._residency.acquire(keys, Client(client, weight))
            ),
            bulk=bulk,
            elsewhere=elsewhere,
        )

    async def try_out(self, entry: Entry, adapter: HostAdapter) -> None:
        """Run one entry with an adapter that no store holds.

        Raises:
            Overloaded, InferenceFailed, EngineUnavailable: as `predict`.
        """
        await self._run(
            [entry],
            None,
            TRIALS.name,
            TRIALS.weight,
            lambda: self._residency.try_out(entry.adapter, adapter, TRIALS),
        )

    def deliver(self, launched: LaunchedBatch, result: BatchResult, seconds: float) -> None:
        """Hand the results of a batch to its requests. seconds: from its launch to its result."""
        batch = launched.selection.batch
        for queued in launched.selection.expired:
            queued.request.fail(DeadlineExceeded("it could not be done by its deadline"))
            self._settle(queued.request, 1)
        for queued, outcome in zip(batch, result.outcomes, strict=True):
            if isinstance(outcome, RowFailure):
                queued.request.fail(_failed(queued.entry, outcome))
                if queued.entry.trial is not None:
                    self.on_row_failure(queued.entry)
            else:
                queued.request.rows[queued.index] = outcome
        queue_seconds: list[float] = []
        now = monotonic()
        # Per request, not per entry: the entries of a request mostly leave together.
        for request, entries in Counter([queued.request for queued in batch]).items():
            waited = launched.started - request.admitted
            queue_seconds += [waited] * entries
            request.note_seconds(waited, seconds)
            if self._settle(request, entries) and request.ticket is not None:
                self._scheduler.record_answer(request.ticket, now)
        if batch:
            report = BatchReport(
                rows=len(batch),
                tokens=launched.selection.tokens,
                adapters=launched.selection.adapters,
                queue_seconds=queue_seconds,
                generator_seconds=result.generator_seconds,
                backbone_seconds=result.backbone_seconds,
                inference_seconds=seconds,
                passes=result.passes,
                graphs=result.graphs,
            )
            self._observer.batch_done(report)
            self._report_pace(now)
        self._report_waiting()

    def fail_all(self, reason: str) -> None:
        """Fail every open request with EngineUnavailable, whatever it waits for."""
        self._residency.fail_all(reason)
        for request in self._open:
            request.fail(EngineUnavailable(reason))
        self._open.clear()
        self._all_settled.set()

    async def idle(self) -> None:
        """Return when no request is in flight."""
        while self._open:
            self._all_settled.clear()
            await self._all_settled.wait()

    async def _run(
        self,
        entries: Sequence[Entry],
        deadline: float | None,
        client: str,
        weight: float,
        lease: Callable[[], Lease | Awaitable[Lease]],
        *,
        bulk: bool = False,
        elsewhere: bool = False,
    ) -> Completion:
        now, loop = monotonic(), asyncio.get_running_loop()
        request = Request(entries, deadline, now, loop.create_future())
        expires = None if deadline is None else loop.time() + deadline - now
        timer: asyncio.TimerHandle | None = None
        try:
            request.ticket = self._scheduler.admit(
                entries, now=now, deadline=deadline, client=client, weight=weight, bulk=bulk
            )
            self._open.add(request)
            try:
                leased = lease()
                if not isinstance(leased, dict):
                    async with asyncio.timeout_at(expires):
                        leased = await leased
                    self._scheduler.postpone(request.ticket, monotonic() - now)
                request.lease = leased
                if expires is not None:
                    timer = loop.call_at(expires, request.expire)
                self._enqueue(request)
                return await request.answer
            except (TimeoutError, DeadlineExceeded):
                self.on_late(entries)
                raise
            finally:
                if timer is not None:
                    timer.cancel()
                self._close(request)
                # Its error's traceback has this frame: see `_settle`.
                del request
        except TimeoutError:
            self._observer.failed("deadline", len(entries))
            raise DeadlineExceeded("the deadline passed before the answer was there") from None
        except asyncio.CancelledError:
            self._observer.failed("cancelled", len(entries))
            raise
        except ServiceError as error:
            if (bulk or elsewhere) and isinstance(error, Overloaded):
                # Nobody is refused: the job tries again, or another engine is asked.
                raise
            if (reason := failure_reason(error)) is not None:
                self._observer.failed(reason, len(entries))
            if isinstance(error, Overloaded):
                self._observer.overload_refused(error.reason)
            raise

    def _enqueue(self, request: Request) -> None:
        ticket = request.ticket
        assert ticket is not None
        queued = [
            QueuedEntry(entry, request, index, ticket)
            for index, entry in enumerate(request.entries)
        ]
        self._scheduler.enqueue(ticket, queued)
        # An idle device is woken only after everything that the loop is about to run. Answering a
        # batch resumes all its callers in one turn of the loop; what they ask next becomes one
        # batch again, instead of one for the first caller and one for the rest.
        if not self._wake_scheduled:
            self._wake_scheduled = True
            asyncio.get_running_loop().call_soon(self._wake)
        self._report_waiting()

    def _wake(self) -> None:
        self._wake_scheduled = False
        self._scheduler.wake()

    def _close(self, request: Request) -> None:
        """The caller has left; take back what no batch has taken. Mostly nothing is left."""
        request.abandon()
        if request.unsettled == 0:
            return
        assert request.ticket is not None
        dropped = self._scheduler.withdraw(request.ticket)
        self._settle(request, dropped if request.ticket.queued else len(request.entries))
        self._report_waiting()

    def _report_pace(self, now: float) -> None:
        """A few times a second: a GPU runs hundreds of batches in that time."""
        if now >= self._pace_reported + _PACE_SECONDS:
            self._pace_reported = now
            rate, wait = self._scheduler.pace(now)
            self._observer.pace(rate, wait)
            self._observer.waiting_limit(self._scheduler.limit)

    def _report_waiting(self) -> None:
        self._observer.waiting_tokens(self._scheduler.waiting_tokens)

    def _settle(self, request: Request, entries: int) -> bool:
        """Count entries as settled; returns whether all of the request are."""
        if not request.settle(entries):
            return False
        self._open.discard(request)
        if request.ticket is not None:
            # They refer to the request. In a circle, all that a request has would wait for the
            # garbage collector, which then stops the loop and the lanes for a tenth of a second.
            request.ticket.queued = ()
        if request.lease is not None:
            self._residency.release(request.lease)
        if not self._open:
            self._all_settled.set()
        return True


def _failed(entry: Entry, outcome: RowFailure) -> InferenceFailed:
    """Scores that are not finite are of one adapter; what else fails is not its fault."""
    of_adapter = outcome.reason == "not_finite" and entry.adapter != EMBEDDING
    whose = f"adapter {entry.adapter.name!r}: " if of_adapter else ""
    return InferenceFailed(whose + outcome.message, reason=outcome.reason)
