"""What crosses between the HTTP side and the engine. Knows neither: only values that could travel through a socket.

Routes hold an `Engine` and nothing else of this package, so the engine can move to its own process without touching
them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from adapters.spec import AdapterSpec
from adapters.tokenizer import Encoding


@dataclass(frozen=True, slots=True)
class AdapterKey:
    """One immutable adapter: `revision` is the sha256 of its file, `name` the alias under which it was found."""

    name: str
    revision: str


@dataclass(frozen=True, slots=True)
class Entry:
    """One text to classify. `cost` is what it takes of a batch: its tokens and its adapter's prompt slots."""

    adapter: AdapterKey
    encoding: Encoding
    cost: int


@dataclass(frozen=True, slots=True)
class RowResult:
    """Scores float32 [labels] as the spec orders them; token_weights float32 [tokens]."""

    scores: npt.NDArray[np.float32]
    token_weights: npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Completion:
    """The answers to one request, in the order of its entries. Seconds are those of the slowest entry."""

    rows: tuple[RowResult, ...]
    queue_seconds: float
    inference_seconds: float


@dataclass(frozen=True, slots=True)
class EngineHealth:
    """live: the engine's thread runs and has moved lately. ready: it is warm and takes entries.

    reason: one sentence whenever it is not ready. details: figures for people.
    """

    live: bool
    ready: bool
    reason: str | None = None
    details: Mapping[str, float | str] = field(default_factory=dict)


class Engine(Protocol):
    """Runs entries of any mixture of adapters. Every method may be called from one event loop only."""

    async def start(self) -> None:
        """Load the backbone, warm up. Returns when entries are taken."""

    async def predict(self, entries: Sequence[Entry], *, deadline: float | None = None) -> Completion:
        """Classify all entries of one request, or fail as a whole.

        Cancelling the call drops the entries that no batch has taken yet.

        Args:
            deadline: on the clock of `time.monotonic`.

        Raises:
            Overloaded: not admitted: waiting tokens are at their limit. Nothing was queued.
            DeadlineExceeded: an entry waited past the deadline.
            AdapterLoadFailed: an adapter's file vanished or rotted since it was registered.
            InferenceFailed: the batch of an entry failed, or its scores are not finite.
            EngineUnavailable: draining, stopped or dead.
        """

    async def check(self, data: bytes) -> AdapterSpec:
        """Validate an adapter's bytes against the loaded backbone and run it once, without publishing anything.

        Raises:
            adapters.errors.InvalidAdapter, adapters.errors.IncompatibleAdapter: with every fault.
        """

    async def preload(self, key: AdapterKey) -> None:
        """Make an adapter resident if there is room without evicting; returns when it is or there is none."""

    async def drain(self) -> None:
        """Take no more entries; return when those taken are answered."""

    async def stop(self) -> None:
        """End the thread; whoever still waits fails with EngineUnavailable."""

    def health(self) -> EngineHealth:
        """Cheap enough for every probe."""
