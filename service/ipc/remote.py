"""The engine and its catalog as a worker has them: `service.backend.Backend` over a socket.

Whatever becomes of the engine's process, nobody waits for ever: a lost connection fails all that
wait on it, and the worker is not ready until the engine has welcomed it again.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from time import monotonic
from typing import Any, Protocol, TypeAlias

import zmq
from zmq.utils.monitor import parse_monitor_message

from adapters.format.store import Published
from service.catalog.entry import Condition
from service.catalog.view import Directory
from service.engine.interface import Completion, EngineHealth, EngineInfo, Entry
from service.engine.observer import FailureReason
from service.errors import DeadlineExceeded, EngineUnavailable, NotReady
from service.ipc.channel import Channel, Complaints, Outbox
from service.ipc.protocol import (
    Adapter,
    Alive,
    Answered,
    Applied,
    Beat,
    Cancel,
    Changed,
    Codec,
    Delete,
    Done,
    Failed,
    FromEngine,
    Goodbye,
    Hello,
    Message,
    Publish,
    Reload,
    Removed,
    Rollback,
    Settle,
    Stranger,
    Undecodable,
    Unload,
    Welcome,
    completion_of,
    conditions_of,
    entry_of,
    error_of,
    info_of,
    predict_of,
)

# --- merged from service.processes.link

logger = logging.getLogger(__name__)

LEASE_SECONDS = 2.0
SILENT_SECONDS = 10.0
_RECONNECT_MILLISECONDS = 50
_EVENTS = zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED


class Link:
    """Opened with `open`, on the event loop where it calls back.

    Args:
        worker: this worker's number.
        receive: called with every message but the link's own.
        lost: called with the reason, once for each connection that was welcomed or not.
        max_bytes: of a frame.
    """

    def __init__(
        self,
        context: "zmq.Context[zmq.Socket[bytes]]",
        endpoint: str,
        worker: int,
        *,
        receive: Callable[[FromEngine], None],
        lost: Callable[[str], None],
        max_bytes: int,
    ) -> None:
        self._context = context
        self._endpoint = endpoint
        self._worker = worker
        self._receive = receive
        self._lost = lost
        self._max_bytes = max_bytes
        self._codec: Codec[FromEngine] = Codec(FromEngine)
        self._complaints = Complaints(logger)
        self._channels: list[Channel] = []
        self._outbox: Outbox | None = None
        # When the last beat was sent, and when anything came last; None before the engine is there.
        self._sent = 0.0
        self._heard: float | None = None
        self._closed = False

    @property
    def fresh(self) -> bool:
        """Whether this worker may answer from what it knows."""
        return monotonic() - self._sent < LEASE_SECONDS

    def open(self) -> None:
        socket = self._context.socket(zmq.DEALER)
        socket.linger = 0
        # What waits is bounded by what the engine admits; a limit here could only block or drop.
        socket.sndhwm = socket.rcvhwm = 0
        socket.reconnect_ivl = _RECONNECT_MILLISECONDS
        monitor = socket.get_monitor_socket(_EVENTS)
        channel = Channel(socket, self._take)
        self._channels = [channel, Channel(monitor, self._note)]
        self._outbox = Outbox(channel.send, max_bytes=self._max_bytes)
        self._sent, self._heard = 0.0, None
        socket.connect(self._endpoint)

    def close(self) -> None:
        """Say farewell and be gone; nothing calls back any more."""
        self._closed = True
        self.put(Goodbye())
        self.flush()
        self._disconnect(linger_milliseconds=100)

    def put(self, message: Message) -> None:
        """Send with whatever else this turn of the loop sends."""
        if self._outbox is not None:
            self._outbox.put(message)

    def put_with(self, message: Message, attachment: bytes) -> None:
        if self._outbox is not None:
            self._outbox.put_with(message, attachment)

    def flush(self) -> None:
        if self._outbox is not None:
            self._outbox.flush()

    def check(self) -> None:
        """Give up a connection on which nothing comes any more; call this now and then."""
        if self._heard is not None and monotonic() - self._heard > SILENT_SECONDS:
            self._lose(f"the engine has been silent for {SILENT_SECONDS:.0f} seconds")

    def _take(self, frames: list[bytes]) -> None:
        self._heard = monotonic()
        try:
            messages = self._codec.decode(frames[0])
        except Undecodable as error:
            self._complaints.warn(f"refused a message of the engine: {error}")
            return
        channel = self._channels[0]
        for message in messages:
            if isinstance(message, Stranger):
                self._lose("the engine has given this worker up")
            elif isinstance(message, Beat):
                self._sent = max(self._sent, message.sent)
                self.put(Alive())
            # A connection may be lost by any message; what came on it says nothing any more.
            if not self._channels or self._channels[0] is not channel:
                return
            self._receive(message)

    def _note(self, frames: list[bytes]) -> None:
        event: Any = parse_monitor_message(frames)["event"]
        if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            self._heard = monotonic()
            self.put(Hello(self._worker))
        elif event == zmq.EVENT_DISCONNECTED:
            self._lose("the engine's process is gone")

    def _disconnect(self, *, linger_milliseconds: int = 0) -> None:
        self._outbox, self._heard = None, None
        for channel in reversed(self._channels):
            channel.close(linger_milliseconds)
        self._channels = []

    def _lose(self, reason: str) -> None:
        self._disconnect()
        self._lost(reason)
        # Not from within the callback of a socket that is just being closed.
        asyncio.get_running_loop().call_soon(self._reopen)

    def _reopen(self) -> None:
        if not self._channels and not self._closed:
            self.open()


# --- merged from service.processes.replica


class Changes(Protocol):
    """Asks the engine's process; errors are those of `Directory`, or EngineUnavailable."""

    async def publish(self, name: str, data: bytes, condition: Condition) -> Published: ...
    async def rollback(self, name: str, prefix: str | None, condition: Condition) -> str: ...
    async def delete(self, name: str, condition: Condition) -> None: ...
    async def unload(self, name: str) -> None: ...
    async def reload(self, name: str) -> str: ...
    async def settled(self, name: str) -> None: ...


