"""`Lines` for callers without an event loop: it runs in a thread of its own."""

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from contextlib import aclosing, suppress
from typing import Self

from service.client.errors import Closed
from service.client.streaming import Lines


class Background:
    """Takes lines and gives their answers in order; the two may be called from different threads.

    Use it in a `with` block, whose end gives up what has no answer yet.

    Args:
        make: called once, in that thread.
    """

    def __init__(self, make: Callable[[], Lines]) -> None:
        self._make = make
        # Guards all below, and is notified of answers, room and the end.
        self._changed = threading.Condition()
        self._put: deque[bytes] = deque()
        self._answers: deque[bytes] = deque()
        # How many may be put before answers are fetched.
        self._room = 0
        self._closed = self._stopped = self._over = False
        self._error: BaseException | None = None
        self._pumping = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._wake: asyncio.Event | None = None
        self._thread = threading.Thread(target=self._run, name="stream", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        self._call()
        self._thread.join()

    def put(self, line: bytes, *, wait: bool = False) -> bool:
        """Take a line of JSON without its end. Returns whether there was room; with `wait`, waits
        for it, and returns whether answers are still to come."""
        with self._changed:
            while self._room <= 0 and not (self._over or self._stopped):
                if not wait or self._closed:
                    return False
                self._changed.wait()
            if self._over or self._stopped:
                # The answers say why.
                return not wait
            self._room -= 1
            self._put.append(line)
        self._call()
        return True

    def close(self) -> None:
        """No more lines will be put."""
        with self._changed:
            self._closed = True
        self._call()

    def answers(self, *, wait: bool = True, or_room: bool = False) -> list[bytes]:
        """The next answers.

        Args:
            wait: for at least one, unless it is the end.
            or_room: wait for room as well; then there may be none.

        Raises:
            ClientError: after all earlier answers were given.
        """
        with self._changed:
            while wait and not (self._answers or self._over or self._stopped):
                if or_room and self._room > 0:
                    break
                self._changed.wait()
            answers = list(self._answers)
            self._answers.clear()
            if not answers and self._error is not None:
                raise self._error
        if answers:
            self._call()
        return answers

    def check(self) -> None:
        """
        Raises:
            ClientError: the stream has failed, and all answers before that were given.
        """
        with self._changed:
            if self._error is not None and not self._answers:
                raise self._error

    def _call(self) -> None:
        """Tell the loop that something was put, fetched or ended."""
        with self._changed:
            loop, wake = self._loop, self._wake
            if self._pumping or loop is None or wake is None or self._over:
                return
            self._pumping = True
        # It may just have ended, on its own.
        with suppress(RuntimeError):
            loop.call_soon_threadsafe(wake.set)

    def _run(self) -> None:
        try:
            asyncio.run(self._work())
        except BaseException as error:
            with self._changed:
                self._error = error
        finally:
            with self._changed:
                self._over = True
                self._changed.notify_all()

    async def _work(self) -> None:
        lines = self._make()
        wake = asyncio.Event()
        with self._changed:
            self._loop, self._wake = asyncio.get_running_loop(), wake
            self._room = lines.room
            self._changed.notify_all()
        pumping = asyncio.create_task(self._pump(lines, wake))
        fetching = asyncio.create_task(self._fetch(lines))
        try:
            await asyncio.wait({pumping, fetching}, return_when=asyncio.FIRST_COMPLETED)
            if fetching.done():
                fetching.result()
            elif pumping.done():
                pumping.result()
                raise Closed("the caller stopped before all answers came")
        finally:
            for task in (pumping, fetching):
                task.cancel()
            await asyncio.gather(pumping, fetching, return_exceptions=True)

    async def _pump(self, lines: Lines, wake: asyncio.Event) -> None:
        """Move lines from the callers to the lanes; returns when the caller has stopped."""
        while True:
            with self._changed:
                self._pumping = False
                put, closed = list(self._put), self._closed
                self._put.clear()
                if self._stopped:
                    return
            if put:
                lines.put(put)
            if closed:
                lines.close()
            with self._changed:
                # Answers that were not fetched take the room of lines.
                self._room = lines.room - len(self._put) - len(self._answers)
                self._changed.notify_all()
            await wake.wait()
            wake.clear()

    async def _fetch(self, lines: Lines) -> None:
        async with aclosing(lines.answers()) as answers:
            async for some in answers:
                with self._changed:
                    self._answers.extend(some)
                    self._room = lines.room - len(self._put) - len(self._answers)
                    self._changed.notify_all()
