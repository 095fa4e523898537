"""The engine's side of the socket: it welcomes workers and answers their requests.

A change is answered when every worker has applied it. A worker that sends nothing for
`GIVE_UP_SECONDS` is given up: its requests are cancelled, changes do not wait for it, and it must
say hello again.
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
from service.errors import Overloaded, ServiceError
from service.ipc.channel import Channel, Context, Outbox, RateLimitedWarnings
from service.ipc.child import BEAT_SECONDS
from service.ipc.further_engines import FurtherEngines
from service.ipc.protocol import (
    Adapter,
    Adapters,
    Applied,
    Cancel,
    CatalogUpdate,
    ChangeDone,
    ChangeRequest,
    Codec,
    DriftDone,
    DriftRequest,
    FromWorker,
    Goodbye,
    Heartbeat,
    HeartbeatReply,
    Hello,
    Inspect,
    KeepTexts,
    Predict,
    Preloaded,
    RequestFailed,
    UncertainDone,
    UncertainRequest,
    Undecodable,
    UnknownWorker,
    UsedRevisions,
    adapter_of,
    change_of,
    encode,
    engine_load_of,
    entries_of,
    failed_instead,
    fault_of,
    inspect_done_of,
    predict_done_of,
    welcome_of,
)
from service.ipc.remote import LEASE_SECONDS
from service.observability.logs import request_id

logger = logging.getLogger(__name__)

# Once the engine stops waiting for a worker, that worker's lease has expired: both begin when the
# engine last heard of it. So it cannot serve stale revisions.
GIVE_UP_SECONDS = LEASE_SECONDS

# While requests come, workers hear this often how busy the engine is. It is calm if everything that
# waits will be done within `_CALM_WAIT_SECONDS`.
LOAD_SECONDS = 0.02
CALM_LOAD_SECONDS = 0.2
_CALM_WAIT_SECONDS = 0.1
# The catalog is sent in parts of so many adapters, and requests are answered between two of them:
# to encode that of ten thousand takes a second.
_PART = 64
# Workers that come within this time of each other get the same adapters, encoded once.
_KEPT_SECONDS = 5.0

_UNKNOWN_WORKER = encode([UnknownWorker()])


@dataclass(slots=True, eq=False)
class _Worker:
    """A worker that said hello, or the engine of a further device. heard: when it last sent
    anything. applied: the last catalog update that it has. tasks: its requests, by number.
    welcoming: sends it the catalog; None: nothing was sent of it. has_all: all of it was sent."""

    number: int
    further: bool
    outbox: Outbox
    heard: float
    applied: int = 0
    tasks: dict[int, "asyncio.Task[None]"] = field(default_factory=dict)
    welcoming: "asyncio.Task[None] | None" = None
    has_all: bool = False


class EngineServer:
    """Binds when created; welcomes workers after `open`.

    Args:
        backend: answers the workers' requests; may still be starting.
        max_bytes: of a frame; a peer that sends a larger one is disconnected.
        others: keeps the engines of further devices, which connect like workers.
    """

    def __init__(
        self,
        context: Context,
        endpoint: str,
        backend: Backend,
        *,
        max_bytes: int,
        others: FurtherEngines | None = None,
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
        self._warnings = RateLimitedWarnings(logger)
        self._workers: dict[bytes, _Worker] = {}
        self._others = FurtherEngines() if others is None else others
        self._open = False
        self._update = 0
        # By name: the specs that every worker has to which all of the catalog was sent.
        self._known_specs: dict[str, Mapping[str, AdapterSpec]] = {}
        # Whole adapters as messages: made once for all workers that come at the same time.
        self._whole: dict[str, Adapter] = {}
        self._whole_timer: asyncio.TimerHandle | None = None
        self._progress = asyncio.Event()
        self._last_beat = monotonic()
        self._loop = asyncio.get_running_loop()
        self._calm = True
        self._load_timer: asyncio.TimerHandle | None = None
        self._channel = Channel(socket, self._receive)

    def open(self) -> None:
        """The backend is ready: welcome the workers. The catalog must report to `update` by now."""
        self._open = True
        self._known_specs = {entry.name: entry.specs for entry in self._backend.catalog.entries()}
        for identity, worker in self._workers.items():
            self._welcome(identity, worker)
        self.beat()

    def close(self) -> None:
        for identity in list(self._workers):
            self._give_up(identity)
        self._channel.close()

    def beat(self) -> None:
        """Send every worker a heartbeat, and give up those that have gone silent."""
        now = monotonic()
        late, self._last_beat = now - self._last_beat > 2 * BEAT_SECONDS, now
        for identity, worker in list(self._workers.items()):
            # After a pause of this process, what they sent meanwhile has not been read yet.
            if now - worker.heard > GIVE_UP_SECONDS and not late:
                kind = "engine" if worker.further else "worker"
                self._warnings.warn(f"{kind} {worker.number} is silent and given up")
                self._give_up(identity)
            else:
                worker.outbox.send(self._heartbeat(worker))
        self._send_load()

    def renewed(self) -> None:
        """Tell every worker at once that a replica's lease goes on."""
        for worker in self._workers.values():
            worker.outbox.send(self._heartbeat(worker))

    def update(self, name: str, entry: CatalogEntry | None) -> None:
        """Send a name's new entry to every worker: `service.catalog.catalog.Catalog.on_update`."""
        self._update += 1
        self._whole.pop(name, None)
        adapter = None
        if entry is None:
            self._known_specs.pop(name, None)
        else:
            adapter = adapter_of(entry, self._known_specs.get(name, {}))
            self._known_specs[name] = entry.specs
        for worker in self._workers.values():
            sent = adapter if worker.has_all or entry is None else self._whole_of(entry)
            worker.outbox.send(CatalogUpdate(self._update, name, sent))

    async def updated_everywhere(self) -> None:
        """Return when every worker has every update up to now."""
        update = self._update
        while any(worker.applied < update for worker in self._workers.values()):
            self._progress.clear()
            await self._progress.wait()

    def _receive(self, frames: list[bytes]) -> None:
        identity, *parts = frames
        try:
            if len(parts) != 1:
                raise Undecodable(f"{len(parts)} parts")
            messages = self._codec.decode(parts[0])
        except Undecodable as error:
            self._warnings.warn(f"refused a message: {error}")
            self._give_up(identity)
            return
        for message in messages:
            if isinstance(message, Hello):
                self._meet(identity, message)
            elif (worker := self._workers.get(identity)) is None:
                self._channel.send([identity, _UNKNOWN_WORKER])
                return
            else:
                worker.heard = monotonic()
                self._handle(identity, worker, message)

    def _meet(self, identity: bytes, hello: Hello) -> None:
        for known, worker in list(self._workers.items()):
            # The worker of this number is dead and replaced, or is back on another connection.
            same = (worker.number, worker.further) == (hello.worker, hello.further)
            if known == identity or same:
                self._give_up(known)
        outbox = Outbox(
            partial(self._send, identity), max_bytes=self._max_bytes, instead=failed_instead
        )
        worker = _Worker(hello.worker, hello.further, outbox, monotonic())
        self._workers[identity] = worker
        if hello.further:
            self._others.add(identity, outbox)
        worker.outbox.send(self._heartbeat(worker))
        if self._open:
            self._welcome(identity, worker)

    def _welcome(self, identity: bytes, worker: _Worker) -> None:
        worker.applied = self._update
        worker.outbox.send(welcome_of(self._backend.engine.info))
        worker.welcoming = self._loop.create_task(self._send_catalog(identity, worker))

    async def _send_catalog(self, identity: bytes, worker: _Worker) -> None:
        """Send it part by part. What is changed meanwhile reaches the worker as an update."""
        catalog = self._backend.catalog
        names = [entry.name for entry in catalog.entries()]
        try:
            for start in range(0, len(names), _PART):
                # A name may have been deleted meanwhile.
                found = map(catalog.find, names[start : start + _PART])
                part = [self._whole_of(entry) for entry in found if entry is not None]
                worker.outbox.send(Adapters(part, last=False))
                await asyncio.sleep(0)
            worker.outbox.send(Adapters([], last=True))
            worker.has_all = True
        except Exception:
            logger.exception("worker %d cannot be sent the catalog", worker.number)
            self._give_up(identity)
        finally:
            if self._whole_timer is not None:
                self._whole_timer.cancel()
            self._whole_timer = self._loop.call_later(_KEPT_SECONDS, self._whole.clear)

    def _whole_of(self, entry: CatalogEntry) -> Adapter:
        whole = self._whole.get(entry.name)
        if whole is None:
            whole = self._whole[entry.name] = adapter_of(entry, {})
        return whole

    def _handle(self, identity: bytes, worker: _Worker, message: FromWorker) -> None:
        match message:
            case Predict():
                # It removes itself: a callback for that would be another turn of the loop.
                worker.tasks[message.id] = self._loop.create_task(self._predict(worker, message))
            case ChangeRequest():
                self._begin(worker, message.id, self._change(worker, message))
            case DriftRequest():
                self._begin(worker, message.id, self._report_drift(worker, message))
            case UncertainRequest():
                self._begin(worker, message.id, self._uncertain(worker, message))
            case KeepTexts():
                self._backend.drift.keep(message.texts)
            case Inspect():
                self._begin(worker, message.id, self._inspect(worker, message))
            case Cancel():
                # One that has not begun yet never does.
                if (task := worker.tasks.pop(message.id, None)) is not None:
                    task.cancel()
            case Applied():
                worker.applied = max(worker.applied, message.update)
                self._progress.set()
            case Goodbye():
                self._give_up(identity)
            case Preloaded() | UsedRevisions():
                self._others.answered(message)
            case HeartbeatReply():
                # Otherwise the lease would begin with the answer to the heartbeat before.
                worker.outbox.send(self._heartbeat(worker, asks=False))
            case Hello():
                pass
            case _:
                self._others.reported(message)

    def _begin(self, worker: _Worker, number: int, work: Coroutine[Any, Any, None]) -> None:
        worker.tasks[number] = task = self._loop.create_task(work)
        task.add_done_callback(lambda _: worker.tasks.pop(number, None))

    async def _predict(self, worker: _Worker, request: Predict) -> None:
        try:
            if self._load_timer is None:
                self._send_load_within(CALM_LOAD_SECONDS if self._calm else LOAD_SECONDS)
            entries = entries_of(request)
            completion = await self._backend.engine.predict(
                entries,
                deadline=request.deadline,
                client=request.client,
                weight=request.weight,
                bulk=request.bulk,
                elsewhere=request.elsewhere,
            )
            worker.outbox.send(predict_done_of(request.id, completion))
        except Exception as error:
            if self._calm and isinstance(error, Overloaded):
                self._calm = False
                self._send_load_within(LOAD_SECONDS)
            self._fail(worker, request.id, error)
        finally:
            worker.tasks.pop(request.id, None)

    def _send_load_within(self, seconds: float) -> None:
        if self._load_timer is not None:
            self._load_timer.cancel()
        self._load_timer = self._loop.call_later(seconds, self._send_load)

    async def _report_drift(self, worker: _Worker, request: DriftRequest) -> None:
        try:
            report = await self._backend.drift.report(request.name, request.revision)
            worker.outbox.send(DriftDone(request.id, report))
        except Exception as error:
            self._fail(worker, request.id, error)

    async def _uncertain(self, worker: _Worker, request: UncertainRequest) -> None:
        drift = self._backend.drift
        try:
            removed = 0
            if request.forget:
                removed = await drift.forget(request.name)
                self._others.forget(request.name)
            texts = [] if request.forget else await drift.uncertain(request.name)
            worker.outbox.send(UncertainDone(request.id, texts, removed))
        except Exception as error:
            self._fail(worker, request.id, error)

    def _send_load(self) -> None:
        """Tell the workers how busy the engine is, so that they refuse what it would refuse."""
        if self._load_timer is not None:
            self._load_timer.cancel()
            self._load_timer = None
        load = self._backend.engine.load
        if load is not None:
            waits = [load.otherwise, *(seconds for seconds, _ in load.waits.values())]
            self._calm = max(waits) < _CALM_WAIT_SECONDS
            message = engine_load_of(load, len(self._workers) - len(self._others))
            for worker in self._workers.values():
                worker.outbox.send(message)

    async def _change(self, worker: _Worker, request: ChangeRequest) -> None:
        # Of this task alone: what it logs names the request.
        request_id.set(request.request_id)
        try:
            self._backend.refuse_unless_ready()
            result = await self._backend.catalog.apply(change_of(request))
        except Exception as error:
            # A failed change may still have updated the catalog: it stops serving damaged files.
            await self.updated_everywhere()
            self._fail(worker, request.id, error)
            return
        await self.updated_everywhere()
        worker.outbox.send(ChangeDone(request.id, result))

    async def _inspect(self, worker: _Worker, request: Inspect) -> None:
        try:
            self._backend.refuse_unless_ready()
            inspection = await self._backend.catalog.inspected(request.file)
            worker.outbox.send(inspect_done_of(request.id, inspection))
        except Exception as error:
            self._fail(worker, request.id, error)

    def _fail(self, worker: _Worker, number: int, error: Exception) -> None:
        if not isinstance(error, (AdapterError, ServiceError)):
            logger.error("a request of worker %d failed", worker.number, exc_info=error)
        worker.outbox.send(RequestFailed(number, fault_of(error)))

    def _heartbeat(self, worker: _Worker, *, asks: bool = True) -> Heartbeat:
        health = self._backend.health()
        return Heartbeat(
            heard=worker.heard,
            live=health.live,
            ready=health.ready,
            reason=health.reason,
            details=dict(health.details),
            lease=health.lease,
            asks=asks,
        )

    def _send(self, identity: bytes, frames: Any) -> bool:
        if self._channel.send([identity, *frames]):
            return True
        self._give_up(identity)
        return False

    def _give_up(self, identity: bytes) -> None:
        worker = self._workers.pop(identity, None)
        self._others.remove(identity)
        if worker is not None:
            if worker.welcoming is not None:
                worker.welcoming.cancel()
            for task in list(worker.tasks.values()):
                task.cancel()
            self._progress.set()
            # If it is alive after all, it learns at once that it must say hello again.
            self._channel.send([identity, _UNKNOWN_WORKER])
