"""Records that must not delay a request: a bounded queue and a thread that writes it."""

import logging
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from time import monotonic
from typing import Generic, TypeVar

from service.records.line_file import LineFile

logger = logging.getLogger(__name__)

T = TypeVar("T")

# How long what was offered may wait, to be written together.
_GATHER_SECONDS = 0.2
_CLEANING_SECONDS = 3600.0
_WARNING_SECONDS = 60.0


class BackgroundLines(Generic[T]):
    """Appends lines to a file in a thread of its own, which starts with the first of them, or by
    `start`. It also removes what is too old, every hour.

    What does not fit the queue, and what cannot be written, is dropped and counted.

    Args:
        encode: the lines of an item; called in the thread. An OSError counts as one of the file.
        limit: the most that the queue may hold, in the sizes that `offer` is given.
        dropped: called with the number of items dropped; from any thread.
        sync: whether each batch is synced.
    """

    def __init__(
        self,
        file: LineFile,
        encode: Callable[[T], bytes],
        *,
        limit: int,
        dropped: Callable[[int], None],
        sync: bool,
    ) -> None:
        self._file = file
        self._encode = encode
        self._limit = limit
        self._dropped = dropped
        self._sync = sync
        self._queue: deque[tuple[T, int]] = deque()
        # Each is changed by one thread alone; the queue holds their difference.
        self._size_offered = self._size_taken = 0
        self._offered = threading.Event()
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None
        self._silent_until = 0.0

    def offer(self, item: T, size: int) -> None:
        """Queue an item, unless the queue is full. Takes microseconds and never raises.

        Called from one thread.
        """
        waiting = self._size_offered - self._size_taken
        if waiting + size > self._limit or self._closing.is_set():
            self._dropped(1)
            return
        self._size_offered += size
        self._queue.append((item, size))
        self.start()
        if not self._offered.is_set():
            self._offered.set()

    def start(self) -> None:
        """Start the thread, unless it runs or the system has none left now."""
        if self._thread is not None:
            return
        name = f"records {self._file.path.name}"
        thread = threading.Thread(target=self._run, name=name, daemon=True)
        # What waits is written once a later item starts it.
        with suppress(RuntimeError):
            thread.start()
            self._thread = thread

    def close(self, seconds: float = 2.0) -> None:
        """Write what waits, within this time."""
        self._closing.set()
        self._offered.set()
        if self._thread is not None:
            self._thread.join(seconds)

    def _run(self) -> None:
        due = monotonic()
        while not self._closing.is_set() or self._queue:
            if monotonic() >= due:
                due = monotonic() + _CLEANING_SECONDS
                try:
                    self._file.expire()
                except OSError as error:
                    self._warn(error)
            self._offered.wait(max(0.0, due - monotonic()))
            self._closing.wait(_GATHER_SECONDS)
            self._offered.clear()
            self._write()

    def _write(self) -> None:
        taken = [self._queue.popleft() for _ in range(len(self._queue))]
        if not taken:
            return
        try:
            lines = [line for item, _ in taken if (line := self._encoded(item)) is not None]
            self._file.append(b"".join(lines), sync=self._sync)
        except OSError as error:
            self._dropped(len(taken))
            self._warn(error)
        finally:
            self._size_taken += sum(size for _, size in taken)

    def _encoded(self, item: T) -> bytes | None:
        """None: it could not be encoded, which is logged; the others are written all the same."""
        try:
            return self._encode(item)
        except OSError:
            raise
        except Exception:
            self._dropped(1)
            logger.exception("a record could not be encoded")
            return None

    def _warn(self, error: OSError) -> None:
        if monotonic() >= self._silent_until:
            self._silent_until = monotonic() + _WARNING_SECONDS
            logger.error("%s cannot be written: %s", self._file.path, error.strerror or error)
