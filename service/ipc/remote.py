"""A worker's side of the socket: `service.backend.Backend` with the engine in another process.

Nothing waits for ever, whatever happens to the engine's process: a lost connection fails everything
that waits for an answer, and the worker is not ready until the engine has welcomed it again.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from time import monotonic
from typing import Any, TypeAlias, TypeVar

import zmq
from zmq.utils.monitor import parse_monitor_message

from adapters.format.uploads import ReceivedFile
from service.catalog.entry import CatalogEntry, Change, ChangeResult, Inspection
from service.catalog.view import CatalogView
from service.drift.interface import DriftReport, UncertainText
from service.engine.interface import Completion, EngineHealth, EngineInfo, Entry, Predictor
from service.engine.load import FlowKey, Load, flow_of
from service.engine.observer import Observer
from service.errors import DeadlineExceeded, EngineUnavailable, LeaseExpired, NotReady
from service.ipc.channel import Channel, Context, Outbox, RateLimitedWarnings
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
    EngineLoad,
    FromEngine,
    Goodbye,
    Heartbeat,
    HeartbeatReply,
    Hello,
    Inspect,
    InspectDone,
    KeepTexts,
    Malformed,
    Message,
    Predict,
    PredictDone,
    RequestFailed,
    UncertainDone,
    UncertainRequest,
    Undecodable,
    UnknownWorker,
    Welcome,
    change_request_of,
    completion_of,
    entry_of,
    error_of,
    fault_of,
    info_of,
    inspection_of,
    load_of,
    predict_of,
)
from service.replicas.lease import lease_time

logger = logging.getLogger(__name__)

# A worker may answer for this long after the engine last heard of it, as far as the worker knows.
# The engine waits for a silent worker for as long, so that it never serves stale revisions.
LEASE_SECONDS = 2.0
SILENT_SECONDS = 10.0
_RECONNECT_MILLISECONDS = 50
# After a message that cannot be used, which may come again: to be welcomed costs the engine time.
_PAUSE_SECONDS = 1.0
_MONITORED = zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED
# The engine fails requests at their deadline, unless it hangs; a worker waits this much longer.
_GRACE_SECONDS = 0.5
_STARTING = "the engine's process is starting"
_NO_HEARTBEAT = "the engine has not been heard of lately"
_NO_LEASE = "the replica's lease is over"

Reply: TypeAlias = PredictDone | ChangeDone | InspectDone | DriftDone | UncertainDone
R = TypeVar("R", PredictDone, ChangeDone, InspectDone, DriftDone, UncertainDone)


class Connection:
    """The connection to the engine's process, opened again whenever it is lost.

    Args:
        worker: this worker's number, or that of a further engine.
        receive: called with every message, except `UnknownWorker`.
        lost: called with the reason each time a connection is lost.
        max_bytes: of a frame.
        further: this process has an engine that follows the other one.
    """

    def __init__(
        self,
        context: Context,
        endpoint: str,
        worker: int,
        *,
        receive: Callable[[FromEngine], None],
        lost: Callable[[str], None],
        max_bytes: int,
        further: bool = False,
    ) -> None:
        self._context = context
        self._endpoint = endpoint
        self._hello = Hello(worker, further)
        self._deliver = receive
        self._lost = lost
        self._max_bytes = max_bytes
        self._codec: Codec[FromEngine] = Codec(FromEngine)
        self._warnings = RateLimitedWarnings(logger)
        self._channels: list[Channel] = []
        self._outbox: Outbox | None = None
        # When the engine last heard of this worker, which the heartbeats say. The time of a
        # heartbeat itself would not do: those sent to a stopped worker wait for it.
        self._lease_began = 0.0
        # When anything last came; None until connected.
        self._heard: float | None = None
        self._closed = False

    @property
    def fresh(self) -> bool:
        """Whether this worker's lease holds, so that it may answer from its copy of the catalog."""
        return monotonic() - self._lease_began < LEASE_SECONDS

    def open(self) -> None:
        """Connect; callbacks come on the running event loop."""
        socket = self._context.socket(zmq.DEALER)
        socket.linger = 0
        # The engine bounds what waits by admission; a limit here could only block or drop.
        socket.sndhwm = socket.rcvhwm = 0
        socket.reconnect_ivl = _RECONNECT_MILLISECONDS
        monitor = socket.get_monitor_socket(_MONITORED)
        channel = Channel(socket, self._receive)
        self._channels = [channel, Channel(monitor, self._connection_changed)]
        self._outbox = Outbox(channel.send, max_bytes=self._max_bytes, instead=self._refused)
        self._lease_began, self._heard = 0.0, None
        socket.connect(self._endpoint)

    def close(self) -> None:
        """Say goodbye and disconnect; there are no more callbacks."""
        self._closed = True
        self.send(Goodbye())
        if self._outbox is not None:
            self._outbox.flush()
        self._disconnect(linger_milliseconds=100)

    def send(self, message: Message) -> None:
        """Send a message in the next frame."""
        if self._outbox is not None:
            self._outbox.send(message)

    def _refused(self, message: Message, error: Exception) -> None:
        """Answer a request that cannot be encoded as the engine would: with its failure."""
        if isinstance(message, (Predict, ChangeRequest, DriftRequest, UncertainRequest, Inspect)):
            self._deliver(RequestFailed(message.id, fault_of(error)))

    def check(self) -> None:
        """Give up a connection on which nothing arrives; call this regularly."""
        if self._heard is not None and monotonic() - self._heard > SILENT_SECONDS:
            self._lose(f"the engine has been silent for {SILENT_SECONDS:.0f} seconds")

    def _receive(self, frames: list[bytes]) -> None:
        self._heard = monotonic()
        try:
            messages = self._codec.decode(frames[0])
        except Undecodable as error:
            self._warnings.warn(f"refused a message of the engine: {error}")
            return
        channel = self._channels[0]
        for message in messages:
            if isinstance(message, UnknownWorker):
                self._lose("the engine has given this worker up")
            elif isinstance(message, Heartbeat):
                self._lease_began = max(self._lease_began, message.heard)
                if message.asks:
                    self.send(HeartbeatReply())
            # Any message may lose the connection; the messages after it are void.
            if not self._channels or self._channels[0] is not channel:
                return
            try:
                self._deliver(message)
            except Exception:
                # What it lacks now, such as a change of the catalog, it gets when it is welcomed.
                logger.exception("a message of the engine cannot be used")
                self._lose("a message of the engine cannot be used", pause=_PAUSE_SECONDS)
                return

    def _connection_changed(self, frames: list[bytes]) -> None:
        event: Any = parse_monitor_message(frames)["event"]
        if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            self._heard = monotonic()
            self.send(self._hello)
        elif event == zmq.EVENT_DISCONNECTED:
            self._lose("the engine's process is gone")

    def _disconnect(self, *, linger_milliseconds: int = 0) -> None:
        self._outbox, self._heard = None, None
        for channel in reversed(self._channels):
            channel.close(linger_milliseconds)
        self._channels = []

    def _lose(self, reason: str, *, pause: float = 0.0) -> None:
        """Connect anew after so many seconds."""
        self._disconnect()
        self._lost(reason)
        # Not now: the caller may be a callback of the socket that is being closed.
        asyncio.get_running_loop().call_later(pause, self._reopen)

    def _reopen(self) -> None:
        if not self._channels and not self._closed:
            self.open()


