"""What keys may still ask for: a bucket of requests and one of tokens for each, kept by all
processes of a service together.

A bucket holds what a key may use in a minute, and fills steadily. It is stored as the time at which
it will be full again, on a clock that all processes of a machine share. With workers these times
are in a file that all of them map into memory. A worker locks the few bytes of a key for about a
microsecond; the system drops the lock if the worker is killed.
"""

import fcntl
import mmap
import os
import struct
from collections.abc import Callable
from pathlib import Path
from time import monotonic

from service.access.keys import Key

# Keys with quotas that one start of a service can have seen; those beyond are counted by process.
SLOTS = 16384
_SECONDS = 60.0
# Key id, when the bucket of requests is full, when that of tokens is.
_SLOT = struct.Struct("<Qdd8x")
# A worker that was stopped while it held a lock must not stop the others.
_TRIES = 500


class Quotas:
    """The buckets of all keys.

    Args:
        path: a file that the processes of a service share, created if missing; None keeps the
            buckets in this process.

    Raises:
        OSError: the file cannot be used.
    """

    def __init__(self, path: Path | None = None, clock: Callable[[], float] = monotonic) -> None:
        self._clock = clock
        self._file = -1
        size = SLOTS * _SLOT.size
        if path is not None:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            os.ftruncate(self._file, size)
        self._memory = mmap.mmap(self._file, size)
        self._slots: dict[str, int] = {}
        # Of keys without a slot.
        self._own: dict[str, tuple[float, float]] = {}

    def take_request(self, key: Key) -> float:
        """Count a request. Returns the seconds until there is one left; 0: it was counted."""
        if key.requests_per_minute is None:
            return 0.0
        interval = _SECONDS / key.requests_per_minute

        def take(full_at: float, now: float) -> tuple[float, float]:
            after = max(full_at, now) + interval
            # Rounding may not cost the last request of a full bucket.
            wait = after - now - _SECONDS
            return (after, 0.0) if wait <= 1e-6 else (full_at, wait)

        return self._change(key, 0, take)

    def tokens_wait(self, key: Key) -> float:
        """Seconds until a key has tokens left; 0 if it has some now."""
        if key.tokens_per_minute is None:
            return 0.0
        return self._change(
            key, 1, lambda full_at, now: (full_at, max(0.0, full_at - now - _SECONDS))
        )

    def charge(self, key: Key, tokens: int) -> None:
        """Count the tokens of an answer. They may be more than are left: the debt is paid back
        before the next request."""
        if key.tokens_per_minute is None:
            return
        seconds = tokens * _SECONDS / key.tokens_per_minute
        self._change(key, 1, lambda full_at, now: (max(full_at, now) + seconds, 0.0))

    def _change(
        self, key: Key, bucket: int, change: Callable[[float, float], tuple[float, float]]
    ) -> float:
        """Replace the time at which a bucket is full. change: from it and the present time to the
        new one and a result."""
        slot = self._slots.get(key.id)
        if slot is None:
            slot = self._slots[key.id] = self._find(key.id)
        now = self._clock()
        if slot < 0:
            times = list(self._own.get(key.id, (0.0, 0.0)))
            times[bucket], result = change(times[bucket], now)
            self._own[key.id] = (times[0], times[1])
            return result
        offset = slot * _SLOT.size
        locked = self._lock(offset)
        try:
            number, *times = _SLOT.unpack_from(self._memory, offset)
            times[bucket], result = change(times[bucket], now)
            _SLOT.pack_into(self._memory, offset, number, *times)
        finally:
            if locked:
                fcntl.lockf(self._file, fcntl.LOCK_UN, _SLOT.size, offset)
        return float(result)

    def _find(self, key_id: str) -> int:
        """The slot of a key, the same in every process; -1 if all are taken."""
        # 0 is an empty slot.
        number = int(key_id, 16) + 1
        for step in range(SLOTS):
            slot = (number + step) % SLOTS
            offset = slot * _SLOT.size
            locked = self._lock(offset)
            try:
                found = _SLOT.unpack_from(self._memory, offset)[0]
                if found == 0:
                    _SLOT.pack_into(self._memory, offset, number, 0.0, 0.0)
                if found in (0, number):
                    return slot
            finally:
                if locked:
                    fcntl.lockf(self._file, fcntl.LOCK_UN, _SLOT.size, offset)
        return -1

    def _lock(self, offset: int) -> bool:
        if self._file < 0:
            return False
        for _ in range(_TRIES):
            try:
                fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, _SLOT.size, offset)
            except OSError:
                # On a busy machine the holder needs its turn to let go.
                os.sched_yield()
                continue
            return True
        return False
