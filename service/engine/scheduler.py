"""Which entries run next, and whether new ones are let in. Knows no tensors, no threads, no clock.

There is no timer: a batch is what waits when the device becomes free. Entries leave in the order
in which they came, as many as the token budget takes. One that does not fit may be overtaken by
later ones that do, in a bounded number of batches; then nothing passes it any more. The oldest
entry is in every batch, so nobody starves.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from service.engine.interface import AdapterKey, Entry
from service.errors import Overloaded, TooLarge

# An entry is overtaken in so many batches at most.
MAX_OVERTAKEN = 4
# Entries passed over while one batch is filled: bounds the work when thousands wait.
MAX_PASSED_OVER = 64

# Entries are whole: this share of the token budget is as full as a batch surely gets.
_FULL = 0.9

# One batch's weight in the drain rate is halved after about three further batches.
_FORGET = 0.8
_RETRY_UNMEASURED = 1.0

R = TypeVar("R")


@dataclass(slots=True, eq=False)
class Waiting(Generic[R]):
    """An entry in the queue, compared by identity: equal texts are not one entry.

    request: whose entry it is, and `index` its place there; the scheduler looks at neither.
    since, deadline: seconds on one clock. overtaken: batches that took a later entry instead.
    """

    entry: Entry
    request: R
    index: int
    since: float
    deadline: float | None = None
    overtaken: int = 0


@dataclass(frozen=True, slots=True)
class Selection(Generic[R]):
    """What leaves the queue. batch: to be run, in order. expired: to be failed, being too late."""

    batch: list[Waiting[R]] = field(default_factory=list)
    expired: list[Waiting[R]] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.batch or self.expired)


class Scheduler(Generic[R]):
    """The queue. Not thread-safe: its owner locks.

    Args:
        max_batch_tokens: budget of a batch; a single entry over it runs alone.
        max_waiting_tokens: what may be admitted and not yet taken.
        max_adapters: distinct adapters in a batch.
    """

    def __init__(
        self, *, max_batch_tokens: int, max_waiting_tokens: int, max_adapters: int
    ) -> None:
        self._max_batch_tokens = max_batch_tokens
        self._max_waiting_tokens = max_waiting_tokens
        self._max_adapters = max_adapters
        # A dict keeps the order of arrival and forgets any entry at once.
        self._queue: dict[Waiting[R], None] = {}
        self._admitted = 0
        self._queued_tokens = 0
        self._drained_tokens = 0.0
        self._drained_seconds = 0.0

    def __len__(self) -> int:
        return len(self._queue)

    @property
    def waiting_tokens(self) -> int:
        """Tokens admitted and neither taken by a batch nor given up."""
        return self._admitted

    @property
    def full(self) -> bool:
        """Whether what is queued all but fills a batch: waiting would not make it a larger one."""
        return self._queued_tokens >= _FULL * self._max_batch_tokens

    def admit(self, tokens: int) -> None:
        """Reserve room for all of a request's entries, before they are enqueued.

        Raises:
            TooLarge: it would not even fit if nothing waited.
            Overloaded: it does not fit now; says when it would at the measured rate.
        """
        if tokens > self._max_waiting_tokens:
            raise TooLarge(
                f"the request takes {tokens} tokens, at most {self._max_waiting_tokens} may wait"
            )
        excess = self._admitted + tokens - self._max_waiting_tokens
        if excess > 0:
            raise Overloaded(
                f"{self._admitted} of {self._max_waiting_tokens} tokens wait, "
                f"the request takes {tokens}",
                retry_after=self._seconds_for(excess),
            )
        self._admitted += tokens

    def withdraw(self, tokens: int) -> None:
        """Give back room that was admitted and will not be enqueued."""
        self._admitted -= tokens
        assert self._admitted >= 0

    def enqueue(self, entries: Iterable[Waiting[R]]) -> None:
        """Queue entries whose tokens were admitted."""
        for waiting in entries:
            self._queue[waiting] = None
            self._queued_tokens += waiting.entry.cost

    def drop(self, entries: Iterable[Waiting[R]]) -> int:
        """Forget those that still wait; returns how many those were."""
        dropped = [waiting for waiting in entries if waiting in self._queue]
        self._remove(dropped)
        return len(dropped)

    def next_batch(self, now: float, *, shares: int = 1) -> Selection[R]:
        """Take what runs next out of the queue, and what expired on the way there.

        Args:
            shares: so many take now; each gets its share of what waits.
        """
        selection: Selection[R] = Selection()
        left = min(self._max_batch_tokens, -(-self._queued_tokens // shares))
        adapters: set[AdapterKey] = set()
        passed_over: list[Waiting[R]] = []
        overtaken = 0
        for waiting in self._queue:
            if waiting.deadline is not None and waiting.deadline <= now:
                selection.expired.append(waiting)
                continue
            cost, adapter = waiting.entry.cost, waiting.entry.adapter
            fits = cost <= left or not selection.batch
            if fits and (adapter in adapters or len(adapters) < self._max_adapters):
                selection.batch.append(waiting)
                adapters.add(adapter)
                left -= cost
                overtaken = len(passed_over)
                if left <= 0:
                    break
                continue
            passed_over.append(waiting)
            if waiting.overtaken >= MAX_OVERTAKEN or len(passed_over) == MAX_PASSED_OVER:
                break
        for waiting in passed_over[:overtaken]:
            waiting.overtaken += 1
        self._remove(selection.batch)
        self._remove(selection.expired)
        return selection

    def drained(self, tokens: int, seconds: float) -> None:
        """Note that a batch of so many tokens took so long."""
        self._drained_tokens = _FORGET * self._drained_tokens + tokens
        self._drained_seconds = _FORGET * self._drained_seconds + seconds

    def _seconds_for(self, tokens: int) -> float:
        if self._drained_tokens <= 0:
            return _RETRY_UNMEASURED
        return tokens * self._drained_seconds / self._drained_tokens

    def _remove(self, entries: Sequence[Waiting[R]]) -> None:
        for waiting in entries:
            del self._queue[waiting]
            self._admitted -= waiting.entry.cost
            self._queued_tokens -= waiting.entry.cost