@dataclass(slots=True, eq=False)
class _Pending:
    """rows: texts that fail if no answer comes. deadline: on the clock of `time.monotonic`."""

    reply: "asyncio.Future[Reply]"
    rows: int
    deadline: float | None

    def fail(self, error: Exception) -> None:
        if not self.reply.done():
            self.reply.set_exception(error)


class Requests:
    """The requests that wait for the engine's answer.

    Args:
        counts_lost: report what is lost with the connection as failed. Otherwise whoever asks does
            so, after another engine has been asked.

    Attributes:
        unavailable: why the engine takes no requests; None: it has welcomed this worker.
    """

    def __init__(
        self, connection: Connection, observer: Observer, *, counts_lost: bool = True
    ) -> None:
        self.unavailable: str | None = _STARTING
        self._counts_lost = counts_lost
        self._connection = connection
        self._observer = observer
        self._numbers = count(1)
        self._pending: dict[int, _Pending] = {}

    async def ask(
        self,
        reply_type: type[R],
        request: Callable[[int], Message],
        *,
        rows: int = 0,
        deadline: float | None = None,
    ) -> R:
        """Send a request and return its reply. Cancelling the call cancels it in the engine, too.

        Args:
            request: creates the message from the request's number.

        Raises:
            EngineUnavailable: the engine is not reachable, or was lost before it answered.
            Malformed: the reply is of another type.
            Exception: the error that the engine answered with.
        """
        if self.unavailable is not None:
            raise EngineUnavailable(self.unavailable)
        number = next(self._numbers)
        self._connection.send(request(number))
        pending = _Pending(asyncio.get_running_loop().create_future(), rows, deadline)
        self._pending[number] = pending
        try:
            reply = await pending.reply
        except asyncio.CancelledError:
            if self._pending.pop(number, None) is not None:
                self._connection.send(Cancel(number))
            raise
        if not isinstance(reply, reply_type):
            raise Malformed("the answer is of another type than its request")
        return reply

    async def drain(self) -> None:
        """Return when nothing waits any more."""
        while self._pending:
            await asyncio.wait([pending.reply for pending in self._pending.values()])

    def answer(self, reply: Reply) -> None:
        pending = self._pending.pop(reply.id, None)
        if pending is not None and not pending.reply.done():
            pending.reply.set_result(reply)

    def fail(self, failed: RequestFailed) -> None:
        pending = self._pending.pop(failed.id, None)
        if pending is not None:
            pending.fail(error_of(failed.fault))

    def fail_all(self, reason: str) -> None:
        """The engine is lost: what waits, and what comes, fails with EngineUnavailable."""
        self.unavailable = reason
        pending, self._pending = self._pending, {}
        rows = sum(request.rows for request in pending.values())
        if rows and self._counts_lost:
            self._observer.failed("unavailable", rows)
        for request in pending.values():
            request.fail(EngineUnavailable(reason))

    def expire(self) -> None:
        """Fail requests well past their deadline: the engine, which keeps deadlines, hangs."""
        until = monotonic() - _GRACE_SECONDS
        late = [
            number
            for number, pending in self._pending.items()
            if pending.deadline is not None and pending.deadline < until
        ]
        for number in late:
            pending = self._pending.pop(number)
            self._observer.failed("deadline", pending.rows)
            pending.fail(DeadlineExceeded("the deadline passed before the engine answered"))
            self._connection.send(Cancel(number))


