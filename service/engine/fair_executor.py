"""Threads that clients share: what waits for one is done in turns of the clients.

Functions are submitted on one event loop and taken by the threads without a lock. A thread that
held one and waited for the interpreter would hold up the loop. One operation on a heap of tuples,
or on a dictionary, is whole before another thread runs.
"""

from collections.abc import Callable
from concurrent.futures import Executor, Future
from heapq import heappop, heappush
from itertools import count
from typing import Any, NamedTuple, TypeVar

from service.engine.turns import Client, Turns

T = TypeVar("T")


class _Waiting(NamedTuple):
    """A function that no thread has taken. turn: the soonest that it was given."""

    function: Callable[[], Any]
    client: str
    turn: float


class FairExecutor:
    """Functions that run in the threads of an executor, those of quiet clients first.

    The executor gets a task for every function, and each task runs the function that is first when
    its thread begins.
    """

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self._turns = Turns()
        self._numbers = count()
        self._waiting: dict[Future[Any], _Waiting] = {}
        # By turn and number. A function that was given a sooner turn is there twice.
        self._heap: list[tuple[float, int, Future[Any]]] = []
        self._last_turn = 0.0

    def submit(self, function: Callable[[], T], client: Client) -> Future[T]:
        """Its result or exception; a cancelled future's function does not run.

        Raises:
            RuntimeError: the executor was shut down.
        """
        future: Future[T] = Future()
        turn = self._turns.take(client, front=self._front)
        self._push(future, _Waiting(function, client.name, turn))
        try:
            self._executor.submit(self._run_first)
        except RuntimeError:
            del self._waiting[future]
            raise
        return future

    def advance(self, future: Future[Any], client: Client) -> None:
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
        self._push(future, _Waiting(waiting.function, client.name, turn))
        # A task that found it gone may have run another function, or none.
        self._executor.submit(self._run_first)

    def shutdown(self) -> None:
        """Run nothing more; what waits is cancelled."""
        self._executor.shutdown(wait=False, cancel_futures=True)
        for future in list(self._waiting):
            if self._waiting.pop(future, None) is not None:
                future.cancel()

    @property
    def _front(self) -> float:
        try:
            return self._heap[0][0]
        except IndexError:
            return self._last_turn

    def _push(self, future: Future[Any], waiting: _Waiting) -> None:
        self._waiting[future] = waiting
        heappush(self._heap, (waiting.turn, next(self._numbers), future))

    def _run_first(self) -> None:
        """Runs in a thread."""
        waiting = None
        while waiting is None:
            try:
                self._last_turn, _, future = heappop(self._heap)
            except IndexError:
                return
            # None: it has a sooner turn, or was taken in that.
            waiting = self._waiting.pop(future, None)
        if not future.set_running_or_notify_cancel():
            return
        try:
            result = waiting.function()
        except BaseException as error:
            future.set_exception(error)
            # Its traceback has this frame: in a circle, both would wait for the garbage collector.
            del future
        else:
            future.set_result(result)
