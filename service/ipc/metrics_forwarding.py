"""What a part of the service measures, as messages to the supervisor, which counts it.

Each event is one call of `service.observability.metrics.Metrics` and says which.
"""

import asyncio
import logging
import os
from abc import abstractmethod
from collections.abc import Callable, Sequence
from itertools import count
from typing import Protocol, TypeAlias

import zmq

from service.engine.interface import AdapterKey
from service.engine.observer import BatchReport, EngineObserver, FailureReason, Tier
from service.errors import Unavailable
from service.ipc.channel import Channel, Complaints
from service.ipc.protocol import Codec, Message, Undecodable, encode
from service.observability.metrics import Metrics, Outcome, Reporter, UploadOutcome

# --- merged from service.processes.events

_NO_KEY = AdapterKey("", "")


class Counter(Reporter, EngineObserver, Protocol):
    """Who counts: what events are made for."""

    def adapter_published(self, name: str, labels: list[str]) -> None: ...
    def adapter_removed(self, name: str) -> None: ...
    def stored(self, adapters: int, bytes_held: int) -> None: ...
    def started(self, *, version: str, backbone: str, device: str, dtype: str) -> None: ...
    def waiting_limit(self, tokens: int) -> None: ...
    def dropped(self, events: int) -> None: ...


class Event(Message, frozen=True):
    """Something happened: it counts, whatever becomes of who reports it."""

    @abstractmethod
    def report(self, counter: Counter) -> None:
        """Count it."""


class State(Event, frozen=True):
    """How things stand with the engine: void once that engine is gone."""


class RequestDone(Event, frozen=True):
    route: str
    outcome: Outcome
    seconds: float
    error: str | None

    def report(self, counter: Counter) -> None:
        counter.request_done(self.route, self.outcome, seconds=self.seconds, error=self.error)


class Tokenized(Event, frozen=True):
    seconds: float
    truncated: int

    def report(self, counter: Counter) -> None:
        counter.tokenized(self.seconds, truncated=self.truncated)


class Predicted(Event, frozen=True):
    adapter: str
    label: str
    count: int

    def report(self, counter: Counter) -> None:
        counter.predicted(self.adapter, self.label, self.count)


class AdapterFailed(Event, frozen=True):
    adapter: str
    count: int

    def report(self, counter: Counter) -> None:
        counter.adapter_failed(self.adapter, self.count)


class Uploaded(Event, frozen=True):
    outcome: UploadOutcome

    def report(self, counter: Counter) -> None:
        counter.uploaded(self.outcome)


class BatchDone(Event, frozen=True):
    batch: BatchReport

    def report(self, counter: Counter) -> None:
        counter.batch_done(self.batch)


class Loaded(Event, frozen=True):
    tier: Tier
    seconds: float

    def report(self, counter: Counter) -> None:
        counter.adapter_loaded(_NO_KEY, self.tier, self.seconds)


class Evicted(Event, frozen=True):
    tier: Tier
    age_seconds: float

    def report(self, counter: Counter) -> None:
        counter.adapter_evicted(_NO_KEY, self.tier, self.age_seconds)


class RowsFailed(Event, frozen=True):
    reason: FailureReason
    rows: int

    def report(self, counter: Counter) -> None:
        counter.failed(self.reason, self.rows)


class Published(Event, frozen=True):
    name: str
    labels: list[str]

    def report(self, counter: Counter) -> None:
        counter.adapter_published(self.name, self.labels)


class Deleted(Event, frozen=True):
    name: str

    def report(self, counter: Counter) -> None:
        counter.adapter_removed(self.name)


class Dropped(Event, frozen=True):
    """So many events were not kept."""

    events: int

    def report(self, counter: Counter) -> None:
        counter.dropped(self.events)


class WaitingTokens(State, frozen=True):
    tokens: int

    def report(self, counter: Counter) -> None:
        counter.waiting_tokens(self.tokens)


class TierSize(State, frozen=True):
    tier: Tier
    adapters: int
    bytes_held: int

    def report(self, counter: Counter) -> None:
        counter.tier_size(self.tier, self.adapters, self.bytes_held)


class Stored(State, frozen=True):
    adapters: int
    bytes_held: int

    def report(self, counter: Counter) -> None:
        counter.stored(self.adapters, self.bytes_held)


class Started(State, frozen=True):
    version: str
    backbone: str
    device: str
    dtype: str

    def report(self, counter: Counter) -> None:
        counter.started(
            version=self.version, backbone=self.backbone, device=self.device, dtype=self.dtype
        )


