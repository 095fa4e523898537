"""The workers as the engine's process sees them: who is there, what they ask, what they know.

A change is answered when every worker has applied it. One that says nothing for `GIVE_UP_SECONDS`
is given up: its requests are cancelled, it is not waited for, and it must say hello again.
"""

import asyncio
import logging
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass, field
from functools import partial
from time import monotonic
from typing import Any

import zmq

from adapters.errors import AdapterError
from adapters.format.spec import AdapterSpec
from service.backend import Backend
from service.catalog.entry import CatalogEntry
from service.errors import ServiceError
from service.ipc.channel import Channel, Complaints, Outbox
from service.ipc.child import BEAT_SECONDS
from service.ipc.protocol import (
    Alive,
    Applied,
    Beat,
    Cancel,
    Change,
    Changed,
    Codec,
    Delete,
    Done,
    Failed,
    FromWorker,
    Goodbye,
    Hello,
    Malformed,
    Message,
    Predict,
    Publish,
    Reload,
    Removed,
    Rollback,
    Settle,
    Stranger,
    Undecodable,
    Unload,
    adapter_of,
    answered_of,
    condition_of,
    encode,
    entries_of,
    fault_of,
    welcome_of,
)
from service.ipc.remote import LEASE_SECONDS

logger = logging.getLogger(__name__)

GIVE_UP_SECONDS = LEASE_SECONDS

_STRANGER = encode([Stranger()])


@dataclass(slots=True, eq=False)
class _Peer:
    """A worker that said hello. heard: when it spoke last. applied: the last change it has."""

    number: int
    outbox: Outbox
    heard: float
    applied: int = 0
    tasks: dict[int, "asyncio.Task[None]"] = field(default_factory=dict)


