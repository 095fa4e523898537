"""What the engine tells whoever measures it. Knows no metrics library; times are seconds.

All calls come from the engine's event loop, on the way of every request: an implementation takes
microseconds and never raises.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from service.engine.interface import AdapterKey
from service.errors import (
    AdapterLoadFailed,
    DeadlineExceeded,
    InferenceFailed,
    Overloaded,
    ServiceError,
    Unavailable,
)

Tier = Literal["registered", "active"]
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
    """One batch as the scheduler made it, whatever it took to run it.

    tokens: text and prompt positions. adapters: distinct ones. queue_seconds: one value a row, from
    admission to the start of the batch. inference_seconds: all that the device thread spent on it.
    generator_seconds, backbone_seconds: shares of that, for making prompts and for everything else
    of the forward pass; the former is None where nobody can tell (CUDA runs behind the host).
    passes: forward passes that it took, of which `graphs` were a single launch each.
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


class EngineObserver(Protocol):
    """Receives events. Counting, labelling and exposing them is the implementation's business."""

    def batch_done(self, report: BatchReport) -> None:
        """A batch was run to its end."""

    def waiting_tokens(self, tokens: int) -> None:
        """Tokens admitted and not yet taken by a batch."""

    def tier_size(self, tier: Tier, adapters: int, bytes_held: int) -> None:
        """How many adapters a tier holds now, and their memory."""

    def adapter_loaded(self, key: AdapterKey, tier: Tier, seconds: float) -> None:
        """An adapter entered a tier."""

    def adapter_evicted(self, key: AdapterKey, tier: Tier, age_seconds: float) -> None:
        """An adapter left a tier; age: since it was last used."""

    def failed(self, reason: FailureReason, rows: int) -> None:
        """Rows that got an error instead of an answer."""


class SilentObserver:
    """Tells nobody."""

    def batch_done(self, report: BatchReport) -> None:
        pass

    def waiting_tokens(self, tokens: int) -> None:
        pass

    def tier_size(self, tier: Tier, adapters: int, bytes_held: int) -> None:
        pass

    def adapter_loaded(self, key: AdapterKey, tier: Tier, seconds: float) -> None:
        pass

    def adapter_evicted(self, key: AdapterKey, tier: Tier, age_seconds: float) -> None:
        pass

    def failed(self, reason: FailureReason, rows: int) -> None:
        pass


def failure_reason(error: ServiceError) -> FailureReason | None:
    """What to count a failure as; None for what the caller got wrong."""
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
