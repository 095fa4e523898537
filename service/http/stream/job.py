"""A job: lines are read as far as there is room, answered in portions side by side, and written in
order.

    body -> lines -> portions -> engine
                        |
      answer <- written in order

Room is what bounds memory: lines that were read and whose answers have not been written. A client
that does not take its answers, or sends faster than the device works, is not read further, and TCP
lets it wait. What the engine refuses for now is asked again, until a line's deadline.
"""

import asyncio
import random
from collections.abc import AsyncGenerator
from time import monotonic
from typing import Any

from starlette.requests import ClientDisconnect, Request

from adapters.errors import AdapterError
from service.errors import (
    BodyTimeout,
    DeadlineExceeded,
    EngineUnavailable,
    Overloaded,
    ServiceError,
    Unavailable,
    without_frames,
)
from service.http.answer_size import AnswerShape
from service.http.bodies import BODY_WATCHED, fault_of
from service.http.body_budget import FREE_BYTES
from service.http.classify import classify
from service.http.errors import refusal_of
from service.http.lifecycle import service_of
from service.http.openapi.schemas import StreamQuery
from service.http.predict import SCORE_BYTES
from service.http.stream.lines import LineSplitter
from service.http.stream.portions import (
    PORTION_BYTES,
    Item,
    LineReader,
    Options,
    Portion,
    error_line,
    unanswered,
)
from service.http.texts import TextMaker
from service.http.turns import Turn

# A line's time if nothing says otherwise: a job waits for other requests.
TIMEOUT_MS = 600_000
# Of the lines that wait for their answers: in this process, in a job, and in one of very many jobs
# that have such lines.
LINES = 32_768
MOST_LINES = 4096
LEAST_LINES = 64
WINDOW_BYTES = 2 * 2**20
# As many batches keep the device busy while answers are written and lines are read.
WINDOW_BATCHES = 4
# How long an engine may take no requests before the job ends, so that its client can go elsewhere:
# longer than it takes to replace one.
PATIENCE_SECONDS = 10.0
# Between two attempts.
_LEAST_WAIT, _MOST_WAIT = 0.02, 1.0
# The most that asyncio reads from a socket at a time.
_RECEIVED_BYTES = 2**18
# How often a job that waits for its client looks at the time.
_LOOK_SECONDS = 0.5


