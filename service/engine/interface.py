"""What crosses between the HTTP side and the engine: values that fit through a socket.

Routes hold a `Predictor` and nothing else of this package: the engine behind it may be in another
process (`service.ipc`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from adapters.backbone.tokenizer import Encoding, TextEncoder
from adapters.format.spec import AdapterSpec, BackboneIdentity


class AdapterKey(NamedTuple):
    """One immutable adapter: `revision` is the sha256 of its file, `name` where it is stored.

    A tuple, because it is looked up several times for every text.
    """

    name: str
    revision: str


# Not frozen, as `RowResult` and `Encoding`: one is made for every text, and a frozen one takes four
# times as long to make.
@dataclass(slots=True, eq=False)
class Entry:
    """One text to classify.

    cost: its tokens and its adapter's prompt slots, see `cost_of`. explain: its token weights are
    asked for.
    """

    adapter: AdapterKey
    encoding: Encoding
    cost: int
    explain: bool = False


def cost_of(encoding: Encoding, spec: AdapterSpec) -> int:
    """What a text takes of a batch's token budget."""
    return len(encoding) + spec.prompt_length


@dataclass(slots=True, eq=False)
class RowResult:
    """Scores float32 [labels] as the spec orders them.

    token_weights: float32 [tokens], what share of the prompt came from each, if the entry asked.
    """

    scores: npt.NDArray[np.float32]
    token_weights: npt.NDArray[np.float32] | None = None


@dataclass(frozen=True, slots=True)
class Completion:
    """The answers to one request, in its entries' order. Seconds are those of the slowest entry."""

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


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What the HTTP side, which encodes texts itself, must know. max_tokens: of one text."""

    encoder: TextEncoder
    identity: BackboneIdentity
    max_tokens: int
    hidden_size: int
    layers: int
    device: str
    dtype: str


class Predictor(Protocol):
    """What routes ask, wherever the engine is. All methods are called from one event loop."""

    @property
    def info(self) -> EngineInfo:
        """Facts about the loaded backbone.

        Raises:
            NotReady: it is not loaded yet.
        """

    async def predict(
        self, entries: Sequence[Entry], *, deadline: float | None = None
    ) -> Completion:
        """Classify all entries of one request, or fail as a whole.

        Cancelling the call drops the entries that no batch has taken yet.

        Args:
            entries: none is answered at once by an empty completion.
            deadline: on the clock of `time.monotonic`.

        Raises:
            Overloaded: not admitted: waiting tokens are at their limit. Nothing was queued.
            TooLarge: more tokens than may ever wait.
            InvalidRequest: more distinct adapters than can be active at once.
            DeadlineExceeded: the request was not answered by its deadline.
            AdapterLoadFailed: an adapter's file vanished or rotted since it was registered.
            InferenceFailed: the batch of an entry failed, or its scores are not finite.
            NotReady: not started.
            EngineUnavailable: draining, stopped or dead.
        """

    async def drain(self) -> None:
        """Take no more entries; return when those taken are answered."""

    def health(self) -> EngineHealth:
        """Cheap enough for every probe."""


class Engine(Predictor, Protocol):
    """Runs entries of any mixture of adapters on a device of this process."""

    async def start(self) -> EngineInfo:
        """Load the backbone and warm up. Returns when entries are taken.

        Raises:
            adapters.errors.AdapterError: the backbone is not supported or not usable.
            RuntimeError: the device cannot run it.
        """

    async def check(self, data: bytes) -> AdapterSpec:
        """Validate an adapter's bytes against the backbone and run it once, publishing nothing.

        Raises:
            adapters.errors.InvalidAdapter, adapters.errors.IncompatibleAdapter: with every fault.
            Overloaded, InferenceFailed, NotReady, EngineUnavailable: as `predict`.
        """

    async def preload(self, key: AdapterKey) -> None:
        """Activate an adapter if that evicts no other; returns when it is active or cannot be.

        Raises:
            AdapterLoadFailed, NotReady, EngineUnavailable: as `predict`.
        """

    async def stop(self) -> None:
        """End the thread; whoever waits fails with EngineUnavailable. Stopping twice is fine."""