class RemoteEngine:
    """`service.engine.interface.Predictor` over the socket."""

    def __init__(self, requests: Requests) -> None:
        self._requests = requests
        self._info: EngineInfo | None = None
        self._tokenizer = ""
        self._load: Load | None = None
        # Tokens sent since that load was measured, in all and by flow.
        self._sent_tokens = 0
        self._sent_by_flow: Counter[FlowKey] = Counter()
        self._workers = 1

    @property
    def info(self) -> EngineInfo:
        if self._info is None:
            raise NotReady(self._requests.unavailable or _STARTING)
        return self._info

    @property
    def load(self) -> Load | None:
        return self._load

    def wait(self, flow: FlowKey) -> float:
        """In how many seconds a further token of a flow would be answered, as far as is known."""
        if self._load is None:
            return 0.0
        return self._load.wait(flow, sent=self._sent_tokens * self._workers)

    def foresee(
        self,
        adapters: Sequence[str],
        *,
        timeout: float,
        client: str = "",
        weight: float = 1.0,  # noqa: ARG002
    ) -> None:
        load = self._load
        # Nearly always: finding out which flow it is in would take ten times as long.
        if load is None or load.is_easy(timeout, sent=self._sent_tokens * self._workers):
            return
        # Those of other flows do not come first, however many they are. The other workers will
        # have sent as much as this one.
        flow = flow_of(client, adapters, timeout)
        load.foresee(flow, timeout=timeout, sent=self._sent_by_flow[flow] * self._workers)

    async def predict(
        self,
        entries: Sequence[Entry],
        *,
        deadline: float | None = None,
        client: str = "",
        weight: float = 1.0,
        bulk: bool = False,
        elsewhere: bool = False,
    ) -> Completion:
        """elsewhere: another engine is asked if this one refuses: that counts as no refusal."""
        if not entries:
            return Completion((), 0.0, 0.0)
        if not bulk:
            # Nothing else waits for what is bulk.
            tokens = sum([entry.cost for entry in entries])
            timeout = None if deadline is None else deadline - monotonic()
            flow = flow_of(client, {entry.adapter.name for entry in entries}, timeout)
            self._sent_tokens += tokens
            self._sent_by_flow[flow] += tokens
        reply = await self._requests.ask(
            PredictDone,
            lambda number: predict_of(
                number, entries, deadline, client, weight, bulk=bulk, elsewhere=elsewhere
            ),
            rows=len(entries),
            deadline=deadline,
        )
        return completion_of(reply, entries)

    async def drain(self) -> None:
        await self._requests.drain()

    def welcomed(self, message: Welcome) -> None:
        """Take over the engine's facts; the encoder stays if the tokenizer is the same."""
        known = self._info.encoder if self._info and message.tokenizer == self._tokenizer else None
        self._info = info_of(message, known)
        self._tokenizer = message.tokenizer

    def set_load(self, load: Load | None, workers: int = 1) -> None:
        self._load, self._workers, self._sent_tokens = load, workers, 0
        self._sent_by_flow.clear()


