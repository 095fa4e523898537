"""The reporting interfaces of a process that does not count itself: it passes everything on.

Nothing here waits: what the supervisor does not take in time is kept up to a limit, and beyond it
dropped, which is counted.
"""

import asyncio
import logging
import os
from collections.abc import Sequence
from itertools import count

import zmq

from service.engine.interface import AdapterKey
from service.engine.observer import BatchReport, FailureReason, Tier
from service.errors import Unavailable
from service.processes.channel import Channel, Complaints
from service.processes.events import (
    AdapterFailed,
    AnyEvent,
    BatchDone,
    Counted,
    Deleted,
    Dropped,
    Evicted,
    Exposition,
    FromSupervisor,
    Loaded,
    Predicted,
    Published,
    RequestDone,
    RowsFailed,
    Scrape,
    Started,
    Stored,
    TierSize,
    Tokenized,
    Uploaded,
    WaitingLimit,
    WaitingTokens,
)
from service.processes.messages import Codec, Undecodable, encode
from service.reporting import Outcome, UploadOutcome

logger = logging.getLogger(__name__)

FLUSH_SECONDS = 0.25
SCRAPE_SECONDS = 2.0
# Events that wait to be passed on, and frames that wait in the socket.
MAX_EVENTS = 100_000
_MAX_FRAMES = 64


class Relay:
    """`service.reporting.Reporter`, and what the engine and the catalog report to.

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