class WaitingLimit(State, frozen=True):
    tokens: int

    def report(self, counter: Counter) -> None:
        counter.waiting_limit(self.tokens)


AnyEvent: TypeAlias = (
    RequestDone
    | Tokenized
    | Predicted
    | AdapterFailed
    | Uploaded
    | BatchDone
    | Loaded
    | Evicted
    | RowsFailed
    | Published
    | Deleted
    | Dropped
    | WaitingTokens
    | TierSize
    | Stored
    | Started
    | WaitingLimit
)


class Counted(Message, frozen=True):
    """What happened in one process, in order. process: its id."""

    process: int
    events: list[AnyEvent]


class Scrape(Message, frozen=True):
    """Everything counted is asked for, what was sent before this included."""

    id: int


class Exposition(Message, frozen=True):
    id: int
    text: bytes


ToSupervisor: TypeAlias = Counted | Scrape
FromSupervisor: TypeAlias = Exposition


# --- merged from service.processes.relay

logger = logging.getLogger(__name__)

FLUSH_SECONDS = 0.25
SCRAPE_SECONDS = 2.0
# Events that wait to be passed on, and frames that wait in the socket.
MAX_EVENTS = 100_000
_MAX_FRAMES = 64


class Relay:
    """`service.observability.metrics.Reporter`, and what the engine and the catalog report to.

    Made before there is an event loop; `open` is called on it.
    """

    def __init__(self, context: "zmq.Context[zmq.Socket[bytes]]", endpoint: str) -> None:
        self._context = context
        self._endpoint = endpoint
        self._channel: Channel | None = None
        self._codec: Codec[FromSupervisor] = Codec(FromSupervisor)
        self._complaints = Complaints(logger)
        self._events: list[AnyEvent] = []
        self._dropped = 0
        # Frequent and easily added up: by adapter and label.
        self._predicted: dict[tuple[str, str], int] = {}
        # Of what changes often only the last state is passed on.
        self._states: dict[str, AnyEvent] = {}
        self._numbers = count(1)
        self._scrapes: dict[int, asyncio.Future[bytes]] = {}

    def open(self) -> None:
        socket = self._context.socket(zmq.DEALER)
        socket.sndhwm = _MAX_FRAMES
        socket.connect(self._endpoint)
        self._channel = Channel(socket, self._take)
        self._later()

    def close(self, linger_milliseconds: int) -> None:
        """Pass on what there is, within so long."""
        if self._channel is not None:
            self.flush()
            self._channel.close(linger_milliseconds)

    def flush(self) -> None:
        """Pass on what there is; what is not taken stays."""
        events = [*self._events, *self._states.values()]
        events += [Predicted(*key, number) for key, number in self._predicted.items()]
        if self._dropped:
            events.append(Dropped(self._dropped))
        if not events or self._channel is None:
            return
        if self._channel.send([encode([Counted(os.getpid(), events)])]):
            self._events, self._dropped, self._predicted, self._states = [], 0, {}, {}

    async def scrape(self) -> bytes:
        self.flush()
        number = next(self._numbers)
        found: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._scrapes[number] = found
        try:
            if self._channel is None or not self._channel.send([encode([Scrape(number)])]):
                raise Unavailable("the supervisor, which counts, takes nothing")
            async with asyncio.timeout(SCRAPE_SECONDS):
                return await found
        except TimeoutError:
            raise Unavailable("the supervisor, which counts, does not answer") from None
        finally:
            del self._scrapes[number]

    # Reported by the routes.

    def request_done(
        self, route: str, outcome: Outcome, *, seconds: float, error: str | None = None
    ) -> None:
        self._add(RequestDone(route, outcome, seconds, error))

    def tokenized(self, seconds: float, *, truncated: int) -> None:
        self._add(Tokenized(seconds, truncated))

    def predicted(self, adapter: str, label: str, count: int = 1) -> None:
        key = (adapter, label)
        if key in self._predicted or len(self._predicted) < MAX_EVENTS:
            self._predicted[key] = self._predicted.get(key, 0) + count
        else:
            self._dropped += 1

    def adapter_failed(self, adapter: str, count: int) -> None:
        self._add(AdapterFailed(adapter, count))

    def uploaded(self, outcome: UploadOutcome) -> None:
        self._add(Uploaded(outcome))

    # Reported by the catalog. Passed on before a worker hears of it and counts in these series.

    def adapter_published(self, name: str, labels: Sequence[str]) -> None:
        self._add(Published(name, list(labels)))
        self.flush()

    def adapter_removed(self, name: str) -> None:
        self._add(Deleted(name))
        self.flush()

    def stored(self, adapters: int, bytes_held: int) -> None:
        self._states["stored"] = Stored(adapters, bytes_held)

    def started(self, *, version: str, backbone: str, device: str, dtype: str) -> None:
        self._states["started"] = Started(version, backbone, device, dtype)

    def waiting_limit(self, tokens: int) -> None:
        self._states["limit"] = WaitingLimit(tokens)

    # Reported by the engine.

    def batch_done(self, report: BatchReport) -> None:
        self._add(BatchDone(report))

    def waiting_tokens(self, tokens: int) -> None:
        self._states["waiting"] = WaitingTokens(tokens)

    def tier_size(self, tier: Tier, adapters: int, bytes_held: int) -> None:
        self._states[tier] = TierSize(tier, adapters, bytes_held)

    def adapter_loaded(self, key: AdapterKey, tier: Tier, seconds: float) -> None:  # noqa: ARG002
        self._add(Loaded(tier, seconds))

    def adapter_evicted(
        self,
        key: AdapterKey,  # noqa: ARG002
        tier: Tier,
        age_seconds: float,
    ) -> None:
        self._add(Evicted(tier, age_seconds))

    def failed(self, reason: FailureReason, rows: int) -> None:
        self._add(RowsFailed(reason, rows))

    def _add(self, event: AnyEvent) -> None:
        if len(self._events) < MAX_EVENTS:
            self._events.append(event)
        else:
            self._dropped += 1

    def _later(self) -> None:
        self.flush()
        asyncio.get_running_loop().call_later(FLUSH_SECONDS, self._later)

    def _take(self, frames: list[bytes]) -> None:
        try:
            messages = self._codec.decode(frames[0])
        except Undecodable as error:
            self._complaints.warn(f"refused a message of the supervisor: {error}")
            return
        for message in messages:
            assert isinstance(message, Exposition)
            found = self._scrapes.get(message.id)
            if found is not None and not found.done():
                found.set_result(message.text)