class RemoteCatalog(CatalogView):
    """A copy of the engine's catalog, up to date whenever a change returns: the engine answers a
    change only when every copy has it."""

    def __init__(self, root: Path, requests: Requests) -> None:
        super().__init__(root)
        self._requests = requests
        self._arriving: dict[str, CatalogEntry] | None = None

    async def apply(self, change: Change) -> ChangeResult:
        done = await self._requests.ask(
            ChangeDone,
            lambda number: change_request_of(number, change),
        )
        return done.result

    async def inspected(self, file: ReceivedFile) -> Inspection:
        done = await self._requests.ask(InspectDone, lambda number: Inspect(number, file))
        return inspection_of(done)

    @property
    def arrives(self) -> bool:
        """Whether another catalog has begun to come, which is not complete yet."""
        return self._arriving is not None

    def begin(self) -> None:
        """Another catalog comes, part by part. Until it is complete, the one before it is read."""
        self._arriving = {}

    def add(self, part: Adapters) -> None:
        """Take over a part of the catalog that comes; its last one completes it."""
        assert self._arriving is not None
        for adapter in part.adapters:
            self._arriving[adapter.name] = entry_of(adapter, {})
        if part.last:
            self._entries, self._arriving = self._arriving, None

    def update(self, name: str, adapter: Adapter | None) -> None:
        """Take over a new entry; None: the name was deleted."""
        entries = self._entries if self._arriving is None else self._arriving
        if adapter is None:
            entries.pop(name, None)
        else:
            before = entries.get(name)
            entries[name] = entry_of(adapter, before.specs if before else {})


class RemoteDrift:
    """`service.drift.interface.DriftView` over the socket: the engine's process counts."""

    def __init__(self, connection: Connection, requests: Requests) -> None:
        self._connection = connection
        self._requests = requests

    async def report(self, name: str, revision: str) -> DriftReport:
        done = await self._requests.ask(
            DriftDone, lambda number: DriftRequest(number, name, revision)
        )
        return done.report

    def keep(self, texts: Sequence[UncertainText]) -> None:
        self._connection.send(KeepTexts(list(texts)))

    async def uncertain(self, name: str) -> list[UncertainText]:
        return (await self._ask(name, forget=False)).texts

    async def forget(self, name: str) -> int:
        return (await self._ask(name, forget=True)).removed

    async def _ask(self, name: str, *, forget: bool) -> UncertainDone:
        return await self._requests.ask(
            UncertainDone, lambda number: UncertainRequest(number, name, forget)
        )


