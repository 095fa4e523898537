"""Keeps the engine's event loop and its lane on one core.

Both run Python, so only one of them works at a time. On two cores each turn begins with fetching
what the other one has touched from that core's caches, down to the reference counts of `None` and
of small numbers. On one core it is all there.

What waits for the device must sleep, not spin, or it would keep the other thread from the core.
"""

import ctypes
import logging
import os
import threading
from collections.abc import Callable, Collection

logger = logging.getLogger(__name__)

# With fewer cores the service's other processes need each of them.
_FEWEST_CORES = 4
# The scheduler may have put other work on the core, so it chooses another one from time to time:
# for a moment the lane may run anywhere.
_HELD_SECONDS = 2.0
_FREE_SECONDS = 0.02
# Whose core a thread is on, where several engines have one event loop.
_KEPT_BY: "dict[int, SharedCore]" = {}


class SharedCore:
    """Moves two threads together. Made by one of them; the other one calls `keep`.

    Threads that either of them starts would stay on the core as well: they call `leave` first.

    Args:
        cores: that the process may use.
        core_of: the core that the calling thread runs on.
    """

    def __init__(self, cores: Collection[int], core_of: Callable[[], int]) -> None:
        self._cores = frozenset(cores)
        self._core_of = core_of
        self._other = threading.get_native_id()
        self._held = False
        self._until = 0.0

    def keep(self, now: float) -> None:
        """Called by the second thread again and again. now: of `time.monotonic`."""
        ours = _KEPT_BY.get(self._other) is self
        if now < self._until and ours:
            return
        _KEPT_BY[self._other] = self
        try:
            if self._held and ours:
                os.sched_setaffinity(0, self._cores)
                self._until = now + _FREE_SECONDS
            else:
                core = {self._core_of()}
                os.sched_setaffinity(0, core)
                os.sched_setaffinity(self._other, core)
                self._until = now + _HELD_SECONDS
            self._held = not (self._held and ours)
        except OSError as error:
            # A sandbox may forbid it, and the process's cores may change.
            logger.warning("the engine's threads stay where they are: %s", error)
            self._until = float("inf")

    def leave(self) -> None:
        """Let the calling thread run on any core."""
        os.sched_setaffinity(0, self._cores)


def shared_core() -> SharedCore | None:
    """For the calling thread and another one; None where it cannot or should not be done."""
    if not hasattr(os, "sched_setaffinity"):
        return None
    cores = os.sched_getaffinity(0)
    core_of = getattr(ctypes.CDLL(None), "sched_getcpu", None)
    if core_of is None or len(cores) < _FEWEST_CORES:
        return None
    return SharedCore(cores, core_of)
