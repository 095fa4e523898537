"""The scheduler between two threads: the event loop fills it, the device thread empties it."""

from threading import Condition
from time import monotonic

from service.engine.requests import Request
from service.engine.scheduler import Scheduler, Selection, Waiting
from service.engine.settings import EngineSettings


class EntryQueue:
    """A scheduler that the event loop fills and the device thread empties."""

    def __init__(self, settings: EngineSettings) -> None:
        self._changed = Condition()
        self._closed = False
        # Lanes that wait for something to take.
        self._idle = 0
        self._scheduler: Scheduler[Request] = Scheduler(
            max_batch_tokens=settings.max_batch_tokens,
            max_waiting_tokens=settings.max_waiting_tokens,
            max_adapters=settings.max_active_adapters,
        )

    @property
    def tokens(self) -> int:
        """Tokens admitted and not yet taken."""
        return self._scheduler.waiting_tokens

    def __len__(self) -> int:
        return len(self._scheduler)

    def admit(self, request: Request) -> None:
        """Reserve room for all entries of a request.

        Raises:
            TooLarge, Overloaded: as `Scheduler.admit`.
        """
        with self._changed:
            self._scheduler.admit(request.tokens)

    def put(self, request: Request) -> None:
        """Queue the entries of an admitted request; a device that idles sees them after `wake`."""
        request.waiting = [
            Waiting(entry, request, index, request.admitted, request.deadline)
            for index, entry in enumerate(request.entries)
        ]
        with self._changed:
            self._scheduler.enqueue(request.waiting)

    def wake(self) -> None:
        """Tell a device that idles that there is something to take."""
        with self._changed:
            self._changed.notify()

    def remove(self, request: Request) -> int:
        """Take back whatever no batch has taken, queued or not; returns how many entries."""
        with self._changed:
            if request.waiting:
                return self._scheduler.drop(request.waiting)
            self._scheduler.withdraw(request.tokens)
            return len(request.entries)

    def take(self) -> Selection[Request] | None:
        """What runs next, once anything waits; None once the queue is closed."""
        with self._changed:
            while not self._closed:
                selection = self._scheduler.next_batch(monotonic(), shares=1 + self._idle)
                if selection:
                    if len(self._scheduler):
                        self._changed.notify()
                    return selection
                self._idle += 1
                self._changed.wait()
                self._idle -= 1
        return None

    def take_full(self, patience: float) -> Selection[Request] | None:
        """A whole batch for a device that is still busy, if one waits or does within so many
        seconds; else None, at the latest when something else has come."""
        with self._changed:
            if patience and not self._closed and not self._scheduler.full:
                self._changed.wait(patience)
            if self._closed or not self._scheduler.full:
                return None
            return self._scheduler.next_batch(monotonic())

    def drained(self, tokens: int, seconds: float) -> None:
        """Note how long a batch took: refusals name a time to come back."""
        with self._changed:
            self._scheduler.drained(tokens, seconds)

    def close(self) -> None:
        """End `take`, now and for ever."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
