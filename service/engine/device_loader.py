"""Copies adapters from host memory into slots of the device, many at a time.

One job runs at a time, and the next one takes what has gathered meanwhile, clients in turn. The
copy itself is cheap. What takes time are the calls around it, each of which waits for the
interpreter: several jobs side by side would only wait for each other. If a job fails, each of its
adapters is copied alone, so that only those fail that cannot be copied. What is read from disk does
not come here: the thread that reads it copies it (`host_cache.py`).
"""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from itertools import accumulate, islice
from time import perf_counter
from typing import TypeAlias

from service.engine.runners.base import DeviceAdapter, HostAdapter, Runner
from service.engine.turns import NOBODY, Client
from service.engine.waiting_line import WaitingLine
from service.errors import EngineUnavailable

# Adapters in one job, and their bytes unless a single one has more. The first of them waits for the
# last.
_MAX_JOB = 32
_MAX_JOB_BYTES = 32 * 2**20

_ENDED = "the engine has ended"

Outcome: TypeAlias = DeviceAdapter | BaseException
OnLoaded: TypeAlias = Callable[[Outcome, float], None]


class DeviceLoader:
    """Loads adapters into slots. All calls come from one event loop.

    Args:
        copying: has a thread for the job.
    """

    def __init__(self, runner: Runner, copying: Executor) -> None:
        self._runner = runner
        self._copying = copying
        # Slots, and what waits to be copied into each.
        self._waiting: WaitingLine[int] = WaitingLine()
        self._loads: dict[int, tuple[HostAdapter, OnLoaded]] = {}
        self._idle = True

    def load(
        self, slot: int, adapter: HostAdapter, on_loaded: OnLoaded, client: Client = NOBODY
    ) -> None:
        """Load into a slot that nothing waits for.

        Args:
            on_loaded: gets the loaded adapter or an error, and the seconds that its job took.
            client: takes turns with others.
        """
        self._waiting.add(slot, client)
        self._loads[slot] = adapter, on_loaded
        if self._idle:
            self._start_job()

    def advance(self, slot: int, client: Client) -> None:
        """Another client waits for a slot, too: it has its turn then, if that comes sooner."""
        if slot in self._waiting:
            self._waiting.advance(slot, client)

    def unload(self, slot: int) -> None:
        """Give back the memory of a slot that no batch uses."""
        self._runner.unload(slot)

    def _start_job(self) -> None:
        self._idle = False
        first = list(islice(self._waiting, _MAX_JOB))
        size = _job_size([self._loads[slot][0].nbytes for slot in first])
        loads = [self._take(slot) for slot in first[:size]]
        started = perf_counter()
        try:
            job = asyncio.get_running_loop().run_in_executor(
                self._copying, self._copy, [(slot, adapter) for slot, adapter, _ in loads]
            )
        except RuntimeError:
            # The executor is shut down: the engine has ended while adapters waited.
            self._idle = True
            for _, _, on_loaded in [*loads, *map(self._take, list(self._waiting))]:
                on_loaded(EngineUnavailable(_ENDED), 0.0)
            return
        job.add_done_callback(lambda done: self._finish_job(loads, started, done))

    def _take(self, slot: int) -> tuple[int, HostAdapter, OnLoaded]:
        self._waiting.remove(slot)
        return slot, *self._loads.pop(slot)

    def _finish_job(
        self,
        loads: Sequence[tuple[int, HostAdapter, OnLoaded]],
        started: float,
        job: asyncio.Future[list[Outcome]],
    ) -> None:
        self._idle = True
        if self._waiting:
            self._start_job()
        outcomes: Sequence[Outcome]
        try:
            outcomes = job.result()
        except asyncio.CancelledError:
            outcomes = [EngineUnavailable(_ENDED)] * len(loads)
        seconds = perf_counter() - started
        for (_, _, on_loaded), outcome in zip(loads, outcomes, strict=True):
            on_loaded(outcome, seconds)

    def _copy(self, adapters: Sequence[tuple[int, HostAdapter]]) -> list[Outcome]:
        """Runs in a thread."""
        try:
            return list(self._runner.load(adapters))
        except Exception as error:
            if len(adapters) == 1:
                return [error]
        # Not inside the handler: the traceback would keep the failed copy's memory.
        return [outcome for one in adapters for outcome in self._copy([one])]


def _job_size(sizes: Sequence[int]) -> int:
    """How many of the first adapters, which have these sizes, the next job takes."""
    return max(1, sum(total <= _MAX_JOB_BYTES for total in accumulate(sizes)))
