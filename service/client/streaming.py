"""Many lines over one service or several: each line is answered once, and answers keep their order.

Every service has a lane: a connection that carries lines and their answers at the same time. Lanes
take lines from one queue, as many as their service answers in a few seconds. A lane that loses its
connection gives its unanswered lines back, so another lane can take them, and tries again.

    put -> queue -> lane -> service -> lane -> answers in order
                      <- given back -

No line that is taken is forgotten: `put` may be called again once answers were fetched (`room`).
"""

import asyncio
import random
from collections import deque
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from time import monotonic

import msgspec

from service.client.duplex import Duplex, Lost
from service.client.errors import (
    Busy,
    ClientError,
    Failed,
    Refused,
    UnexpectedAnswer,
    Unreachable,
    refusal_of,
)
from service.client.retry import Reply, Retries, refused
from service.client.transport import Address
from service.client.types import ErrorContent

PATH = "/v1/predict/stream"
# What a lane has sent and has no answer to, at least and at most, and for how many seconds of work.
LEAST_LINES, MOST_LINES = 256, 4096
MOST_BYTES = 2 * 2**20
AHEAD_SECONDS = 2.0
# Beside the client's own seconds, how long a service may be silent that has lines: it waits itself
# while its engine is busy.
STREAM_SECONDS = 60.0
# What is held for each lane, and once more.
HELD_LINES, HELD_BYTES = MOST_LINES, 2 * MOST_BYTES
# Written to a connection at once.
_PIECE_BYTES = 64 * 1024
# No service gives a longer answer to one text by default.
_MOST_ANSWER_BYTES = 64 * 2**20
# How often a line is sent whose answer is an error that may not come again.
_LINE_ATTEMPTS = 3
_LINE_RETRIED = frozenset(
    {"adapter_load_failed", "inference_failed", "not_ready", "overloaded", "unavailable"}
)
_TIMED_OUT = "deadline_exceeded"
# How a stream ends before its lines do, as the status that a request would have had.
_ENDS: Mapping[str, int] = {
    "unauthorized": 401,
    "key_expired": 401,
    "key_revoked": 401,
    "forbidden": 403,
    "request_timeout": 408,
    "overloaded": 429,
    "quota_exceeded": 429,
    "not_ready": 503,
    "unavailable": 503,
}
# For the reason of a connection that broke while something was sent.
_LAST_WORDS_SECONDS = 2.0


@dataclass(slots=True, eq=False)
class _Line:
    """number: from 0. content: JSON, without the end of the line."""

    number: int
    content: bytes
    attempts: int = 0
    answer: bytes | None = None


class _Peek(msgspec.Struct):
    """What tells an answer from an error."""

    line: int | None = None
    error: ErrorContent | None = None


@dataclass(slots=True)
class _Lane:
    """One service. sent: lines without an answer, in order. wake: something may be sent.

    answered: since the connection was opened at `opened`. finished: the body is complete. moved:
    when it last answered or had nothing to answer. progress: when it last answered. failures: in a
    row, since `failing_since`.
    """

    address: Address
    sent: deque[_Line] = field(default_factory=deque)
    sent_bytes: int = 0
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    opened: float = 0.0
    answered: int = 0
    finished: bool = False
    moved: float = 0.0
    progress: float = 0.0
    failures: int = 0
    failing_since: float = 0.0

    @property
    def room(self) -> int:
        """How many lines may be sent now."""
        seconds = max(0.1, monotonic() - self.opened)
        ahead = int(AHEAD_SECONDS * self.answered / seconds)
        return min(MOST_LINES, max(LEAST_LINES, ahead)) - len(self.sent)


