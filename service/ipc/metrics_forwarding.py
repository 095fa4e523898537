"""Metrics of several processes: workers and the engine forward their reports to the supervisor.

A forwarder is an `Observer` that keeps each call as an `Event`, a method's name and its arguments,
and sends a list of them four times a second. The supervisor checks every event and calls that
method of the one `Metrics` object.
"""

import asyncio
import inspect
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import count
from typing import Any, Generic, TypeAlias, TypeVar, get_type_hints

import msgspec
import zmq

from service.engine.observer import Observer
from service.errors import Unavailable
from service.ipc.channel import Channel, Context, RateLimitedWarnings
from service.ipc.engine_states import EngineStates
from service.ipc.protocol import Codec, Message, Undecodable, encode
from service.observability.metrics import Metrics

logger = logging.getLogger(__name__)

FLUSH_SECONDS = 0.25
SCRAPE_SECONDS = 2.0
# Events that wait to be sent, and frames that wait in the socket.
MAX_EVENTS = 100_000
_MAX_FRAMES = 64
# An event takes about 100 bytes, and a process keeps at most MAX_EVENTS.
_MAX_FRAME_BYTES = 64 * 2**20

# The methods of `Observer` that another process may call. These calls always count, even if their
# process has ended since.
COUNTED = (
    "request_done",
    "tokenized",
    "predicted",
    "label_given",
    "abstained",
    "adapter_failed",
    "access_refused",
    "uploaded",
    "connections",
    "connections_ended",
    "adapter_published",
    "adapter_removed",
    "batch_done",
    "adapter_loaded",
    "adapter_evicted",
    "adapter_image",
    "overload_refused",
    "failed",
    "dropped",
    "audit_failed",
    "records_dropped",
    "trial_set",
    "trial_ended",
    "trial_read",
    "trial_failed",
    "trial_compared",
    "trial_differed",
    "trial_scores",
    "trial_dropped",
    "rolled_out",
)
# These report an engine's present state: only the last call counts, and none once that engine has
# ended. By method: the argument with a separate state for each of its values, if any.
STATES: Mapping[str, str | None] = {
    "waiting_tokens": None,
    "tier_size": "tier",
    "stored": None,
    "store_state": None,
    "followed": None,
    "started": None,
    "waiting_limit": None,
    "pace": None,
    "drifted": "adapter",
}


Arguments = TypeVar("Arguments")


class Event(Message, Generic[Arguments], frozen=True, gc=False):
    """A call of a method in `COUNTED` or `STATES`. arguments: by parameter name; the receiver
    decodes them when it knows the method."""

    method: str
    arguments: Arguments


class Events(Message, Generic[Arguments], frozen=True):
    """What happened in one process, in order. process: its id."""

    process: int
    events: list[Event[Arguments]]


class Scrape(Message, frozen=True):
    """A request for all metrics, or those of these names, with everything that was sent before."""

    id: int
    names: list[str] | None = None


class Exposition(Message, frozen=True):
    """The metrics, in Prometheus' text format."""

    id: int
    text: bytes


ToSupervisor: TypeAlias = Events[msgspec.Raw] | Scrape
FromSupervisor: TypeAlias = Exposition


def _parameters(method: str) -> type[msgspec.Struct]:
    """A struct whose fields are a method's parameters: it decodes exactly its arguments."""
    function = getattr(Observer, method)
    types = get_type_hints(function)
    parameters = list(inspect.signature(function).parameters.values())[1:]
    return msgspec.defstruct(
        method,
        [
            (item.name, types[item.name])
            if item.default is item.empty
            else (item.name, types[item.name], item.default)
            for item in parameters
        ],
        frozen=True,
        forbid_unknown_fields=True,
    )


_DECODERS = {method: msgspec.msgpack.Decoder(_parameters(method)) for method in (*COUNTED, *STATES)}
_NAMES = {method: decoder.type.__struct_fields__ for method, decoder in _DECODERS.items()}


def event(method: str, *arguments: Any, **named: Any) -> Event[dict[str, Any]]:
    """A call as a message."""
    return _event(method, arguments, named)


def _event(method: str, arguments: tuple[Any, ...], named: dict[str, Any]) -> Event[dict[str, Any]]:
    """The same without another copy of the arguments, since every request makes two reports."""
    names = _NAMES[method]
    for index, value in enumerate(arguments):
        named[names[index]] = value
    return Event(method, named)


