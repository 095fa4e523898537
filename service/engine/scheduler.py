"""Admits requests by the time they would take, and decides which entries run next.

Admission. The device's pace is measured (`pace.py`). From it, from what runs and from what waits
ahead of it, the scheduler works out when a request would be answered. It refuses at once a request
that would miss its deadline, or that does not fit beside what waits. So under overload the queue is
short and all that waits is still useful.

Order. There is no timer: when the device becomes free, whatever waits forms the next batch, as many
tokens as the budget holds. Clients and adapters share the device by weight (`flows.py`). An entry
that cannot be done by its deadline leaves without being run. One that does not fit into the rest of
a batch may be overtaken by entries that do, in a bounded number of batches. Every flow's oldest
entry gets its turn within one round of the flows, so none starves.

Spare entries, which nobody waits for, are a queue of their own. No admission counts them, and they
run in small batches while the device has nothing else to do.

The event loop fills the queue and the device's threads empty it, so one lock guards it here.
"""

from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from heapq import nlargest
from itertools import islice
from threading import Condition
from time import monotonic
from typing import Generic, TypeVar

import msgspec

from service.engine.flows import Flows, Node
from service.engine.interface import AdapterKey, Entry
from service.engine.load import MAX_CORRECTION, FlowKey, Load, flow_of
from service.engine.pace import Pace
from service.engine.settings import EngineSettings
from service.errors import DeadlineExceeded, Overloaded, OverloadReason, TooLarge

# An entry is overtaken in at most this many batches.
MAX_OVERTAKEN = 4
# Entries passed over while one batch is filled: bounds the work when thousands wait.
MAX_PASSED_OVER = 64

# Entries cannot be split, so a batch that fills this share of the budget counts as full.
_FULL_SHARE = 0.9

# How much may wait by default, in seconds of work at the measured rate.
WAITING_SECONDS = 5.0
_RETRY_SECONDS_UNMEASURED = 1.0

# A batch takes at most this share of the shortest timeout that clients ask for, so that a request
# which has just missed a batch can still be in the next one. Batches are not made smaller than this
# share of the budget, nor if the device would do less than this share of its work.
_TIMEOUT_SHARE = 0.4
_SMALLEST_LIMIT = 1 / 4
_EFFICIENT = 0.85
# Clients ask for equal timeouts, of which a request has used a little when it gets here. Adjusting
# the size of batches to each of these differences would cost more than the admission itself.
_AS_SHORT = 0.99
# The shortest timeout rises again by this share of the difference with every longer one.
_FORGET_SHORTEST = 0.01

# Promises are corrected by how much later than promised requests were answered lately: by the mean
# error and this many mean deviations, but by no more than `MAX_CORRECTION` of a timeout.
_DEVIATIONS = 3.0
_BATCH_DEVIATIONS = 2.0
_LEARNING = 0.05

# A job's share of the device beside a client that has as much to do. While there are other
# requests, a job fills batches only up to the size at which the device does this share of its work:
# a request waits for such a batch and is in the next one. Once none has come for some seconds,
# batches are full again.
BULK_WEIGHT = 0.25
_BULK_EFFICIENT = 0.9
_ALONE_SECONDS = 5.0

# A request is in time without a closer look if its deadline leaves this many times what is needed.
_EASY = 3.0

# Without new measurements, old ones lose their force: expected times halve every second. Otherwise
# an engine that once was too slow for a deadline would never try again.
_TRUSTED_SECONDS = 1.0
# By then nothing is left of them, and it is a divisor: after a quarter of an hour it would be zero.
_HALVINGS = 30.0
# A batch of spare entries takes about this long at most, or has one entry: a request that comes
# meanwhile waits for it.
SPARE_SECONDS = 0.01
# The most flows whose waits are told to other processes.
_MAX_FLOWS = 64
_MAX_SEEN_FLOWS = 1024

R = TypeVar("R")


@dataclass(slots=True, eq=False)
class Ticket(Generic[R]):
    """A request's place: room for its tokens, in its flow.

    since, deadline: when it was admitted and when it expires, in seconds of one clock. bulk: as of
    `service.engine.interface.Predictor.predict`. promised:
    when its last entry should be done; None if nothing is measured yet. flow: the leaf where its
    tokens are reserved. left: tokens that no batch has taken. queued: its entries in the queue,
    once they are queued.
    """

    since: float
    deadline: float | None
    promised: float | None
    flow: Node["QueuedEntry[R]"]
    left: int
    bulk: bool = False
    queued: Sequence["QueuedEntry[R]"] = ()


