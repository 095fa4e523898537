"""What the service reports about itself: one class with a method for every kind of report.

It imports no metrics library, so the engine can report without one. Times are seconds.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from service.access.events import RefusalReason
from service.engine.interface import AdapterKey
from service.engine.trials import Cause, DropReason, Role
from service.errors import (
    AdapterLoadFailed,
    DeadlineExceeded,
    InferenceFailed,
    Overloaded,
    OverloadReason,
    ServiceError,
    Unavailable,
)

Outcome = Literal[
    "success",
    "client_error",
    "overloaded",
    "deadline",
    "unavailable",
    "server_error",
    "disconnected",
]
UploadOutcome = Literal["created", "replaced", "unchanged", "staged", "refused", "failed"]
ConnectionEnd = Literal[
    "too_many",
    "evicted",
    "url",
    "headers",
    "malformed",
    "slow_head",
    "slow_body",
    "slow_reader",
    "draining",
]
Tier = Literal["registered", "active"]
# Of an adapter's image on disk: read, written, found altered, not written.
ImageEvent = Literal["used", "made", "refused", "failed"]
# No label is empty.
NO_LABEL = ""
RecordLog = Literal["access", "decisions"]
RolloutOutcome = Literal["committed", "unchanged", "conflict", "refused", "timeout", "failed"]
FailureReason = Literal[
    "overloaded",
    "deadline",
    "cancelled",
    "adapter_load",
    "out_of_memory",
    "not_finite",
    "batch_error",
    "unavailable",
]


@dataclass(frozen=True, slots=True)
class BatchReport:
    """One batch as the scheduler made it, in however many forward passes it ran.

    tokens: text and prompt positions. adapters: distinct ones. queue_seconds: one value a row, from
    admission to the start of the batch. inference_seconds: the device thread's time for the batch.
    generator_seconds, backbone_seconds: shares of that, for making prompts and for the rest of the
    forward pass; the former is None on CUDA, which runs asynchronously and is not timed.
    passes: forward passes, of which `graphs` were a single launch each.
    """

    rows: int
    tokens: int
    adapters: int
    queue_seconds: Sequence[float]
    generator_seconds: float | None
    backbone_seconds: float
    inference_seconds: float
    passes: int = 1
    graphs: int = 0


class Observer:
    """What the service reports about itself; this class ignores all of it.

    `service.observability.metrics.Metrics` counts it in this process, and
    `service.ipc.metrics_forwarding.MetricsForwarder` sends it to the process that counts. Methods
    are called while requests wait: they take microseconds and never raise.
    """

    # Reported by the routes.

    def request_done(
        self, route: str, outcome: Outcome, *, seconds: float, error: str | None = None
    ) -> None:
        """A request was answered or given up; called exactly once for each."""

    def tokenized(self, seconds: float, *, truncated: int) -> None:
        """A request's texts were turned into tokens; `truncated` of them had to be cut."""

    def predicted(self, adapter: str, label: str, count: int = 1) -> None:
        """Texts were answered, with `label` as the best one.

        Not counted if their adapter has been deleted since.
        """

    def label_given(self, adapter: str, label: str, count: int = 1) -> None:
        """Texts got this label, beside others or alone; `NO_LABEL`: they got none.

        For adapters that give several labels a text; not counted as for `predicted`.
        """

    def abstained(self, adapter: str, count: int) -> None:
        """Texts got a label that is no answer: its score is too low. Not counted as for
        `predicted`."""

    def adapter_failed(self, adapter: str, count: int) -> None:
        """Texts failed through no fault of the caller; not counted as for `predicted`."""

    def access_refused(self, reason: RefusalReason) -> None:
        """A request was refused for its key, its quota or where it comes from."""

    def uploaded(self, outcome: UploadOutcome) -> None:
        """An upload ended."""

    # Reported by each process that has connections.

    def connections(self, process: str, *, opened: int, held_bytes: int, stored_bytes: int) -> None:
        """Connections that are open now; bytes of their bodies in memory, and on disk."""

    def connections_ended(self, reason: ConnectionEnd, number: int) -> None:
        """Connections that the service ended before their clients did."""

    # Reported by the catalog and the start.

    def adapter_published(self, name: str, labels: Sequence[str]) -> None:
        """A name is known, with the labels of all its usable revisions."""

    def adapter_removed(self, name: str) -> None:
        """A name was deleted."""

    def stored(self, adapters: int, bytes_held: int) -> None:
        """How many adapters the catalog knows, and the size of their current files."""

    def audit_failed(self) -> None:
        """A record of the audit log was lost, or a change refused because of it."""

    def records_dropped(self, log: RecordLog, records: int) -> None:
        """Refused requests, or decisions of whole requests, are missing in their log."""

    def store_state(self, usable: bool, free_bytes: int) -> None:
        """Whether the store can be changed now, and how much space it has."""

    def followed(self, seconds: float, held: bool, applied: int, ok: bool) -> None:
        """A replica has looked for changes. held: its lease is. applied: the last entry of the log
        that it answers from. ok: the shared store could be read."""

    def rolled_out(self, outcome: RolloutOutcome, seconds: float) -> None:
        """A change of all replicas has ended, on the one that received it."""

    def started(self, *, version: str, backbone: str, device: str, dtype: str) -> None:
        """The engine is ready."""

    def waiting_limit(self, tokens: int) -> None:
        """How many tokens may wait."""

    def drifted(self, adapter: str, texts: int, shifts: Sequence[tuple[str, float, int]]) -> None:
        """How far the last texts of an adapter are from its training: by quantity, the population
        stability index and 0 (stable), 1 (moderate) or 2 (large). Without any, nothing is known any
        more. Not counted as for `predicted`."""

    # Reported by the engine.

    def batch_done(self, report: BatchReport) -> None:
        """A batch ran to its end."""

    def waiting_tokens(self, tokens: int) -> None:
        """Tokens admitted and not yet taken by a batch."""

    def tier_size(self, tier: Tier, adapters: int, bytes_held: int) -> None:
        """How many adapters a tier holds now, and their memory."""

    def adapter_loaded(self, key: AdapterKey, tier: Tier, seconds: float) -> None:
        """An adapter entered a tier."""

    def adapter_image(self, event: ImageEvent) -> None:
        """Something happened to an adapter's image on disk."""

    def adapter_evicted(self, key: AdapterKey, tier: Tier, age_seconds: float) -> None:
        """An adapter left a tier, this long after its last use."""

    def overload_refused(self, reason: OverloadReason) -> None:
        """A request was refused because too much waits."""

    def pace(self, tokens_per_second: float, estimated_wait: float) -> None:
        """What the device does at most, and when a further text would be answered, in seconds."""

    def failed(self, reason: FailureReason, rows: int) -> None:
        """Rows got an error instead of an answer."""

    # Reported of names that try a second revision, in the process of the engine.

    def trial_set(self, adapter: str, percent: float | None, *, shadow: bool) -> None:
        """A second revision reads this share of a name's texts; None: none does any more."""

    def trial_ended(self, cause: Cause) -> None:
        """A division has ended."""

    def trial_read(self, adapter: str, role: Role, texts: int, seconds: float | None) -> None:
        """As `TrialListener.read`."""

    def trial_failed(self, adapter: str, role: Role, texts: int) -> None:
        """As `TrialListener.failed`."""

    def trial_compared(self, adapter: str, *, agreed: int, disagreed: int) -> None:
        """Both revisions have read these texts."""

    def trial_differed(self, adapter: str, before: str, after: str, texts: int) -> None:
        """Texts got the answer `after`, where the current revision says `before`."""

    def trial_scores(self, adapter: str, differences: Sequence[float]) -> None:
        """By how much the scores of the current revision's best labels differ, a text each."""

    def trial_dropped(self, adapter: str, reason: DropReason, texts: int) -> None:
        """Texts were not compared."""

    # Reported by a `MetricsForwarder`.

    def dropped(self, events: int) -> None:
        """Reports were lost because they came faster than they could be sent."""

    async def scrape(self, names: Sequence[str] | None = None) -> bytes:  # noqa: ARG002
        """All metrics of the service, or those of these names, in Prometheus' text format.

        Raises:
            Unavailable: the process that counts does not answer.
        """
        return b""


def failure_reason(error: ServiceError) -> FailureReason | None:
    """The reason that a failure is counted under; None if the caller made the mistake."""
    match error:
        case InferenceFailed():
            return error.reason
        case Overloaded():
            return "overloaded"
        case DeadlineExceeded():
            return "deadline"
        case AdapterLoadFailed():
            return "adapter_load"
        case Unavailable():
            return "unavailable"
        case _:
            return None