class Job:
    """Reads the body of a request and makes the lines of its answer.

    Args:
        query: what holds for lines that do not say otherwise.
    """

    def __init__(self, request: Request, query: StreamQuery) -> None:
        self._request = request
        self._service = service_of(request)
        settings = self._service.settings
        self._reader = LineReader(query, timeout_ms=TIMEOUT_MS, max_bytes=settings.max_body_bytes)
        self._splitter = LineSplitter(settings.max_body_bytes)
        self._make_text = TextMaker(request)
        self._share = self._service.body_budget.share_of(request.scope)
        info = self._service.engine.info
        # A job may keep all devices busy.
        self._window_tokens = WINDOW_BATCHES * info.devices * settings.batch_tokens(info.device)
        # A line that was read and belongs to the next portion.
        self._next: tuple[Item, Options] | None = None
        # In order; None is the end.
        self._portions: asyncio.Queue[tuple[Portion, asyncio.Task[None]] | None] = asyncio.Queue()
        self._tasks: set[asyncio.Task[None]] = set()
        self._lines = self._bytes = self._tokens = 0
        # Bytes of lines that were read and are in no portion that was begun.
        self._making = 0
        # Of what is held, in the budget of all bodies.
        self._counted = 0
        self._released = asyncio.Event()
        # Set once the server was asked for the body.
        self._asked = asyncio.Event()
        self._left = asyncio.Event()
        # When the client last sent a whole line or was last sent an answer.
        self._moved = monotonic()
        self._fault: Exception | None = None
        # Whether the whole body has come.
        self._ended = False

    async def answer(self) -> AsyncGenerator[bytes, None]:
        """The lines of the answer, in pieces, as they are done. The first piece is empty: by then
        the body is being read.

        Raises:
            ClientDisconnect: the client has gone; all work for it has ended.
        """
        self._request.scope.get("state", {})[BODY_WATCHED] = self._left.set
        reading = asyncio.create_task(self._read())
        leaving = asyncio.create_task(self._left.wait())
        try:
            # A client may wait to be told that it may send. An answer that has begun would tell it
            # not to.
            await self._asked.wait()
            yield b""
            while (portion := await self._done(leaving)) is not None:
                turn = Turn()
                for piece in portion.rendered():
                    yield piece
                    if turn.is_over():
                        await turn.give()
                self._release(portion)
        except Unavailable as error:
            self._fault = without_frames(error)
        finally:
            self._hold(-self._lines)
            await _end(reading, leaving, *self._tasks)
        if self._left.is_set() or isinstance(self._fault, ClientDisconnect):
            raise ClientDisconnect
        if self._fault is not None:
            self._request.scope["idspam.error"] = refusal_of(self._fault).kind.type
            yield error_line(self._fault, number=None) + b"\n"

    # Reading.

    async def _read(self) -> None:
        """Make portions as far as there is room, until the body or the service ends."""
        try:
            while True:
                portion = self._portion()
                if portion is None:
                    if not await self._receive():
                        break
                    continue
                await self._room(portion)
                if self._service.drains.is_set():
                    raise _draining()
                key = self._service.guard.renew()
                self._request.scope["idspam.weight"] = key.weight
                self._start(portion)
                await asyncio.sleep(0)
        except (ServiceError, AdapterError, ClientDisconnect) as error:
            self._fault = without_frames(error)
        finally:
            self._asked.set()
            self._portions.put_nowait(None)

    async def _receive(self) -> bool:
        """Take the next part of the body; whether there was one.

        Raises:
            BodyTimeout: the client is silent although nothing waits for an answer.
            EngineUnavailable: the service drains.
            ServiceError: what ended the body.
            ClientDisconnect: the client has gone.
        """
        if self._ended:
            return False
        # What was read is answered first, where the bodies of all leave no room.
        while self._lines and not self._share.fits(_RECEIVED_BYTES, "memory"):
            self._released.clear()
            await self._released.wait()
        receiving = asyncio.ensure_future(self._request.receive())
        try:
            if not self._asked.is_set():
                await asyncio.sleep(0)
                self._asked.set()
            while True:
                await asyncio.wait({receiving}, timeout=_LOOK_SECONDS)
                if receiving.done():
                    break
                if self._service.drains.is_set():
                    raise _draining()
                stall = self._service.settings.stall_seconds
                if not self._lines and monotonic() - self._moved > stall:
                    raise BodyTimeout(f"no whole line came in {stall:g} s, and none waits")
        finally:
            receiving.cancel()
        message = receiving.result()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        more = message.get("more_body", False)
        if more and (fault := fault_of(self._request.scope)) is not None:
            raise fault
        self._splitter.feed(message.get("body", b""))
        self._count()
        if not more:
            self._ended = True
            self._splitter.end()
        return True

    def _portion(self) -> Portion | None:
        """The next lines that have come and can be answered together; None if none has."""
        portion: Portion | None = None
        while True:
            following = self._next or self._read_line()
            self._next = None
            if following is None:
                return portion
            item, options = following
            if portion is None:
                portion = Portion(options, monotonic())
            full = (
                len(portion.items) >= portion.most_items or portion.size + item.size > PORTION_BYTES
            )
            if portion.items and (full or options != portion.options):
                self._next = following
                return portion
            portion.add(item)

    def _read_line(self) -> tuple[Item, Options] | None:
        line = self._splitter.next()
        if line is None:
            return None
        self._moved = monotonic()
        item, options = self._reader.read(line)
        self._making += item.size
        return item, options

    def _count(self) -> None:
        """Count what is held in the budget of all bodies.

        Raises:
            Overloaded: there is no room for what has come.
        """
        if (held := self._held) > self._counted:
            self._share.take(held - self._counted, "memory")
            self._counted = held
        else:
            self._give_back()

    def _give_back(self) -> None:
        """Count what is held no longer. Where there was no room for all that is held, that stays so
        until the job has ended."""
        if (held := self._held) < self._counted:
            self._share.give_back(self._counted - held, "memory")
            self._counted = held

    @property
    def _held(self) -> int:
        """Bytes beyond those that are free for every body."""
        held = self._splitter.held + self._making + self._bytes
        return held if held > FREE_BYTES else 0

    async def _room(self, portion: Portion) -> None:
        """Wait until a portion may be held beside those that wait for their answers."""
        while self._lines and not self._fits(portion):
            self._released.clear()
            await self._released.wait()

    def _fits(self, portion: Portion) -> bool:
        sharing = max(1, self._service.busy_jobs)
        lines = max(LEAST_LINES, min(MOST_LINES, LINES // sharing))
        return (
            self._lines + len(portion.items) <= lines
            and self._bytes + portion.size <= WINDOW_BYTES
            and self._tokens + portion.tokens <= self._window_tokens
        )

    def _hold(self, lines: int) -> None:
        """Count lines that wait for their answers. A job without any takes no room from others."""
        before, self._lines = self._lines, self._lines + lines
        self._service.busy_jobs += bool(self._lines) - bool(before)

    def _start(self, portion: Portion) -> None:
        self._hold(len(portion.items))
        self._bytes += portion.size
        self._tokens += portion.tokens
        self._making -= portion.size
        task = asyncio.create_task(self._answer(portion))
        self._tasks.add(task)
        task.add_done_callback(self._ended_task)
        self._portions.put_nowait((portion, task))

    def _ended_task(self, task: "asyncio.Task[None]") -> None:
        self._tasks.discard(task)
        # The first failure ends the job, so nobody asks for those of the portions after it.
        if not task.cancelled():
            task.exception()

    # Writing.

    async def _done(self, leaving: "asyncio.Task[bool]") -> Portion | None:
        """The next portion in order, once it is answered; None at the end.

        Raises:
            Unavailable: the engine takes no requests.
            ClientDisconnect: the client has gone.
        """
        following = await self._portions.get()
        if following is None:
            return None
        portion, task = following
        if not task.done():
            await asyncio.wait({task, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if self._left.is_set():
            raise ClientDisconnect
        task.result()
        return portion

    def _release(self, portion: Portion) -> None:
        self._hold(-len(portion.items))
        self._bytes -= portion.size
        self._tokens -= portion.tokens
        self._give_back()
        self._moved = monotonic()
        self._released.set()

    # Answering.

    async def _answer(self, portion: Portion) -> None:
        """Give every line of a portion its answer or its fault.

        Raises:
            Unavailable: the engine takes no requests.
        """
        await self._classify(portion, unanswered(portion.items))

    async def _classify(self, portion: Portion, items: list[Item]) -> None:
        try:
            await self._attempt(portion, items)
        except Unavailable:
            raise
        except (ServiceError, AdapterError) as error:
            items = unanswered(items)
            if len(items) == 1 or isinstance(error, DeadlineExceeded):
                for item in items:
                    item.fault = without_frames(error)
                return
            # All of a request are answered or none. Which of them is it?
            for item in items:
                await self._classify(portion, [item])

    async def _attempt(self, portion: Portion, items: list[Item]) -> None:
        """Ask the engine, again and again while it is busy.

        Raises:
            Unavailable: it takes no requests for longer than `PATIENCE_SECONDS`.
            DeadlineExceeded, ServiceError, AdapterError: a line cannot be answered.
        """
        unavailable_since: float | None = None
        while True:
            try:
                self._service.refuse_unless_ready()
                wait = self._service.guard.tokens_wait()
                if not wait:
                    await self._ask(portion, unanswered(items))
                    return
            except Overloaded as error:
                wait, unavailable_since = error.retry_after, None
            except Unavailable:
                now = monotonic()
                unavailable_since = unavailable_since or now
                patience = 0.0 if self._service.drains.is_set() else PATIENCE_SECONDS
                if now - unavailable_since >= patience or not self._service.health().live:
                    raise
                wait = _MOST_WAIT
            wait = min(max(wait, _LEAST_WAIT), _MOST_WAIT) * random.uniform(0.5, 1.0)
            if monotonic() + wait > portion.deadline:
                raise DeadlineExceeded("the deadline passed while the line waited for its turn")
            await asyncio.sleep(wait)

    async def _ask(self, portion: Portion, items: list[Item]) -> None:
        catalog, texts, asked = self._service.catalog, [], []
        for item in items:
            assert item.input is not None
            try:
                adapter = catalog.resolve(item.adapter)
            except (AdapterError, ServiceError) as error:
                if isinstance(error, Unavailable):
                    raise
                item.fault = without_frames(error)
                continue
            texts.append(self._make_text(adapter, item.input.text, item.input.text_pair, "text"))
            asked.append(item)
        if not texts:
            return
        options = portion.options
        answers = await classify(
            self._request,
            texts,
            deadline=portion.deadline,
            cut="tail" if options.truncate else "nothing",
            explain=options.explain,
            abstain_below=options.abstain_below,
            shape=AnswerShape(
                SCORE_BYTES,
                labels=True,
                top_k=options.top_k,
                advice="ask for fewer labels with `top_k`",
            ),
            bulk=True,
        )
        for index, item in enumerate(asked):
            item.answer, item.index = answers, index


def _draining() -> EngineUnavailable:
    return EngineUnavailable(
        "the service is draining: send the lines without an answer again, or to another replica"
    )


async def _end(*tasks: "asyncio.Task[Any]") -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
