"""Runs work that is divided into steps in a few threads, until a deadline.

Tokenising a long text takes many steps of some milliseconds. After each of them the work goes to
the end of the queue, is given up if its deadline has passed, and stops if its client has gone. The
first step of every piece of work has threads of its own, so that a short text never waits for the
rest of long ones.
"""

import asyncio
import os
import threading
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from time import monotonic
from typing import Generic, TypeVar

from service.errors import DeadlineExceeded, EngineUnavailable

T = TypeVar("T")

# The tokenizer releases the interpreter's lock. More threads than cores would only add memory.
_THREADS = min(8, os.cpu_count() or 1)


class StepPool:
    """Threads for work in steps; they start when they are needed."""

    def __init__(self) -> None:
        self._first = ThreadPoolExecutor(_THREADS, "first-step")
        self._later = ThreadPoolExecutor(_THREADS, "later-step")
        self._closed = threading.Event()

    async def run(self, steps: Generator[None, None, T], *, deadline: float) -> T:
        """The value that the steps return; what they raise is raised.

        Args:
            deadline: on the clock of `time.monotonic`.

        Raises:
            DeadlineExceeded: it passed first. A step that is running then ends unheard.
            EngineUnavailable: the pool is closed, before or between the steps.
        """
        work, threads = _Work(steps), self._first
        try:
            async with asyncio.timeout(max(0.0, deadline - monotonic())):
                while not await self._run_in(threads, work):
                    threads = self._later
        except TimeoutError:
            raise DeadlineExceeded("the deadline passed while the texts were tokenised") from None
        return work.value

    async def _run_in(self, threads: ThreadPoolExecutor, work: "_Work[T]") -> bool:
        if self._closed.is_set():
            raise _stopped()
        step = asyncio.get_running_loop().run_in_executor(threads, work.step)
        try:
            return await step
        except asyncio.CancelledError:
            # `close` cancels what waits. Nobody has asked this task to end then.
            task = asyncio.current_task()
            if self._closed.is_set() and not (task and task.cancelling()):
                raise _stopped() from None
            raise

    def close(self) -> None:
        """Drop what waits; what runs is not waited for."""
        self._closed.set()
        self._first.shutdown(wait=False, cancel_futures=True)
        self._later.shutdown(wait=False, cancel_futures=True)


def _stopped() -> EngineUnavailable:
    return EngineUnavailable("the service has stopped")


class _Work(Generic[T]):
    """A generator whose steps run in threads. A future cannot carry a StopIteration."""

    value: T

    def __init__(self, steps: Generator[None, None, T]) -> None:
        self._steps = steps
        # A generator does nothing before it is asked first, and only then until its first yield.
        self._begun = False

    def step(self) -> bool:
        """Run one step; whether it was the last."""
        try:
            if not self._begun:
                self._begun = True
                next(self._steps)
            next(self._steps)
        except StopIteration as stop:
            self.value = stop.value
            return True
        return False
