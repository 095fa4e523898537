"""Keeps the engine's event loop and its lane on one core, unless batches are small.

Both run Python, so only one of them works at a time. On two cores each turn begins with fetching
from the other core's caches what the other thread has touched, down to the reference counts of
`None` and of small numbers. On one core it is all there.

While the device works on a large batch, the lane sleeps. For a small one it spins, which answers
sooner, but would keep the event loop from their core. So then each has a core.
"""

import ctypes
import logging
import os
import threading
from collections.abc import Callable, Collection
from typing import ClassVar

logger = logging.getLogger(__name__)

# With fewer cores the service's other processes need each of them.
_FEWEST_CORES = 4
# Other work may come to the core. So from time to time the lane runs anywhere for a moment. Then
# both threads stay where the kernel has put it.
_KEPT_SECONDS = 2.0
_FREE_SECONDS = 0.02
# While most batches are small, how often to look whether that has changed.
_LOOK_SECONDS = 0.25


class SharedCore:
    """Moves two threads together: the one that makes it, and the one that calls `keep`.

    Threads that either of them starts would stay on the core as well: they call `leave` first.

    Args:
        cores: that the process may use.
        core_of: the core that the calling thread runs on.
    """

    # Which of them a thread obeys, by its id: several engines may have one event loop.
    _obeyed: ClassVar["dict[int, SharedCore]"] = {}

    def __init__(self, cores: Collection[int], core_of: Callable[[], int]) -> None:
        self._cores = frozenset(cores)
        self._core_of = core_of
        self._loop = threading.get_native_id()
        self._kept = False
        self._until = 0.0
        # Batches since the last decision, and during how many of them the lane spun.
        self._batches = self._spun = 0

    def keep(self, now: float, *, spun: bool) -> None:
        """Called by the lane after every batch.

        Args:
            now: of `time.monotonic`.
            spun: whether the lane kept its core busy while that batch ran.
        """
        self._batches += 1
        self._spun += spun
        obeyed = self._obeyed.get(self._loop) is self
        if now < self._until and (obeyed or not self._kept):
            return
        sleeps, pinned = 2 * self._spun < self._batches, self._kept
        self._batches = self._spun = 0
        self._kept = sleeps and not (pinned and obeyed)
        try:
            if self._kept:
                self._obeyed[self._loop] = self
                core = {self._core_of()}
                os.sched_setaffinity(0, core)
                os.sched_setaffinity(self._loop, core)
            elif pinned or obeyed:
                os.sched_setaffinity(0, self._cores)
                if obeyed and not sleeps:
                    del self._obeyed[self._loop]
                    os.sched_setaffinity(self._loop, self._cores)
        except OSError as error:
            # A sandbox may forbid it, and the process's cores may change.
            logger.warning("the engine's threads stay where they are: %s", error)
            self._kept, self._until = False, float("inf")
            return
        free = _FREE_SECONDS if sleeps else _LOOK_SECONDS
        self._until = now + (_KEPT_SECONDS if self._kept else free)

    def leave(self) -> None:
        """Let the calling thread run on any core again."""
        try:
            os.sched_setaffinity(0, self._cores)
        except OSError as error:
            logger.warning("a thread stays on the engine's core: %s", error)


def shared_core() -> SharedCore | None:
    """For the calling thread and another one; None where it cannot or should not be done."""
    if not hasattr(os, "sched_setaffinity"):
        return None
    cores = os.sched_getaffinity(0)
    core_of = getattr(ctypes.CDLL(None), "sched_getcpu", None)
    if core_of is None or len(cores) < _FEWEST_CORES:
        return None
    return SharedCore(cores, core_of)