class Hub:
    """Binds when made; welcomes workers from `open` on.

    Args:
        backend: asked by the workers; may be starting still.
        max_bytes: of a frame; whoever sends a larger one is disconnected.
    """

    def __init__(
        self,
        context: "zmq.Context[zmq.Socket[bytes]]",
        endpoint: str,
        backend: Backend,
        *,
        max_bytes: int,
    ) -> None:
        socket = context.socket(zmq.ROUTER)
        socket.linger = 0
        socket.sndhwm = socket.rcvhwm = 0
        socket.router_mandatory = 1
        socket.maxmsgsize = max_bytes
        socket.bind(endpoint)
        self._backend = backend
        self._max_bytes = max_bytes
        self._codec: Codec[FromWorker] = Codec(FromWorker)
        self._complaints = Complaints(logger)
        self._peers: dict[bytes, _Peer] = {}
        self._open = False
        self._change = 0
        # By name: what every welcomed worker has been told of its revisions.
        self._told: dict[str, Mapping[str, AdapterSpec]] = {}
        self._progress = asyncio.Event()
        self._beaten = monotonic()
        self._loop = asyncio.get_running_loop()
        self._channel = Channel(socket, self._take)

    def open(self) -> None:
        """The backend is ready: welcome who waits. Its catalog must tell this hub of changes."""
        self._open = True
        self._told = {entry.name: entry.specs for entry in self._backend.catalog.entries()}
        for peer in self._peers.values():
            self._welcome(peer)
        self.beat()

    def close(self) -> None:
        for identity in list(self._peers):
            self._give_up(identity)
        self._channel.close()

    def beat(self) -> None:
        """Tell the workers that the engine lives, and give up those that do not say so."""
        now = monotonic()
        late, self._beaten = now - self._beaten > 2 * BEAT_SECONDS, now
        for identity, peer in list(self._peers.items()):
            # After a pause of this process what they said meanwhile has not been read yet.
            if now - peer.heard > GIVE_UP_SECONDS and not late:
                self._complaints.warn(f"worker {peer.number} is silent and given up")
                self._give_up(identity)
            else:
                peer.outbox.put(self._health(now))

    # The catalog's follower.

    def changed(self, entry: CatalogEntry) -> None:
        self._change += 1
        adapter = adapter_of(entry, self._told.get(entry.name, {}))
        self._told[entry.name] = entry.specs
        self._tell(Changed(self._change, adapter))

    def removed(self, name: str) -> None:
        self._change += 1
        self._told.pop(name, None)
        self._tell(Removed(self._change, name))

    def _tell(self, message: Message) -> None:
        for peer in self._peers.values():
            peer.outbox.put(message)

    async def _everywhere(self) -> None:
        """Return when every worker has what has changed until now."""
        change = self._change
        while any(peer.applied < change for peer in self._peers.values()):
            self._progress.clear()
            await self._progress.wait()

    # What workers say.

    def _take(self, frames: list[bytes]) -> None:
        identity, *parts = frames
        try:
            if not 1 <= len(parts) <= 2:
                raise Undecodable(f"{len(parts)} parts")
            messages = self._codec.decode(parts[0])
        except Undecodable as error:
            self._complaints.warn(f"refused a message: {error}")
            self._give_up(identity)
            return
        for message in messages:
            if isinstance(message, Hello):
                self._meet(identity, message)
            elif (peer := self._peers.get(identity)) is None:
                self._channel.send([identity, _STRANGER])
                return
            else:
                peer.heard = monotonic()
                self._hear(identity, peer, message, parts[1:])

    def _meet(self, identity: bytes, hello: Hello) -> None:
        for known, peer in list(self._peers.items()):
            # Its predecessor is dead, or it comes back on another connection.
            if known == identity or peer.number == hello.worker:
                self._give_up(known)
        send = partial(self._send, identity)
        outbox = Outbox(send, max_bytes=self._max_bytes)
        peer = self._peers[identity] = _Peer(hello.worker, outbox, monotonic())
        peer.outbox.put(self._health(monotonic()))
        if self._open:
            self._welcome(peer)

    def _welcome(self, peer: _Peer) -> None:
        peer.applied = self._change
        entries = self._backend.catalog.entries()
        peer.outbox.put(welcome_of(self._backend.engine.info, entries))

    def _hear(
        self, identity: bytes, peer: _Peer, message: FromWorker, attached: list[bytes]
    ) -> None:
        match message:
            case Predict():
                self._begin(peer, message.id, self._answer(peer, message))
            case Cancel():
                if (task := peer.tasks.get(message.id)) is not None:
                    task.cancel()
            case Applied():
                peer.applied = max(peer.applied, message.change)
                self._progress.set()
            case Publish() | Rollback() | Delete() | Unload() | Reload() | Settle():
                self._begin(peer, message.id, self._apply(peer, message, attached))
            case Goodbye():
                self._give_up(identity)
            case Alive() | Hello():
                pass

    def _begin(self, peer: _Peer, number: int, work: Coroutine[Any, Any, None]) -> None:
        peer.tasks[number] = task = self._loop.create_task(work)
        task.add_done_callback(lambda _: peer.tasks.pop(number, None))

    async def _answer(self, peer: _Peer, asked: Predict) -> None:
        try:
            entries = entries_of(asked)
            completion = await self._backend.engine.predict(entries, deadline=asked.deadline)
            peer.outbox.put(answered_of(asked.id, completion))
        except Exception as error:
            self._fail(peer, asked.id, error)

    async def _apply(self, peer: _Peer, asked: Change, attached: list[bytes]) -> None:
        try:
            done = await self._done(asked, attached)
        except Exception as error:
            # A failure may be news as well: what was found damaged is served nowhere any more.
            await self._everywhere()
            self._fail(peer, asked.id, error)
            return
        await self._everywhere()
        peer.outbox.put(done)

    async def _done(self, asked: Change, attached: list[bytes]) -> Done:
        self._backend.refuse_unless_ready()
        catalog = self._backend.catalog
        match asked:
            case Publish():
                if len(attached) != 1:
                    raise Malformed("an upload without its file")
                made = await catalog.publish(asked.name, attached[0], condition_of(asked.condition))
                return Done(asked.id, made.revision, made.created, made.changed)
            case Rollback():
                condition = condition_of(asked.condition)
                revision = await catalog.rollback(asked.name, asked.prefix, condition)
                return Done(asked.id, revision, False, True)
            case Delete():
                await catalog.delete(asked.name, condition_of(asked.condition))
            case Unload():
                await catalog.unload(asked.name)
            case Reload():
                return Done(asked.id, await catalog.reload(asked.name), False, True)
            case Settle():
                await catalog.settled(asked.name)
        return Done(asked.id, "", False, False)

    def _fail(self, peer: _Peer, number: int, error: Exception) -> None:
        if not isinstance(error, (AdapterError, ServiceError)):
            logger.error("a request of worker %d failed", peer.number, exc_info=error)
        peer.outbox.put(Failed(number, fault_of(error)))

    def _health(self, now: float) -> Beat:
        health = self._backend.health()
        return Beat(now, health.live, health.ready, health.reason, dict(health.details))

    def _send(self, identity: bytes, frames: Any) -> bool:
        if self._channel.send([identity, *frames]):
            return True
        self._give_up(identity)
        return False

    def _give_up(self, identity: bytes) -> None:
        peer = self._peers.pop(identity, None)
        if peer is not None:
            for task in list(peer.tasks.values()):
                task.cancel()
            self._progress.set()
            # If it is there after all, it learns at once that it must come back.
            self._channel.send([identity, _STRANGER])