def call_of(event: Event[msgspec.Raw], metrics: Metrics) -> "partial[None]":
    """The call that an event describes, for the receiver to make.

    Raises:
        Undecodable: the method may not be called, or these are not its arguments.
    """
    decoder = _DECODERS.get(event.method)
    if decoder is None:
        raise Undecodable(f"no such event: {event.method[:80]!r}")
    try:
        arguments = decoder.decode(event.arguments)
    except (msgspec.DecodeError, RecursionError) as error:
        raise Undecodable(f"{event.method}: {str(error)[:200]}") from None
    return partial(getattr(metrics, event.method), **msgspec.structs.asdict(arguments))


class MetricsForwarder(Observer):
    """Keeps every report as an event until it is sent.

    Created before there is an event loop; `open` is called on it.
    """

    def __init__(self, context: Context, endpoint: str) -> None:
        self._context = context
        self._endpoint = endpoint
        self._channel: Channel | None = None
        self._codec: Codec[FromSupervisor] = Codec(FromSupervisor)
        self._warnings = RateLimitedWarnings(logger)
        self._events: list[Event[dict[str, Any]]] = []
        self._dropped = 0
        # Frequent, and easy to add up: by method, adapter and label.
        self._labels: dict[tuple[str, str, str], int] = {}
        # The last call, by method and by the argument that `STATES` names.
        self._states: dict[tuple[str, Any], Event[dict[str, Any]]] = {}
        # The same where there is one state alone: every request changes one, and few are sent.
        self._single_states: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}
        self._numbers = count(1)
        self._scrapes: dict[int, asyncio.Future[bytes]] = {}
        for method in COUNTED:
            if getattr(type(self), method) is getattr(Observer, method):
                setattr(self, method, partial(self._count, method))
        for method, distinct in STATES.items():
            keep = (
                partial(self._set_single, method)
                if distinct is None
                else partial(self._set, method, distinct)
            )
            setattr(self, method, keep)

    def open(self) -> None:
        socket = self._context.socket(zmq.DEALER)
        socket.sndhwm = _MAX_FRAMES
        socket.connect(self._endpoint)
        self._channel = Channel(socket, self._receive)
        self._flush_repeatedly()

    def close(self, linger_milliseconds: int) -> None:
        """Send what is left, within this time."""
        if self._channel is not None:
            self.flush()
            self._channel.close(linger_milliseconds)

    def flush(self) -> None:
        """Send everything; what the socket does not take is kept."""
        events = [*self._events, *self._states.values()]
        events += [
            _event(method, arguments, named)
            for method, (arguments, named) in self._single_states.items()
        ]
        events += [event(*key, number) for key, number in self._labels.items()]
        if self._dropped:
            events.append(event("dropped", self._dropped))
        if not events or self._channel is None:
            return
        if self._channel.send([encode([Events(os.getpid(), events)])]):
            self._events, self._dropped = [], 0
            self._labels, self._states, self._single_states = {}, {}, {}

    async def scrape(self, names: Sequence[str] | None = None) -> bytes:
        self.flush()
        number = next(self._numbers)
        text: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._scrapes[number] = text
        try:
            wanted = None if names is None else list(names)
            if self._channel is None or not self._channel.send([encode([Scrape(number, wanted)])]):
                raise Unavailable("the supervisor, which counts, takes no messages")
            async with asyncio.timeout(SCRAPE_SECONDS):
                return await text
        except TimeoutError:
            raise Unavailable("the supervisor, which counts, does not answer") from None
        finally:
            del self._scrapes[number]

    def predicted(self, adapter: str, label: str, count: int = 1) -> None:
        self._add("predicted", adapter, label, count)

    def label_given(self, adapter: str, label: str, count: int = 1) -> None:
        self._add("label_given", adapter, label, count)

    def _add(self, method: str, adapter: str, label: str, count: int) -> None:
        key = (method, adapter, label)
        if key in self._labels or len(self._labels) < MAX_EVENTS:
            self._labels[key] = self._labels.get(key, 0) + count
        else:
            self._dropped += 1

    # Sent at once: a worker that hears of the adapter counts in series that must exist by then.

    def adapter_published(self, name: str, labels: Sequence[str]) -> None:
        self._count("adapter_published", name, labels)
        self.flush()

    def adapter_removed(self, name: str) -> None:
        self._count("adapter_removed", name)
        self.flush()

    def _count(self, method: str, *arguments: Any, **named: Any) -> None:
        if len(self._events) < MAX_EVENTS:
            self._events.append(_event(method, arguments, named))
        else:
            self._dropped += 1

    def _set(self, method: str, distinct: str, *arguments: Any, **named: Any) -> None:
        state = _event(method, arguments, named)
        self._states[method, state.arguments[distinct]] = state

    def _set_single(self, method: str, *arguments: Any, **named: Any) -> None:
        self._single_states[method] = arguments, named

    def _flush_repeatedly(self) -> None:
        self.flush()
        asyncio.get_running_loop().call_later(FLUSH_SECONDS, self._flush_repeatedly)

    def _receive(self, frames: list[bytes]) -> None:
        try:
            expositions = self._codec.decode(frames[0])
        except Undecodable as error:
            self._warnings.warn(f"refused a message of the supervisor: {error}")
            return
        for exposition in expositions:
            text = self._scrapes.get(exposition.id)
            if text is not None and not text.done():
                text.set_result(exposition.text)


