"""From host memory onto the device, many adapters at a time. Knows no leases.

One job runs at a time and takes whatever has come together meanwhile: a copy costs little, starting
and waiting for one costs as much as several.
"""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from time import perf_counter
from typing import TypeAlias

from service.engine.runners.base import Hosted, Placed, Runner

# Adapters of one job: those in it wait for the last of them.
_MOST = 32

Outcome: TypeAlias = Placed | BaseException
Done: TypeAlias = Callable[[Outcome, float], None]


class Placing:
    """Puts adapters into places of a device. All calls come from one event loop."""

    def __init__(self, runner: Runner, executor: Executor) -> None:
        self._runner = runner
        self._executor = executor
        self._waiting: list[tuple[int, Hosted, Done]] = []
        self._busy = False

    def place(self, place: int, hosted: Hosted, done: Done) -> None:
        """`done` is called with what became of it, and the seconds that its job took."""
        self._waiting.append((place, hosted, done))
        if not self._busy:
            self._start()

    def _start(self) -> None:
        self._busy = True
        batch, self._waiting = self._waiting[:_MOST], self._waiting[_MOST:]
        started = perf_counter()
        job = asyncio.get_running_loop().run_in_executor(
            self._executor, self._runner.place, [(place, hosted) for place, hosted, _ in batch]
        )
        job.add_done_callback(lambda ended: self._ended(batch, started, ended))

    def _ended(
        self,
        batch: Sequence[tuple[int, Hosted, Done]],
        started: float,
        job: asyncio.Future[list[Placed]],
    ) -> None:
        self._busy = False
        if self._waiting:
            self._start()
        outcomes: Sequence[Outcome]
        try:
            outcomes = job.result()
        except (Exception, asyncio.CancelledError) as error:
            outcomes = [error] * len(batch)
        seconds = perf_counter() - started
        for (_, _, done), outcome in zip(batch, outcomes, strict=True):
            done(outcome, seconds)