# --- merged from service.processes.counting


# An event takes some 100 bytes, and a part keeps 100,000 at most.
_MAX_FRAME_BYTES = 64 * 2**20


class Counting:
    """Binds when made.

    Args:
        refresh: brings up to date what is measured only when asked; called before each answer.
    """

    def __init__(
        self,
        context: "zmq.Context[zmq.Socket[bytes]]",
        endpoint: str,
        metrics: Metrics,
        *,
        refresh: Callable[[], None],
    ) -> None:
        socket = context.socket(zmq.ROUTER)
        socket.linger = 0
        socket.maxmsgsize = _MAX_FRAME_BYTES
        socket.bind(endpoint)
        self._metrics = metrics
        self._refresh = refresh
        self._codec: Codec[ToSupervisor] = Codec(ToSupervisor)
        self._complaints = Complaints(logger)
        self._engine: int | None = None
        self._counted: list[Counted] = []
        self._scrapes: list[tuple[bytes, int]] = []
        self._answers: set[asyncio.Task[None]] = set()
        self._soon = False
        self._channel = Channel(socket, self._take)

    def close(self) -> None:
        self._channel.close()

    def engine_is(self, process: int | None) -> None:
        """Whose states hold from now on; those of the process before are void."""
        if self._engine is not None:
            self._metrics.engine_gone()
        self._engine = process

    def _take(self, frames: list[bytes]) -> None:
        try:
            messages = self._codec.decode(frames[-1])
        except Undecodable as error:
            self._complaints.warn(f"refused a message: {error}")
            return
        for message in messages:
            if isinstance(message, Counted):
                self._counted.append(message)
            else:
                self._scrapes.append((frames[0], message.id))
        if not self._soon:
            self._soon = True
            asyncio.get_running_loop().call_soon(self._apply)

    def _apply(self) -> None:
        self._soon = False
        counted, self._counted = self._counted, []
        scrapes, self._scrapes = self._scrapes, []
        # The engine tells of a new adapter before any worker can count in its series, but sockets
        # are read in no particular order.
        for message in sorted(counted, key=lambda item: item.process != self._engine):
            for event in message.events:
                if not isinstance(event, State) or message.process == self._engine:
                    event.report(self._metrics)
        if scrapes:
            answer = asyncio.ensure_future(self._answer(scrapes))
            self._answers.add(answer)
            answer.add_done_callback(self._answers.discard)

    async def _answer(self, scrapes: list[tuple[bytes, int]]) -> None:
        self._refresh()
        # Of ten thousand adapters this takes a second, and children must be watched meanwhile.
        text = await asyncio.to_thread(self._metrics.exposition)
        for identity, number in scrapes:
            self._channel.send([identity, encode([Exposition(number, text)])])
