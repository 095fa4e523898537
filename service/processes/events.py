"""What a part of the service measures, as messages to the supervisor, which counts it.

Each event is one call of `service.metrics.Metrics` and says which.
"""

from abc import abstractmethod
from typing import Protocol, TypeAlias

from service.engine.interface import AdapterKey
from service.engine.observer import BatchReport, EngineObserver, FailureReason, Tier
from service.processes.messages import Message
from service.reporting import Outcome, Reporter, UploadOutcome

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
