"""Admits requests and decides which entries run next.

There is no timer: when the device becomes free, whatever waits forms the next batch. Entries leave
in order of arrival, as many as the token budget holds. One that does not fit may be overtaken by
later entries that do, in a bounded number of batches; after that nothing passes it. The oldest
entry is in every batch, so none starves.

The event loop fills the queue and the device's threads empty it, so one lock guards it here.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from threading import Condition
from time import monotonic
from typing import Generic, TypeVar

from service.engine.interface import AdapterKey, Entry
from service.engine.settings import EngineSettings
from service.errors import Overloaded, TooLarge

# An entry is overtaken in at most this many batches.
MAX_OVERTAKEN = 4
# Entries passed over while one batch is filled: bounds the work when thousands wait.
MAX_PASSED_OVER = 64

# Entries cannot be split, so a batch that fills this share of the budget counts as full.
_FULL_SHARE = 0.9

# The weight of a batch in the measured rate halves after about three further batches.
_DECAY = 0.8
_RETRY_SECONDS_UNMEASURED = 1.0

R = TypeVar("R")


@dataclass(slots=True, eq=False)
class QueuedEntry(Generic[R]):
    """An entry in the queue. Compared by identity: two equal texts are two entries.

    request: the request it belongs to; index: its position there. The scheduler uses neither.
    since, deadline: when it was admitted and when it expires, in seconds of one clock.
    overtaken: batches that took a later entry instead.
    """

    entry: Entry
    request: R
    index: int
    since: float
    deadline: float | None = None
    overtaken: int = 0


@dataclass(frozen=True, slots=True)
class Selection(Generic[R]):
    """What leaves the queue. batch: entries to run, in order. expired: entries past their
    deadline."""

    batch: list[QueuedEntry[R]] = field(default_factory=list)
    expired: list[QueuedEntry[R]] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.batch or self.expired)


class Scheduler(Generic[R]):
    """The queue between the event loop and the device's threads."""

    def __init__(self, settings: EngineSettings) -> None:
        self._settings = settings
        # A dict keeps the order of arrival and removes any entry at once.
        self._waiting: dict[QueuedEntry[R], None] = {}
        self._admitted_tokens = 0
        self._queued_tokens = 0
        # Tokens and seconds of recent batches, each batch weighing less as others follow.
        self._recent_tokens = 0.0
        self._recent_seconds = 0.0
        self._lock = Condition()
        self._idle_threads = 0
        self._closed = False

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def waiting_tokens(self) -> int:
        """Tokens admitted and neither taken by a batch nor withdrawn."""
        return self._admitted_tokens

    @property
    def full(self) -> bool:
        """Whether the queue fills a batch, so that waiting would not make it larger."""
        return self._queued_tokens >= _FULL_SHARE * self._settings.max_batch_tokens

    def admit(self, tokens: int) -> None:
        """Reserve room for all entries of a request, before they are enqueued.

        Raises:
            TooLarge: it would not fit even if nothing waited.
            Overloaded: it does not fit now; says when it would at the measured rate.
        """
        limit = self._settings.max_waiting_tokens
        if tokens > limit:
            raise TooLarge(f"the request takes {tokens} tokens, at most {limit} may wait")
        with self._lock:
            excess = self._admitted_tokens + tokens - limit
            if excess > 0:
                raise Overloaded(
                    f"{self._admitted_tokens} of {limit} tokens wait, the request takes {tokens}",
                    retry_after=self._seconds_for(excess),
                )
            self._admitted_tokens += tokens

    def withdraw(self, tokens: int) -> None:
        """Give back room that was admitted and will not be enqueued."""
        with self._lock:
            self._admitted_tokens -= tokens
            assert self._admitted_tokens >= 0

    def enqueue(self, entries: Iterable[QueuedEntry[R]]) -> None:
        """Queue entries whose tokens were admitted. An idle device sees them after `wake`."""
        with self._lock:
            for queued in entries:
                self._waiting[queued] = None
                self._queued_tokens += queued.entry.cost

    def wake(self) -> None:
        """Wake an idle device."""
        with self._lock:
            self._lock.notify()

    def drop(self, entries: Iterable[QueuedEntry[R]]) -> int:
        """Remove those entries that still wait; returns how many did."""
        with self._lock:
            dropped = [queued for queued in entries if queued in self._waiting]
            self._remove(dropped)
        return len(dropped)

    def take(self) -> Selection[R] | None:
        """Wait for entries and take the next batch; None once the scheduler is closed."""
        with self._lock:
            while not self._closed:
                selection = self.next_batch(monotonic(), shares=1 + self._idle_threads)
                if selection:
                    if self._waiting:
                        self._lock.notify()
                    return selection
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
        """Remove the entries that run next from the queue, and those found expired on the way.

        The caller holds the lock (`take`, `take_full`) or shares the scheduler with no thread.

        Args:
            shares: how many threads take a batch now; each gets its share of the queue.
        """
        selection: Selection[R] = Selection()
        left = min(self._settings.max_batch_tokens, -(-self._queued_tokens // shares))
        max_adapters = self._settings.max_active_adapters
        adapters: set[AdapterKey] = set()
        passed_over: list[QueuedEntry[R]] = []
        overtaken = 0
        for queued in self._waiting:
            if queued.deadline is not None and queued.deadline <= now:
                selection.expired.append(queued)
                continue
            cost, adapter = queued.entry.cost, queued.entry.adapter
            # An entry over the whole budget runs alone.
            fits = cost <= left or not selection.batch
            if fits and (adapter in adapters or len(adapters) < max_adapters):
                selection.batch.append(queued)
                adapters.add(adapter)
                left -= cost
                overtaken = len(passed_over)
                if left <= 0:
                    break
                continue
            passed_over.append(queued)
            if queued.overtaken >= MAX_OVERTAKEN or len(passed_over) == MAX_PASSED_OVER:
                break
        for queued in passed_over[:overtaken]:
            queued.overtaken += 1
        self._remove(selection.batch)
        self._remove(selection.expired)
        return selection

    def record_batch(self, tokens: int, seconds: float) -> None:
        """Note how long a batch took; refusals derive their `retry_after` from it."""
        with self._lock:
            self._recent_tokens = _DECAY * self._recent_tokens + tokens
            self._recent_seconds = _DECAY * self._recent_seconds + seconds

    def close(self) -> None:
        """Make every `take` return None from now on."""
        with self._lock:
            self._closed = True
            self._lock.notify_all()

    def _seconds_for(self, tokens: int) -> float:
        if self._recent_tokens <= 0:
            return _RETRY_SECONDS_UNMEASURED
        return tokens * self._recent_seconds / self._recent_tokens

    def _remove(self, entries: Sequence[QueuedEntry[R]]) -> None:
        for queued in entries:
            del self._waiting[queued]
            self._admitted_tokens -= queued.entry.cost
            self._queued_tokens -= queued.entry.cost