class Replica(Directory):
    """As new as the last message: the engine answers a change only when every replica has it."""

    def __init__(self, root: Path, changes: Changes) -> None:
        super().__init__(root)
        self._changes = changes

    async def publish(self, name: str, data: bytes, condition: Condition) -> Published:
        return await self._changes.publish(name, data, condition)

    async def rollback(self, name: str, prefix: str | None, condition: Condition) -> str:
        return await self._changes.rollback(name, prefix, condition)

    async def delete(self, name: str, condition: Condition) -> None:
        await self._changes.delete(name, condition)

    async def unload(self, name: str) -> None:
        await self._changes.unload(name)

    async def reload(self, name: str) -> str:
        return await self._changes.reload(name)

    async def settled(self, name: str) -> None:
        await self._changes.settled(name)

    def reset(self, adapters: Sequence[Adapter]) -> None:
        """All there is."""
        self._entries = {item.name: entry_of(item, {}) for item in adapters}

    def put(self, adapter: Adapter) -> None:
        before = self._entries.get(adapter.name)
        self._entries[adapter.name] = entry_of(adapter, before.specs if before else {})

    def remove(self, name: str) -> None:
        self._entries.pop(name, None)


# --- merged from service.processes.remote


_Reply: TypeAlias = Answered | Done
_STARTING = "the engine's process is starting"
# The engine's own word on a deadline comes first, unless it hangs.
_LATE_SECONDS = 0.5
_SILENT = "the engine has not been heard of lately"


@dataclass(slots=True, eq=False)
class _Waiting:
    """rows: texts that are lost if no answer comes. deadline: of `time.monotonic`."""

    reply: "asyncio.Future[_Reply]"
    rows: int
    deadline: float | None

    def fail(self, error: Exception) -> None:
        if not self.reply.done():
            self.reply.set_exception(error)


class FailureObserver(Protocol):
    def failed(self, reason: FailureReason, rows: int) -> None: ...


class RemoteBackend:
    """Everything happens on the event loop that calls `start`.

    Args:
        worker: this worker's number.
        store: where the adapters' files are, for downloads.
        observer: told of texts that the engine's process could not fail itself.
        max_bytes: of a frame.
    """

    def __init__(
        self,
        context: "zmq.Context[zmq.Socket[bytes]]",
        endpoint: str,
        worker: int,
        *,
        store: Path,
        observer: FailureObserver,
        max_bytes: int,
    ) -> None:
        self._worker = worker
        self._link = Link(
            context, endpoint, worker, receive=self._receive, lost=self._lost, max_bytes=max_bytes
        )
        self.engine = RemoteEngine(self._link, observer)
        self.catalog = Replica(store, self.engine)
        self._welcomed = asyncio.Event()

    async def start(self) -> None:
        self._link.open()
        await self._welcomed.wait()

    async def stop(self) -> None:
        self._link.close()
        self.engine.leave("the service is stopped")

    def check(self) -> None:
        """What must be looked at now and then."""
        self._link.check()
        self.engine.expire()

    def health(self) -> EngineHealth:
        """This process lives as long as it answers; the engine's is healed by the supervisor."""
        health = self.engine.health()
        ready, reason = health.ready, health.reason
        if ready and not self._link.fresh:
            ready, reason = False, _SILENT
        details = {**health.details, "worker": self._worker}
        return EngineHealth(live=True, ready=ready, reason=reason, details=details)

    def refuse_unless_ready(self) -> None:
        if not (self.engine.welcomed and self._link.fresh):
            reason = self.health().reason or _SILENT
            raise (EngineUnavailable if self._welcomed.is_set() else NotReady)(reason)

    def _receive(self, message: FromEngine) -> None:
        match message:
            case Answered() | Done():
                self.engine.settle(message)
            case Failed():
                self.engine.fail(message)
            case Changed():
                self.catalog.put(message.adapter)
                self._link.put(Applied(message.change))
            case Removed():
                self.catalog.remove(message.name)
                self._link.put(Applied(message.change))
            case Beat():
                self.engine.beat = message
            case Welcome():
                self.catalog.reset(message.adapters)
                self.engine.join(info_of(message))
                self._welcomed.set()
                logger.info("welcomed by the engine adapters=%d", len(self.catalog))

    def _lost(self, reason: str) -> None:
        logger.warning("connection to the engine lost: %s", reason)
        self.engine.leave(reason)


