"""Requests for names that try a second revision, and texts that it reads only to be compared.

A text that is to be compared is offered once its request is answered, as a spare entry of the
scheduler: none of this delays, fails or refuses a request. Its adapter must be on the device, or
fit there without evicting another. A lease keeps it there while its texts wait; a request that
finds no free slot ends these leases.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import Sequence
from time import monotonic

from service.engine.flows import Node
from service.engine.interface import AdapterKey, Completion, Entry, RowResult
from service.engine.requests import InFlight, LaunchedBatch, Request
from service.engine.residency import Residency
from service.engine.runners.base import BatchResult, RowFailure
from service.engine.scheduler import QueuedEntry, Scheduler, Ticket
from service.engine.trials import DropReason, Pair, Role, TrialListener
from service.errors import AdapterLoadFailed, InferenceFailed, ServiceError

logger = logging.getLogger(__name__)


class Shadows:
    """Answers requests with entries of trials, and reports all that is seen of them."""

    def __init__(
        self,
        scheduler: Scheduler[Request],
        in_flight: InFlight,
        residency: Residency,
        listener: TrialListener,
    ) -> None:
        self._scheduler = scheduler
        self._in_flight = in_flight
        self._residency = residency
        self._listener = listener
        # The requests that wait or run, each for one adapter, and what their texts were answered.
        self._answers: dict[Request, Sequence[RowResult]] = {}
        self._loads: dict[AdapterKey, asyncio.Task[None]] = {}
        in_flight.on_row_failure = self._answered_row_failed
        in_flight.on_late = self._late
        residency.on_shortage = self.withdraw

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
        """As `InFlight.predict`."""
        admitted = monotonic()
        try:
            completion = await self._in_flight.predict(
                entries, deadline, client=client, weight=weight, bulk=bulk, elsewhere=elsewhere
            )
        except InferenceFailed:
            # Its rows have reported which of them failed.
            self._report_read(entries, None)
            raise
        except AdapterLoadFailed as error:
            lost = AdapterKey(error.name, error.revision)
            self._report_lost([entry for entry in entries if entry.adapter == lost])
            self._listener.unreadable(error.name, error.revision, str(error))
            raise
        self._report_read(entries, monotonic() - admitted)
        self._offer(entries, completion.rows)
        return completion

    def delivered(self, launched: LaunchedBatch, result: BatchResult, seconds: float) -> None:
        """Compare the results of a batch of spare entries. seconds: as of `InFlight.deliver`."""
        pairs: dict[tuple[str, str], list[Pair]] = {}
        batch = launched.selection.batch
        for queued, outcome in zip(batch, result.outcomes, strict=True):
            request, key, trial = queued.request, queued.entry.adapter, queued.entry.trial
            assert trial is not None
            self._listener.read(key.name, trial.candidate, "shadow", 1, seconds)
            if isinstance(outcome, RowFailure):
                self._listener.failed(key.name, trial.candidate, key.revision, "shadow", 1)
                continue
            answered = self._answers[request][queued.index].scores
            pair = Pair(answered, outcome.scores)
            if key.revision != trial.candidate:
                pair = Pair(outcome.scores, answered)
            pairs.setdefault((key.name, trial.candidate), []).append(pair)
        for (name, candidate), compared in pairs.items():
            self._listener.compared(name, candidate, compared)
        self._settle(batch)

    def withdraw(self, reason: DropReason = "memory") -> None:
        """Give up all texts that wait to be read a second time."""
        withdrawn = self._scheduler.withdraw_spare()
        for queued in withdrawn:
            self._drop(queued.entry, reason)
        self._settle(withdrawn)

    def close(self) -> None:
        """The engine ends."""
        self.withdraw("load")
        for task in self._loads.values():
            task.cancel()

    def _report_read(self, entries: Sequence[Entry], seconds: float | None) -> None:
        texts: Counter[tuple[str, str, Role]] = Counter()
        for entry in entries:
            if (trial := entry.trial) is not None:
                key = entry.adapter
                role: Role = "canary" if key.revision == trial.candidate else "current"
                texts[key.name, trial.candidate, role] += 1
        # The time of a request says something about a revision only if it is that one's alone.
        alone = len({entry.adapter for entry in entries}) == 1
        for (name, candidate, role), count in texts.items():
            self._listener.read(name, candidate, role, count, seconds if alone else None)

    def _late(self, entries: Sequence[Entry]) -> None:
        # Nobody's fault if revisions share the request.
        if len({entry.adapter for entry in entries}) == 1:
            self._report_lost(entries)

    def _report_lost(self, entries: Sequence[Entry]) -> None:
        """None of these has an answer."""
        self._report_read(entries, None)
        for entry in entries:
            if entry.trial is not None:
                self._answered_row_failed(entry)

    def _answered_row_failed(self, entry: Entry) -> None:
        key, trial = entry.adapter, entry.trial
        assert trial is not None
        role: Role = "canary" if key.revision == trial.candidate else "current"
        self._listener.failed(key.name, trial.candidate, key.revision, role, 1)

    def _offer(self, entries: Sequence[Entry], rows: Sequence[RowResult]) -> None:
        wanted: dict[AdapterKey, list[int]] = {}
        for index, entry in enumerate(entries):
            if entry.trial is not None and entry.trial.other is not None:
                key = AdapterKey(entry.adapter.name, entry.trial.other)
                wanted.setdefault(key, []).append(index)
        for key, indices in wanted.items():
            seconds = [
                Entry(key, entries[index].encoding, trial.cost, trial=trial)
                for index in indices
                if (trial := entries[index].trial) is not None
            ]
            self._offer_one(key, seconds, [rows[index] for index in indices])

    def _offer_one(
        self, key: AdapterKey, entries: Sequence[Entry], answers: Sequence[RowResult]
    ) -> None:
        lease = self._residency.lease_idle(key)
        if lease is None:
            self._load(key)
            for entry in entries:
                self._drop(entry, "memory")
            return
        now = monotonic()
        future: asyncio.Future[Completion] = asyncio.get_running_loop().create_future()
        request = Request(entries, None, now, future, lease=lease)
        # No flow counts it.
        flow: Node[QueuedEntry[Request]] = Node("", None, 1.0)
        ticket: Ticket[Request] = Ticket(now, None, None, flow, 0)
        queued = [QueuedEntry(entry, request, index, ticket) for index, entry in enumerate(entries)]
        self._answers[request] = answers
        if not self._scheduler.offer_spare(queued):
            for entry in entries:
                self._drop(entry, "load")
            self._settle(queued)

    def _load(self, key: AdapterKey) -> None:
        """Bring an adapter onto the device, if that evicts no other."""
        if key not in self._loads and self._residency.has_room(key):
            self._loads[key] = task = asyncio.create_task(self._preload(key))
            task.add_done_callback(lambda _: self._loads.pop(key, None))

    async def _preload(self, key: AdapterKey) -> None:
        try:
            await self._residency.preload(key)
        except AdapterLoadFailed as error:
            logger.warning("an adapter cannot be tried beside the current one: %s", error)
            self._listener.unreadable(key.name, key.revision, str(error))
        except ServiceError as error:
            logger.debug("adapter not loaded name=%s: %s", key.name, error)

    def _drop(self, entry: Entry, reason: DropReason) -> None:
        assert entry.trial is not None
        self._listener.dropped(entry.adapter.name, entry.trial.candidate, 1, reason)

    def _settle(self, batch: Sequence[QueuedEntry[Request]]) -> None:
        for request, entries in Counter([queued.request for queued in batch]).items():
            request.unsettled -= entries
            if request.unsettled == 0:
                del self._answers[request]
                if request.lease is not None:
                    self._residency.release(request.lease)