class MetricsReceiver:
    """The supervisor's end: applies events to `Metrics` and answers scrapes. Binds when created.

    Args:
        refresh: called before each answer, to update what is measured only on demand.
    """

    def __init__(
        self,
        context: Context,
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
        self._warnings = RateLimitedWarnings(logger)
        self._engines = EngineStates(metrics)
        # By process: a method's name and its call.
        self._received: list[tuple[int, list[tuple[str, partial[None]]]]] = []
        self._scrapes: list[tuple[bytes, Scrape]] = []
        self._answers: set[asyncio.Task[None]] = set()
        self._scheduled = False
        self._channel = Channel(socket, self._receive)

    def close(self) -> None:
        self._channel.close()

    def set_engine(self, process: int | None, engine: str = "engine") -> None:
        """The process of an engine whose states hold from now on; those of its predecessor are
        reset."""
        self._engines.set_process(engine, process)

    def _receive(self, frames: list[bytes]) -> None:
        received, scrapes = [], []
        try:
            for message in self._codec.decode(frames[-1]):
                if isinstance(message, Scrape):
                    scrapes.append((frames[0], message))
                else:
                    calls = [(item.method, call_of(item, self._metrics)) for item in message.events]
                    received.append((message.process, calls))
        except Undecodable as error:
            self._warnings.warn(f"refused a message: {error}")
            return
        self._received += received
        self._scrapes += scrapes
        if not self._scheduled:
            self._scheduled = True
            asyncio.get_running_loop().call_soon(self._apply)

    def _apply(self) -> None:
        self._scheduled = False
        received, self._received = self._received, []
        scrapes, self._scrapes = self._scrapes, []
        # The engine reports a new adapter before any worker can count in its series, but sockets
        # are read in no particular order.
        by_engine = [(self._engines.engine_of(process), calls) for process, calls in received]
        for engine, calls in sorted(by_engine, key=lambda item: item[0] is None):
            for method, call in calls:
                if method == "batch_done" and engine is not None:
                    call(engine=engine)
                elif method not in STATES:
                    call()
                elif engine is not None:
                    distinct = STATES[method]
                    state = call.keywords[distinct] if distinct else None
                    self._engines.report(engine, method, state, call.keywords)
        if scrapes:
            answer = asyncio.ensure_future(self._answer(scrapes))
            self._answers.add(answer)
            answer.add_done_callback(self._answers.discard)

    async def _answer(self, scrapes: list[tuple[bytes, Scrape]]) -> None:
        self._refresh()
        texts: dict[tuple[str, ...] | None, bytes] = {}
        for identity, scrape in scrapes:
            names = None if scrape.names is None else tuple(scrape.names)
            if names not in texts:
                # All of ten thousand adapters take a second; children must be watched meanwhile.
                texts[names] = await asyncio.to_thread(self._metrics.exposition, names)
            self._channel.send([identity, encode([Exposition(scrape.id, texts[names])])])