class RemoteBackend:
    """All methods are called on the event loop that calls `start`.

    Args:
        worker: this worker's number.
        store: the adapter store's folder, for downloads.
        observer: told of texts that fail because the engine's process does not answer.
        max_bytes: of a frame.
        counts_lost: as of `Requests`.
    """

    def __init__(
        self,
        context: Context,
        endpoint: str,
        worker: int,
        *,
        store: Path,
        observer: Observer,
        max_bytes: int,
        counts_lost: bool = True,
    ) -> None:
        self._worker = worker
        self._connection = Connection(
            context, endpoint, worker, receive=self._receive, lost=self._lost, max_bytes=max_bytes
        )
        self._requests = Requests(self._connection, observer, counts_lost=counts_lost)
        self._engine = RemoteEngine(self._requests)
        self.engine: Predictor = self._engine
        self.catalog = RemoteCatalog(store, self._requests)
        self.drift = RemoteDrift(self._connection, self._requests)
        self._welcomed = asyncio.Event()
        # The last one of this connection.
        self._heartbeat: Heartbeat | None = None

    async def start(self) -> None:
        self._connection.open()
        await self._welcomed.wait()

    async def stop(self) -> None:
        self._connection.close()
        self._leave("the service is stopped")

    def check(self) -> None:
        """Notice a silent engine and missed deadlines; call this regularly."""
        self._connection.check()
        self._requests.expire()

    def health(self) -> EngineHealth:
        """Always live: this process answers, and the supervisor replaces a dead engine."""
        heartbeat, unavailable = self._heartbeat, self._requests.unavailable
        reason: str | None = None
        if heartbeat is None:
            reason = unavailable or _STARTING
        elif not heartbeat.ready:
            reason = heartbeat.reason or _STARTING
        elif unavailable is not None:
            reason = "reading the adapters"
        elif not self._connection.fresh:
            reason = _NO_HEARTBEAT
        elif self._lease is not None and lease_time() >= self._lease:
            reason = _NO_LEASE
        details = {**(heartbeat.details if heartbeat else {}), "worker": self._worker}
        return EngineHealth(
            live=True, ready=reason is None, reason=reason, details=details, lease=self._lease
        )

    def refuse_unless_ready(self) -> None:
        if self._requests.unavailable is not None or not self._connection.fresh:
            reason = self.health().reason or _NO_HEARTBEAT
            raise (EngineUnavailable if self._welcomed.is_set() else NotReady)(reason)
        if self._lease is not None and lease_time() >= self._lease:
            raise LeaseExpired(self.health().reason or _NO_LEASE)

    def is_connected(self) -> bool:
        """Whether the engine has welcomed this worker, and is still there."""
        return self._requests.unavailable is None and self._connection.fresh

    @property
    def _lease(self) -> float | None:
        return None if self._heartbeat is None else self._heartbeat.lease

    def _receive(self, message: FromEngine) -> None:
        match message:
            case PredictDone() | ChangeDone() | InspectDone() | DriftDone() | UncertainDone():
                self._requests.answer(message)
            case RequestFailed():
                self._requests.fail(message)
            case CatalogUpdate():
                self.catalog.update(message.name, message.adapter)
                self._connection.send(Applied(message.update))
            case Heartbeat():
                self._heartbeat = message
            case EngineLoad():
                self._engine.set_load(load_of(message), message.workers)
            case Welcome():
                self._engine.welcomed(message)
                self.catalog.begin()
            case Adapters():
                self.catalog.add(message)
                if message.last:
                    self._requests.unavailable = None
                    self._welcomed.set()
                    logger.info("welcomed by the engine adapters=%d", len(self.catalog))

    def _lost(self, reason: str) -> None:
        logger.warning("connection to the engine lost: %s", reason)
        self._leave(reason)

    def _leave(self, reason: str) -> None:
        self._heartbeat = None
        self._engine.set_load(None)
        self._requests.fail_all(reason)
