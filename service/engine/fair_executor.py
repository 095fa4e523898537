"""Threads that clients share: what waits for one is done in turns of the clients.

Functions are submitted on one event loop and taken by the threads without a lock. A thread that
held one and waited for the interpreter would hold up the loop. One operation on a heap of tuples,
or on a dictionary, is whole before another thread runs.

`concurrent.futures` would do for the threads, but each load pays for its locks on the event loop,
which has no time to spare while thousands of adapters come and go (docs/benchmarks.md).
"""

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from heapq import heappop, heappush
from itertools import count
from queue import SimpleQueue
from threading import Thread, current_thread
from time import monotonic
from typing import Any, NamedTuple, TypeAlias, TypeVar
from weakref import finalize

from service.engine.turns import Client, Turns

T = TypeVar("T")

# How long the end of the interpreter waits for functions that run.
_END_SECONDS = 1.0

# What wakes a thread: a function to call, or None, at which it ends.
_Wakes: TypeAlias = "SimpleQueue[Callable[[], None] | None]"


class _Waiting(NamedTuple):
    """A function that no thread has taken. turn: the soonest that it was given."""

    function: Callable[[], Any]
    client: str
    turn: float


class FairExecutor:
    """Threads that run functions, those of quiet clients first.

    A thread is woken for every function, and runs the one that is first then.

    Args:
        threads: how many there are. They start with the first function.
        begin: called in each thread first.
    """

    def __init__(
        self, threads: int, *, name: str, begin: Callable[[], None] = lambda: None
    ) -> None:
        self._wakes: _Wakes = SimpleQueue()
        # Daemons: a function that hangs, on a disk for instance, does not keep the process.
        self._threads = [
            Thread(target=_work, args=(self._wakes, begin), name=f"{name}_{index}", daemon=True)
            for index in range(threads)
        ]
        self._started = self._ended = False
        self._turns = Turns()
        self._numbers = count()
        self._waiting: dict[asyncio.Future[Any], _Waiting] = {}
        # By turn and number. A function that was given a sooner turn is there twice.
        self._heap: list[tuple[float, int, asyncio.Future[Any]]] = []
        self._last_turn = 0.0

    def submit(self, function: Callable[[], T], client: Client) -> asyncio.Future[T]:
        """Its result or exception, on this event loop. If it is cancelled before a thread has taken
        its function, that does not run.

        Raises:
            RuntimeError: the executor was shut down.
        """
        if self._ended:
            raise RuntimeError("functions cannot be submitted after the shutdown")
        if not self._started:
            self._start()
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        turn = self._turns.take(client, front=self._front)
        self._push(future, _Waiting(function, client.name, turn))
        return future

    def advance(self, future: asyncio.Future[Any], client: Client) -> None:
        """Another client waits for it, too: it runs in that one's turn, if that comes sooner."""
        waiting = self._waiting.get(future)
        if waiting is None or waiting.client == client.name:
            return
        if self._turns.next(client, front=self._front) >= waiting.turn:
            return
        # From here on no thread takes it in its old turn.
        if self._waiting.pop(future, None) is None:
            return
        turn = self._turns.take(client, front=self._front)
        # A thread that found it gone may have run another function, or none: one more is woken.
        self._push(future, _Waiting(waiting.function, client.name, turn))

    def cancel(self, future: asyncio.Future[Any]) -> bool:
        """Cancel it unless a thread has taken its function; whether it was cancelled."""
        if self._waiting.pop(future, None) is None:
            return False
        future.cancel()
        return True

    def shutdown(self) -> None:
        """Run nothing more; what waits is cancelled."""
        self._ended = True
        for future in list(self._waiting):
            self.cancel(future)
        _wake_to_end(self._wakes, self._threads)

    def _start(self) -> None:
        for thread in self._threads:
            if not thread.is_alive():
                thread.start()
        self._started = True
        # Also if nobody shuts it down.
        finalize(self, _end, self._wakes, self._threads)

    @property
    def _front(self) -> float:
        try:
            return self._heap[0][0]
        except IndexError:
            return self._last_turn

    def _push(self, future: asyncio.Future[Any], waiting: _Waiting) -> None:
        self._waiting[future] = waiting
        heappush(self._heap, (waiting.turn, next(self._numbers), future))
        self._wakes.put(self._run_first)

    def _run_first(self) -> None:
        """Runs in a thread."""
        waiting = None
        while waiting is None:
            try:
                self._last_turn, _, future = heappop(self._heap)
            except IndexError:
                return
            # None: it has a sooner turn, was taken in that, or was cancelled.
            waiting = self._waiting.pop(future, None)
            if future.cancelled():
                waiting = None
        try:
            result = waiting.function()
        except BaseException as error:
            _deliver(future, _fail, error)
            # Its traceback has this frame: in a circle, both would wait for the garbage collector.
            del future
        else:
            _deliver(future, _resolve, result)


def _deliver(
    future: asyncio.Future[Any], settle: Callable[[asyncio.Future[Any], Any], None], what: Any
) -> None:
    # The loop may have ended, and nobody waits.
    with contextlib.suppress(RuntimeError):
        future.get_loop().call_soon_threadsafe(settle, future, what)


def _resolve(future: asyncio.Future[Any], result: Any) -> None:
    if not future.done():
        future.set_result(result)


def _fail(future: asyncio.Future[Any], error: BaseException) -> None:
    if isinstance(error, StopIteration):
        # No future takes one.
        error = RuntimeError(f"a function of the executor raised {error!r}")
    if not future.done():
        future.set_exception(error)


def _work(wakes: _Wakes, begin: Callable[[], None]) -> None:
    """What a thread does. It does not refer to its executor, which may be forgotten."""
    begin()
    while (run := wakes.get()) is not None:
        run()
        del run


def _wake_to_end(wakes: _Wakes, threads: Sequence[Thread]) -> None:
    for _ in threads:
        wakes.put(None)


def _end(wakes: _Wakes, threads: Sequence[Thread]) -> None:
    """End the threads. One that runs C++ while the interpreter ends would abort the process."""
    _wake_to_end(wakes, threads)
    until = monotonic() + _END_SECONDS
    for thread in threads:
        # The collector may come here in one of them.
        if thread is not current_thread():
            thread.join(max(0.0, until - monotonic()))