class Lines:
    """Lines on their way. All methods are called on one event loop.

    Args:
        addresses: of the services; any of them may answer any line.
        params, headers: of every stream.
        retries: a service that fails is asked again after longer and longer waits. The lines fail
            once none of the services has answered any of them for `retries.seconds`, or at the
            `retries.attempts`-th failure in a row.
        timeouts_final: a line that was not answered in time is not sent again.
        failed: told of every failure that is followed by another attempt: the service's URL, the
            error, and the seconds until then.
    """

    def __init__(
        self,
        addresses: Sequence[Address],
        *,
        params: Mapping[str, str],
        headers: Mapping[str, str],
        retries: Retries,
        timeouts_final: bool = False,
        failed: Callable[[str, ClientError, float], None] = lambda *_: None,
    ) -> None:
        self._lanes = [_Lane(address) for address in addresses]
        self._params = params
        self._headers = {"content-type": "application/x-ndjson"} | dict(headers)
        self._retries = retries
        self._retried = _LINE_RETRIED if timeouts_final else _LINE_RETRIED | {_TIMED_OUT}
        self._failed = failed
        # All that were put and not fetched; those of them that no lane has.
        self._unfetched: deque[_Line] = deque()
        self._todo: deque[_Line] = deque()
        self._held_bytes = 0
        self._number = 0
        self._closed = False
        self._error: BaseException | None = None
        self._moved = monotonic()
        self._changed = asyncio.Event()
        self._fetched = asyncio.Event()

    @property
    def room(self) -> int:
        """How many lines may be put now."""
        lanes = len(self._lanes) + 1
        if self._held_bytes >= HELD_BYTES * lanes:
            return 0
        return max(0, HELD_LINES * lanes - len(self._unfetched))

    def put(self, lines: Sequence[bytes]) -> None:
        """Take lines of JSON, each without its end."""
        for content in lines:
            line = _Line(self._number, content)
            self._number += 1
            self._unfetched.append(line)
            self._todo.append(line)
            self._held_bytes += len(content)
        self._wake()

    async def until_room(self) -> None:
        """Return when a line may be put, and let lanes and answers have their turn."""
        await asyncio.sleep(0)
        while not self.room:
            self._fetched.clear()
            await self._fetched.wait()

    def close(self) -> None:
        """No more lines will be put."""
        self._closed = True
        self._wake()

    async def answers(self) -> AsyncGenerator[list[bytes], None]:
        """The answers in order, as JSON lines without their ends, some at a time.

        Raises:
            ClientError: after all earlier answers have been yielded.
        """
        lanes = [asyncio.create_task(self._run(lane)) for lane in self._lanes]
        try:
            while True:
                ready = []
                while self._unfetched and self._unfetched[0].answer is not None:
                    line = self._unfetched.popleft()
                    self._held_bytes -= len(line.content)
                    ready.append(line.answer or b"")
                if ready:
                    self._fetched.set()
                    yield ready
                    continue
                if self._closed and not self._unfetched:
                    return
                if self._error is not None:
                    raise self._error
                self._changed.clear()
                await self._changed.wait()
        finally:
            for lane in lanes:
                lane.cancel()
            await asyncio.gather(*lanes, return_exceptions=True)

    # A lane.

    async def _run(self, lane: _Lane) -> None:
        """Open streams as long as there are lines."""
        try:
            while True:
                while not self._todo:
                    lane.wake.clear()
                    await lane.wake.wait()
                delay = 0.0
                try:
                    await self._stream(lane)
                    lane.failures = 0
                except (Unreachable, UnexpectedAnswer, Refused) as error:
                    delay = self._delay(lane, error)
                finally:
                    self._give_back(lane)
                if delay:
                    await asyncio.sleep(delay)
        except asyncio.CancelledError:
            raise
        except BaseException as error:
            self._error = self._error or error
            self._changed.set()

    def _delay(self, lane: _Lane, error: ClientError) -> float:
        """Seconds until the next attempt.

        Raises:
            ClientError: there is none.
        """
        if isinstance(error, Refused):
            if error.status == 408 and not lane.sent:
                # There was nothing to send for a while.
                return 0.0
            if error.status == 429 and error.type == "quota_exceeded":
                return error.retry_after or 1.0
            if not isinstance(error, Busy | Failed) and error.status != 408:
                raise error
        elif isinstance(error, UnexpectedAnswer):
            raise error
        now = monotonic()
        if lane.progress > lane.failing_since or not lane.failures:
            lane.failures, lane.failing_since = 0, now
        lane.failures += 1
        retry_after = error.retry_after if isinstance(error, Refused) else None
        others = self._moved > lane.failing_since
        delay = self._retries.wait(
            attempt=1 if others else lane.failures,
            elapsed=now - max(self._moved, lane.failing_since),
            retry_after=retry_after,
            chance=random.random(),
        )
        if delay is None:
            raise error
        if others:
            # The lines go on elsewhere; this service is asked again now and then.
            doubled = self._retries.first * 2.0 ** min(lane.failures - 1, 30)
            delay = max(delay, min(self._retries.longest, doubled))
        self._failed(lane.address.url, error, delay)
        return delay

    async def _stream(self, lane: _Lane) -> None:
        """One connection: until all lines are taken and answered, or it fails.

        Raises:
            Unreachable, UnexpectedAnswer, Refused: it failed; `lane.sent` has no answers.
        """
        lane.opened, lane.answered, lane.finished = monotonic(), 0, False
        duplex: Duplex | None = None
        try:
            duplex = await Duplex.open(lane.address, PATH, self._params, self._headers)
            sending = asyncio.create_task(self._send(lane, duplex))
            receiving = asyncio.create_task(self._receive(lane, duplex))
            watching = asyncio.create_task(self._watch(lane))
            tasks = {sending, receiving, watching}
            try:
                waiting = tasks
                while receiving in waiting:
                    done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                    failed = [task for task in done if task.exception() is not None]
                    if sending in failed and receiving in waiting:
                        # The service may have said why.
                        await asyncio.wait({receiving}, timeout=_LAST_WORDS_SECONDS)
                        if receiving.done():
                            receiving.result()
                    for task in failed:
                        task.result()
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
        except Lost as error:
            what = "the connection broke" if error.reply.sent else "no service answers"
            raise Unreachable(f"{what}: {lane.address.url}: {error.reply.reason}") from None
        finally:
            if duplex is not None:
                duplex.close()

    async def _send(self, lane: _Lane, duplex: Duplex) -> None:
        while True:
            if piece := self._take(lane):
                await duplex.send(piece)
            elif self._closed and not self._todo:
                lane.finished = True
                await duplex.finish()
                return
            else:
                lane.wake.clear()
                await lane.wake.wait()

    def _take(self, lane: _Lane) -> bytes:
        """The next lines for a service, as far as it has room."""
        pieces: list[bytes] = []
        size, room = 0, lane.room
        while self._todo and room > 0 and size < _PIECE_BYTES:
            line = self._todo[0]
            if lane.sent and lane.sent_bytes + len(line.content) > MOST_BYTES:
                break
            self._todo.popleft()
            lane.sent.append(line)
            lane.sent_bytes += len(line.content)
            pieces += (line.content, b"\n")
            size += len(line.content)
            room -= 1
        return b"".join(pieces)

    async def _receive(self, lane: _Lane, duplex: Duplex) -> None:
        head = await duplex.head()
        if head.status != 200:
            raise refused(Reply(head.status, head.headers, await duplex.rest()))
        rest = b""
        while part := await duplex.receive():
            *lines, rest = (rest + part).split(b"\n")
            if len(rest) > _MOST_ANSWER_BYTES:
                raise UnexpectedAnswer(f"{lane.address.url}: a line without an end")
            for line in lines:
                if line.strip():
                    self._answered(lane, line)
            lane.wake.set()
            self._changed.set()
        if lane.sent or rest or not lane.finished:
            raise Unreachable(f"the connection broke: {lane.address.url}: the answer was cut off")

    def _answered(self, lane: _Lane, answer: bytes) -> None:
        """
        Raises:
            Refused: this line says why the stream ends.
            UnexpectedAnswer: nothing was asked.
        """
        try:
            peek = msgspec.json.decode(answer, type=_Peek)
        except msgspec.MsgspecError as error:
            place = f"{lane.address.url} does not answer as this service does"
            raise UnexpectedAnswer(f"{place}: {error}") from None
        if peek.error is not None and peek.line is None:
            raise _end_of(peek.error)
        if not lane.sent:
            raise UnexpectedAnswer(f"{lane.address.url} gave more answers than it was sent lines")
        line = lane.sent.popleft()
        lane.sent_bytes -= len(line.content)
        lane.answered += 1
        lane.moved = lane.progress = self._moved = monotonic()
        line.attempts += 1
        again = peek.error is not None and peek.error.type in self._retried
        if again and line.attempts < _LINE_ATTEMPTS:
            self._put_back([line])
        else:
            line.answer = answer

    async def _watch(self, lane: _Lane) -> None:
        """
        Raises:
            Unreachable: the service has lines and says nothing.
        """
        lane.moved = monotonic()
        while True:
            await asyncio.sleep(min(1.0, lane.address.seconds / 4))
            if not lane.sent:
                lane.moved = monotonic()
            elif monotonic() - lane.moved > lane.address.seconds:
                raise Unreachable(
                    f"{lane.address.url} has answered nothing for {lane.address.seconds:g} s"
                )

    def _give_back(self, lane: _Lane) -> None:
        lines, lane.sent_bytes = list(lane.sent), 0
        lane.sent.clear()
        if lines:
            self._put_back(lines)

    def _put_back(self, lines: Sequence[_Line]) -> None:
        """Into the queue, in the order of their numbers: the first are awaited first."""
        # Both are in order, so this takes one pass.
        self._todo = deque(sorted([*lines, *self._todo], key=lambda line: line.number))
        self._wake()

    def _wake(self) -> None:
        self._changed.set()
        for lane in self._lanes:
            lane.wake.set()


def _end_of(error: ErrorContent) -> Refused:
    status = _ENDS.get(error.type, 500)
    return refusal_of(status)(status, type=error.type, message=error.message, details=error.details)