class RemoteEngine:
    """`service.engine.interface.Predictor`, and the changes that a `Replica` asks for.

    Attributes:
        welcomed: whether the engine knows this worker, and so whether anything may be asked.
        beat: the last one of this connection.
    """

    def __init__(self, link: Link, observer: FailureObserver) -> None:
        self.welcomed = False
        self.beat: Beat | None = None
        self._link = link
        self._observer = observer
        self._info: EngineInfo | None = None
        self._reason = _STARTING
        self._numbers = count(1)
        self._pending: dict[int, _Waiting] = {}

    @property
    def info(self) -> EngineInfo:
        if self._info is None:
            raise NotReady(self._reason)
        return self._info

    async def predict(
        self, entries: Sequence[Entry], *, deadline: float | None = None
    ) -> Completion:
        if not entries:
            return Completion((), 0.0, 0.0)
        number = self._number()
        self._link.put(predict_of(number, entries, deadline))
        reply = await self._reply(number, rows=len(entries), deadline=deadline)
        assert isinstance(reply, Answered)
        return completion_of(reply, entries)

    async def drain(self) -> None:
        while self._pending:
            await asyncio.wait([waiting.reply for waiting in self._pending.values()])

    def health(self) -> EngineHealth:
        beat = self.beat
        if beat is None:
            return EngineHealth(live=True, ready=False, reason=self._reason)
        if beat.ready and not self.welcomed:
            reason = "reading the adapters"
            return EngineHealth(live=True, ready=False, reason=reason, details=beat.details)
        return EngineHealth(beat.live, beat.ready, beat.reason, beat.details)

    async def publish(self, name: str, data: bytes, condition: Condition) -> Published:
        number = self._number()
        self._link.put_with(Publish(number, name, conditions_of(condition)), data)
        done = await self._done(number)
        return Published(done.revision, done.created, done.changed)

    async def rollback(self, name: str, prefix: str | None, condition: Condition) -> str:
        number = self._number()
        self._link.put(Rollback(number, name, prefix, conditions_of(condition)))
        return (await self._done(number)).revision

    async def delete(self, name: str, condition: Condition) -> None:
        number = self._number()
        self._link.put(Delete(number, name, conditions_of(condition)))
        await self._done(number)

    async def unload(self, name: str) -> None:
        number = self._number()
        self._link.put(Unload(number, name))
        await self._done(number)

    async def reload(self, name: str) -> str:
        number = self._number()
        self._link.put(Reload(number, name))
        return (await self._done(number)).revision

    async def settled(self, name: str) -> None:
        number = self._number()
        self._link.put(Settle(number, name))
        await self._done(number)

    def join(self, info: EngineInfo) -> None:
        """The engine takes requests from now on."""
        self._info = info
        self.welcomed = True

    def leave(self, reason: str) -> None:
        """It takes none any more; whoever waits fails with EngineUnavailable."""
        self.welcomed, self.beat, self._reason = False, None, reason
        pending, self._pending = self._pending, {}
        if rows := sum(waiting.rows for waiting in pending.values()):
            self._observer.failed("unavailable", rows)
        for waiting in pending.values():
            waiting.fail(EngineUnavailable(reason))

    def expire(self) -> None:
        """Fail who should have had an answer by now: the engine, which keeps deadlines, hangs."""
        until = monotonic() - _LATE_SECONDS
        late = [
            number
            for number, waiting in self._pending.items()
            if waiting.deadline is not None and waiting.deadline < until
        ]
        for number in late:
            waiting = self._pending.pop(number)
            self._observer.failed("deadline", waiting.rows)
            waiting.fail(DeadlineExceeded("the deadline passed before the engine said anything"))
            self._link.put(Cancel(number))

    def settle(self, reply: _Reply) -> None:
        """Hand an answer to who waits for it, if still somebody does."""
        waiting = self._pending.pop(reply.id, None)
        if waiting is not None and not waiting.reply.done():
            waiting.reply.set_result(reply)

    def fail(self, failed: Failed) -> None:
        waiting = self._pending.pop(failed.id, None)
        if waiting is not None:
            waiting.fail(error_of(failed.fault))

    def _number(self) -> int:
        """
        Raises:
            EngineUnavailable: there is nobody to ask.
        """
        if not self.welcomed:
            raise EngineUnavailable(self._reason)
        return next(self._numbers)

    async def _done(self, number: int) -> Done:
        reply = await self._reply(number, rows=0, deadline=None)
        assert isinstance(reply, Done)
        return reply

    async def _reply(self, number: int, *, rows: int, deadline: float | None) -> _Reply:
        waiting = _Waiting(asyncio.get_running_loop().create_future(), rows, deadline)
        self._pending[number] = waiting
        try:
            return await waiting.reply
        except asyncio.CancelledError:
            if self._pending.pop(number, None) is not None:
                self._link.put(Cancel(number))
            raise