class QueuedEntry(msgspec.Struct, Generic[R], eq=False):
    """An entry in the queue. Compared by identity: two equal texts are two entries.

    A struct, because every text has one.

    request: the request it belongs to; index: its position there. The scheduler uses neither.
    overtaken: batches that took a later entry instead. waits: whether it is in the queue.
    """

    entry: Entry
    request: R
    index: int
    ticket: Ticket[R]
    overtaken: int = 0
    waits: bool = False


@dataclass(slots=True, eq=False)
class Selection(Generic[R]):
    """What leaves the queue. batch: entries to run, in order. expired: entries that cannot be done
    by their deadline, and the other waiting entries of their requests.

    tokens: of the batch. adapters: distinct ones in it. ends: when the batch should be done.
    waited: whether the device was idle before. spare: whether its entries are spare ones.
    """

    batch: list[QueuedEntry[R]] = field(default_factory=list)
    expired: list[QueuedEntry[R]] = field(default_factory=list)
    tokens: int = 0
    adapters: int = 0
    ends: float = 0.0
    waited: bool = False
    spare: bool = False

    def __bool__(self) -> bool:
        return bool(self.batch or self.expired)


class Scheduler(Generic[R]):
    """The queue between the event loop and the device's threads."""

    def __init__(self, settings: EngineSettings) -> None:
        self._settings = settings
        self._pace = Pace(settings.lanes)
        self._flows: Flows[QueuedEntry[R]] = Flows()
        self._waiting_entries = 0
        self._queued_tokens = 0
        # Of those, how many are bulk; and when a request last came that is not.
        self._bulk_tokens = 0
        self._asked_at = float("-inf")
        # Batches on the device, the oldest first, and when each of them should be done.
        self._running: dict[Selection[R], None] = {}
        self._spare: deque[QueuedEntry[R]] = deque()
        self._spare_tokens = 0
        self._spare_runs = False
        self._idle_since: float | None = None
        self._limit = settings.max_waiting_tokens or self._bound(0.0)
        self._batch_limit = self._bulk_limit = settings.max_batch_tokens
        # Of a full batch; of the whole device in full batches; when the last batch should be done.
        self._full_seconds = self._seconds_per_token = self._busy_until = 0.0
        self._shortest = 3600.0
        # How much later than promised requests were answered: mean, and mean deviation from it.
        self._late = self._late_deviation = 0.0
        self._lock = Condition()
        self._idle_threads = 0
        self._closed = False

    def __len__(self) -> int:
        return self._waiting_entries

    @property
    def waiting_tokens(self) -> int:
        """Tokens admitted and neither taken by a batch nor withdrawn."""
        return self._flows.root.tokens

    @property
    def limit(self) -> int:
        """Tokens that may wait, at present."""
        return self._limit

    @property
    def full(self) -> bool:
        """Whether the queue fills a batch, so that waiting would not make it larger."""
        return self._queued_tokens >= _FULL_SHARE * self._settings.max_batch_tokens

    def admit(
        self,
        entries: Sequence[Entry],
        *,
        now: float,
        deadline: float | None = None,
        client: str = "",
        weight: float = 1.0,
        bulk: bool = False,
    ) -> Ticket[R]:
        """Reserve room for all entries of a request, before they are enqueued.

        Raises:
            TooLarge: it would not fit even if nothing waited.
            Overloaded: it does not fit now, or would be done too late; says when to come back.
            DeadlineExceeded: it would be done too late even if nothing waited.
        """
        adapters = {entry.adapter.name for entry in entries}
        tokens = sum([entry.cost for entry in entries])
        timeout = None if deadline is None else deadline - now
        key, adapter_weight = self._flow_of(client, adapters, timeout, bulk=bulk)
        if bulk:
            weight *= BULK_WEIGHT
        promised = None
        with self._lock:
            if not bulk:
                self._asked_at = now
                if timeout is not None:
                    self._note_timeout(timeout)
            if not self._is_easy(now, tokens, deadline):
                ahead = self._find_room(key, weight, adapter_weight, tokens)
                promised = self._promise(now, ahead, tokens, deadline)
            flow = self._flows.reserve(key, weight, adapter_weight, tokens)
        return Ticket(now, deadline, promised, flow, tokens, bulk)

    def foresee(
        self, adapters: Sequence[str], *, timeout: float, client: str = "", weight: float = 1.0
    ) -> None:
        """Refuse now what `admit` would refuse even if it had a single token for each adapter.

        Raises:
            Overloaded: as `admit`.
        """
        now = monotonic()
        if self._is_easy(now, len(adapters), now + timeout):
            return
        key, adapter_weight = self._flow_of(client, adapters, timeout)
        with self._lock:
            self._note_timeout(timeout)
            ahead = self._find_room(key, weight, adapter_weight, len(adapters))
            try:
                self._promise(now, ahead, len(adapters), now + timeout)
            except DeadlineExceeded:
                # Left to `admit`, which knows what the request takes.
                return

    def load(self, now: float) -> Load:
        """What another process needs to refuse as `foresee` does."""
        with self._lock:
            full = self.waiting_tokens >= self._limit
            # The busiest flows; what is not among them is taken for a flow without a backlog.
            waits = {}
            some = islice(self._flows.leaves(), _MAX_SEEN_FLOWS)
            for key, leaf in nlargest(_MAX_FLOWS, some, key=lambda item: item[1].tokens):
                weights = _weights(leaf)
                position = self._flows.position(key, *weights, 1)
                barred = full and position.held + 1 > position.share * self._limit
                waits[key] = (self._finish(now, position.ahead) - now, barred)
            return Load(
                at=now,
                limit=self._limit,
                rate=self._rate(),
                correction=self._correction,
                waits=waits,
                otherwise=self._finish(now, 1) - now,
            )

    def pace(self, now: float) -> tuple[float, float]:
        """Tokens per second of the device, and in how many seconds a further text would be done
        that comes after all that waits."""
        with self._lock:
            return self._rate(), self._finish(now, self.waiting_tokens + 1) - now

    def withdraw(self, ticket: Ticket[R]) -> int:
        """Give back the room of a request, queued or not; returns how many entries waited."""
        with self._lock:
            if not ticket.queued:
                self._flows.release(ticket.flow, ticket.left)
                ticket.left = 0
                return 0
            return len(self._remove(ticket))

    def enqueue(self, ticket: Ticket[R], entries: Sequence[QueuedEntry[R]]) -> None:
        """Queue the entries of an admitted request. An idle device sees them after `wake`."""
        with self._lock:
            ticket.queued = entries
            for queued in entries:
                queued.waits = True
            self._flows.add(ticket.flow, entries)
            self._waiting_entries += len(entries)
            self._queued_tokens += ticket.left
            self._bulk_tokens += ticket.left if ticket.bulk else 0

    def offer_spare(self, entries: Sequence[QueuedEntry[R]]) -> bool:
        """Queue spare entries; False, and nothing is queued, if too many wait or it is closed."""
        tokens = sum([queued.entry.cost for queued in entries])
        with self._lock:
            # Any request fits into an empty queue.
            full = self._spare_tokens + tokens > self._settings.max_batch_tokens
            if self._closed or (self._spare and full):
                return False
            self._spare += entries
            self._spare_tokens += tokens
            self._lock.notify()
            return True

    def withdraw_spare(self) -> list[QueuedEntry[R]]:
        """Take all spare entries back that no batch has taken."""
        with self._lock:
            withdrawn = list(self._spare)
            self._spare.clear()
            self._spare_tokens = 0
            return withdrawn

    def wake(self) -> None:
        """Wake an idle device."""
        with self._lock:
            self._lock.notify()

    def take(self) -> Selection[R] | None:
        """Wait for entries and take the next batch; None once the scheduler is closed."""
        waited = False
        with self._lock:
            while not self._closed:
                selection = self.next_batch(monotonic(), shares=1 + self._idle_threads)
                if selection or (selection := self.spare_batch()):
                    selection.waited = waited
                    if self._waiting_entries:
                        self._lock.notify()
                    return selection
                waited = True
                self._idle_threads += 1
                self._lock.wait()
                self._idle_threads -= 1
        return None

    def take_full(self, patience: float) -> Selection[R] | None:
        """Take a full batch for a device that is still busy; None if there is none.

        Waits at most `patience` seconds, and returns early when any entry arrives.
        """
        with self._lock:
            if patience and not self._closed and not self.full:
                self._lock.wait(patience)
            if self._closed or not self.full:
                return None
            return self.next_batch(monotonic())

    def next_batch(self, now: float, *, shares: int = 1) -> Selection[R]:
        """Remove the entries that run next from the queue, and those that cannot be done in time.

        The caller holds the lock (`take`, `take_full`) or shares the scheduler with no thread.

        Args:
            shares: how many threads take a batch now; each gets its share of the queue.
        """
        selection: Selection[R] = Selection()
        trust = self._trust(now)
        begins = self._free(now) if self._settings.lanes == 1 else now
        planned = min(self._batch_limit, -(-self._queued_tokens // shares))
        # Entries must be in time even if the batch takes longer than expected.
        trust *= 1 + _BATCH_DEVIATIONS * self._pace.deviation
        ends = begins + trust * self._pace.seconds(planned)
        alone = now - self._asked_at > _ALONE_SECONDS
        bulk_limit = planned if alone else min(planned, self._bulk_limit)
        at_once = bulk_limit if self._bulk_tokens else planned
        if self._queued_tokens <= at_once and self._take_all(selection, ends):
            return self._launched(selection, begins)
        adapters: set[AdapterKey] = set()
        aside: list[Node[QueuedEntry[R]]] = []
        passed_over: list[QueuedEntry[R]] = []
        overtaken = 0
        while selection.tokens < planned and (leaf := self._flows.first()) is not None:
            if self._flows.is_alone(leaf) and self._take_run(
                leaf, planned, ends, selection, adapters
            ):
                overtaken = len(passed_over)
                continue
            queued = next(iter(leaf.entries))
            ticket = queued.ticket
            if ticket.deadline is not None and (ticket.deadline <= ends or ticket.left > planned):
                room = self._room(queued, begins, trust, selection.tokens, planned)
                if room == 0:
                    selection.expired += self._remove(ticket)
                    continue
                if room < planned:
                    planned = room
                    ends = begins + trust * self._pace.seconds(planned)
            most = planned
            if ticket.bulk:
                most = min(planned, bulk_limit)
                if selection.batch and selection.tokens + queued.entry.cost > most:
                    # Its turn is not lost: it will be among the first of the next batch.
                    self._flows.set_aside(leaf)
                    aside.append(leaf)
                    continue
            fitting = self._fitting(leaf, most, selection, adapters, passed_over)
            if fitting is None:
                if queued.overtaken >= MAX_OVERTAKEN or len(passed_over) >= MAX_PASSED_OVER:
                    break
                self._flows.set_aside(leaf)
                aside.append(leaf)
                continue
            self._flows.serve(leaf, fitting, fitting.entry.cost)
            self._left(fitting, fitting.entry.cost)
            selection.batch.append(fitting)
            selection.tokens += fitting.entry.cost
            adapters.add(fitting.entry.adapter)
            overtaken = len(passed_over)
        self._flows.restore(aside)
        for queued in dict.fromkeys(passed_over[:overtaken]):
            queued.overtaken += 1
        selection.adapters = len(adapters)
        return self._launched(selection, begins)

    def spare_batch(self) -> Selection[R]:
        """Remove a few spare entries from their queue, if nothing else runs or waits.

        The caller is that of `next_batch`, which has just found nothing.
        """
        selection: Selection[R] = Selection(spare=True)
        if not self._spare or self._running or self._spare_runs or self._waiting_entries:
            return selection
        most = self._pace.tokens_within(SPARE_SECONDS, self._settings.max_batch_tokens)
        adapters: set[AdapterKey] = set()
        while self._spare:
            entry = self._spare[0].entry
            adapters.add(entry.adapter)
            fits = selection.tokens + entry.cost <= most
            if selection.batch and not (
                fits and len(adapters) <= self._settings.max_active_adapters
            ):
                break
            selection.batch.append(self._spare.popleft())
            selection.tokens += entry.cost
        self._spare_tokens -= selection.tokens
        self._spare_runs = True
        return selection

    def _launched(self, selection: Selection[R], begins: float) -> Selection[R]:
        if selection.batch:
            selection.ends = begins + self._pace.seconds(selection.tokens)
            self._busy_until = max(self._busy_until, selection.ends)
            self._running[selection] = None
        return selection

    def _take_all(self, selection: Selection[R], ends: float) -> bool:
        """Take all that waits, if one batch holds it and is in time for all; mostly it is.

        The order in which flows are served does not matter then, and costs nothing.
        """
        adapters: set[AdapterKey] = set()
        for leaf in self._flows.queued():
            for queued in leaf.entries:
                deadline = queued.ticket.deadline
                if deadline is not None and deadline <= ends:
                    return False
                adapters.add(queued.entry.adapter)
        if len(adapters) > self._settings.max_active_adapters:
            return False
        selection.adapters = len(adapters)
        for leaf, entries in self._flows.drain():
            taken = 0
            for queued in entries:
                cost = queued.entry.cost
                queued.waits = False
                queued.ticket.left -= cost
                taken += cost
            self._flows.release(leaf, taken)
            selection.batch += entries
            selection.tokens += taken
        self._queued_tokens -= selection.tokens
        # All that waits is taken.
        self._bulk_tokens = 0
        self._waiting_entries -= len(selection.batch)
        return True

    def _take_run(
        self,
        leaf: Node[QueuedEntry[R]],
        planned: int,
        ends: float,
        selection: Selection[R],
        adapters: set[AdapterKey],
    ) -> bool:
        """Take the first entries of the only flow that waits, as long as they fit and are in time
        without a closer look; returns whether there were any.

        This is several times as fast as entry by entry. Requests that name several adapters are
        one flow.
        """
        taken: list[QueuedEntry[R]] = []
        tokens, most = selection.tokens, self._settings.max_active_adapters
        # The tokens before those of the present ticket.
        ticket, before = None, tokens
        for queued in leaf.entries:
            if queued.ticket is not ticket:
                if ticket is not None:
                    ticket.left -= tokens - before
                ticket, before = queued.ticket, tokens
                if ticket.bulk or (
                    ticket.deadline is not None
                    and (ticket.deadline <= ends or ticket.left > planned)
                ):
                    break
            entry = queued.entry
            if tokens + entry.cost > planned:
                break
            if entry.adapter not in adapters:
                if len(adapters) >= most:
                    break
                adapters.add(entry.adapter)
            queued.waits = False
            taken.append(queued)
            tokens += entry.cost
        if not taken:
            return False
        if ticket is not None:
            ticket.left -= tokens - before
        cost = tokens - selection.tokens
        self._flows.serve_alone(leaf, taken, cost, taken[-1].entry.cost)
        self._queued_tokens -= cost
        self._waiting_entries -= len(taken)
        selection.batch += taken
        selection.tokens = tokens
        return True

    def measured(self, tokens: int, seconds: float) -> None:
        """Note what a batch of the warm-up took: all that is known before the first request."""
        with self._lock:
            self._pace.record(tokens, seconds)
            self._adjust()

    def record_batch(self, selection: Selection[R], seconds: float, now: float) -> None:
        """Note that a batch has ended. seconds: what the lane took for it."""
        with self._lock:
            if selection.spare:
                self._spare_runs = False
                return
            self._running.pop(selection, None)
            if not self._running:
                self._idle_since = now
            self._pace.record(selection.tokens, seconds)
            self._adjust()

    def postpone(self, ticket: Ticket[R], seconds: float) -> None:
        """Move a promise: the request has waited for its adapters, not for the device."""
        if ticket.promised is not None:
            ticket.promised += seconds

    def record_answer(self, ticket: Ticket[R], now: float) -> None:
        """Note when a request's answer was ready."""
        if ticket.promised is not None:
            # Only the event loop calls this, and a promise may miss the last correction.
            error = now - ticket.promised
            self._late += _LEARNING * (error - self._late)
            self._late_deviation += _LEARNING * (abs(error - self._late) - self._late_deviation)

    def close(self) -> None:
        """Make every `take` return None from now on."""
        with self._lock:
            self._closed = True
            self._lock.notify_all()

    # Admission.

    def _is_easy(self, now: float, tokens: int, deadline: float | None) -> bool:
        """Whether a request surely fits and is done in time: mostly so, and told in no time."""
        waiting = self.waiting_tokens + tokens
        if waiting > self._limit:
            return False
        if deadline is None:
            return True
        rest = max(0.0, self._busy_until - now) + self._full_seconds
        return now + _EASY * (rest + waiting * self._seconds_per_token) < deadline

    def _find_room(
        self, key: FlowKey, client_weight: float, adapter_weight: float, tokens: int
    ) -> float:
        """The tokens that the device runs until the request is done.

        Raises:
            TooLarge, Overloaded: as `admit`, for want of room.
        """
        limit, excess = self._limit, self.waiting_tokens + tokens - self._limit
        if self._settings.max_waiting_tokens is not None and tokens > limit:
            raise TooLarge(f"the request takes {tokens} tokens, at most {limit} may wait")
        position = self._flows.position(key, client_weight, adapter_weight, tokens)
        alone = position.share == 1.0
        # Where the bound is not set, a request that is larger than it can still be served.
        first = position.held == 0 and self._settings.max_waiting_tokens is None
        within_share = first or position.held + tokens <= position.share * limit
        if excess > 0 and not within_share and self.waiting_tokens:
            reason: OverloadReason = "queue" if alone else "share"
            whose = "" if alone else ", more than this flow's share"
            raise Overloaded(
                f"{self.waiting_tokens} of {limit} tokens wait{whose}, the request takes {tokens}",
                retry_after=self._seconds_for(excess),
                reason=reason,
            )
        return max(position.ahead, tokens)

    def _promise(
        self, now: float, ahead: float, tokens: int, deadline: float | None
    ) -> float | None:
        """When a request will be done that has this much ahead of it, itself included.

        Raises:
            Overloaded: after its deadline. DeadlineExceeded: even if nothing waited.
        """
        if not self._pace.measured:
            return None
        promised = self._finish(now, ahead)
        if deadline is None:
            return promised
        timeout = deadline - now
        late = promised + min(self._correction, MAX_CORRECTION * timeout) - deadline
        if late <= 0:
            return promised
        alone = self._trust(now) * self._seconds_alone(tokens)
        if alone > timeout:
            raise DeadlineExceeded(
                f"the request takes {alone:.2g} s, its deadline is in {max(0.0, timeout):.2g} s"
            )
        if not self._running and not self.waiting_tokens:
            return promised
        raise Overloaded(
            f"it would be answered in {promised - now:.2g} s, its deadline is in {timeout:.2g} s",
            retry_after=late,
            reason="deadline",
        )

    def _finish(self, now: float, ahead: float) -> float:
        """When the device has run this many tokens, the last of them in a batch with others."""
        limit = self._batch_limit
        batches = max(0, -(-int(ahead) // limit) - 1)
        trust, free = self._trust(now), self._free(now)
        between = batches * self._pace.seconds(limit) / self._settings.lanes
        return free + trust * (between + self._pace.seconds(min(ahead, limit)))

    def _seconds_alone(self, tokens: int) -> float:
        """What a request takes while nothing else is there."""
        limit = self._settings.max_batch_tokens
        batches = max(0, -(-tokens // limit) - 1) // self._settings.lanes
        return batches * self._pace.seconds(limit) + self._pace.seconds(
            min(limit, -(-tokens // self._settings.lanes))
        )

    def _free(self, now: float) -> float:
        """When the next batch can begin."""
        if len(self._running) < self._settings.lanes:
            return now
        ends = [selection.ends for selection in self._running]
        # A single lane has batches that were launched ahead: they follow each other.
        return max(now, max(ends) if self._settings.lanes == 1 else min(ends))

    @property
    def _correction(self) -> float:
        return max(0.0, self._late + _DEVIATIONS * self._late_deviation)

    def _trust(self, now: float) -> float:
        if self._running or self._idle_since is None:
            return 1.0
        idle = now - self._idle_since - _TRUSTED_SECONDS
        return float(0.5 ** min(max(0.0, idle), _HALVINGS))

    def _note_timeout(self, timeout: float) -> None:
        if timeout >= _AS_SHORT * self._shortest:
            self._shortest += _FORGET_SHORTEST * (min(timeout, 60.0) - self._shortest)
        elif timeout >= self._pace.seconds(self._settings.max_batch_tokens * _SMALLEST_LIMIT):
            # A timeout that no batch can keep must not make the batches small.
            self._shortest = timeout
            self._adjust()

    def _adjust(self) -> None:
        """After a new measurement: what may wait, and the tokens of a batch."""
        if self._settings.max_waiting_tokens is None:
            self._limit = self._bound(self._rate())
        most, seconds = self._settings.max_batch_tokens, _TIMEOUT_SHARE * self._shortest
        self._batch_limit = most
        self._bulk_limit = self._pace.least_efficient(_BULK_EFFICIENT, most)
        self._full_seconds = self._pace.seconds(most)
        self._seconds_per_token = self._full_seconds / most / self._settings.lanes
        if self._full_seconds > seconds:
            less = max(self._pace.tokens_within(seconds, most), int(_SMALLEST_LIMIT * most), 1)
            if self._pace.rate(less) >= _EFFICIENT * self._rate():
                self._batch_limit = less

    def _bound(self, rate: float) -> int:
        """`max_waiting_tokens` where it is not set."""
        batches = self._settings.lanes * self._settings.max_batch_tokens
        return max(batches, int(WAITING_SECONDS * rate)) if rate else 4 * batches

    def _rate(self) -> float:
        return self._pace.rate(self._settings.max_batch_tokens)

    def _seconds_for(self, tokens: int) -> float:
        rate = self._rate()
        return tokens / rate if rate else _RETRY_SECONDS_UNMEASURED

    def _flow_of(
        self,
        client: str,
        adapters: Collection[str],
        timeout: float | None,
        *,
        bulk: bool = False,
    ) -> tuple[FlowKey, float]:
        """The flow of a request, and its weight within the client: that of all its adapters."""
        weights = self._settings.adapter_weights
        weight = sum([weights.get(name, 1.0) for name in adapters]) if weights else len(adapters)
        return flow_of(client, adapters, timeout, bulk=bulk), float(weight or 1.0)

    # Batches.

    def _room(
        self, queued: QueuedEntry[R], begins: float, trust: float, taken: int, planned: int
    ) -> int:
        """The tokens that a batch may have for this entry to be done in time; 0 if none will do."""
        ticket, cost = queued.ticket, queued.entry.cost
        assert ticket.deadline is not None
        seconds = (ticket.deadline - begins) / trust
        if seconds <= 0 or self._pace.seconds(cost) > seconds:
            return 0
        if ticket.left > planned and self._seconds_alone(ticket.left) > seconds:
            return 0
        if self._pace.seconds(planned) <= seconds:
            return planned
        # A smaller batch is done sooner. But a few late entries must not make all batches small.
        room = self._pace.tokens_within(seconds, planned)
        least = min(planned, int(_SMALLEST_LIMIT * self._settings.max_batch_tokens))
        return room if room >= max(taken + cost, least) else 0

    def _fitting(
        self,
        leaf: Node[QueuedEntry[R]],
        planned: int,
        selection: Selection[R],
        adapters: set[AdapterKey],
        passed_over: list[QueuedEntry[R]],
    ) -> QueuedEntry[R] | None:
        """The first entry of a leaf that fits into the rest of the batch."""
        left = planned - selection.tokens
        for queued in islice(leaf.entries, MAX_PASSED_OVER):
            # An entry over the whole budget runs alone.
            fits = queued.entry.cost <= left or not selection.batch
            known = queued.entry.adapter in adapters
            if fits and (known or len(adapters) < self._settings.max_active_adapters):
                return queued
            passed_over.append(queued)
            if queued.overtaken >= MAX_OVERTAKEN or len(passed_over) >= MAX_PASSED_OVER:
                break
        return None

    def _remove(self, ticket: Ticket[R]) -> list[QueuedEntry[R]]:
        """Take all waiting entries of a request out of the queue."""
        removed = [queued for queued in ticket.queued if queued.waits]
        for queued in removed:
            self._flows.remove(ticket.flow, queued, queued.entry.cost)
            self._left(queued, queued.entry.cost)
        return removed

    def _left(self, queued: QueuedEntry[R], cost: int) -> None:
        queued.waits = False
        queued.ticket.left -= cost
        self._queued_tokens -= cost
        self._bulk_tokens -= cost if queued.ticket.bulk else 0
        self._waiting_entries -= 1


def _weights(leaf: Node[QueuedEntry[R]]) -> tuple[float, float]:
    adapter = leaf.parent
    assert adapter is not None
    assert adapter.parent is not None
    return adapter.parent.weight, adapter.weight
