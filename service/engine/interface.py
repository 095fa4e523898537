"""What the HTTP side and the engine exchange.

Routes hold a `Predictor` and use nothing else of this package, because the engine may run in
another process (`service.ipc`). So all values here can be sent through a socket.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

import msgspec
import numpy as np
import numpy.typing as npt

from adapters.format.spec import AdapterSpec, BackboneIdentity
from adapters.tokenizer import Encoding, TextEncoder
from service.engine.load import Load
from service.engine.trials import Trial


class AdapterKey(NamedTuple):
    """One immutable adapter: its name in the store, and the sha256 of its file.

    A tuple, because it is looked up several times for every text and tuples hash fast.
    """

    name: str
    revision: str


# No adapter has this name: a text's vector instead of its scores, from the backbone alone.
EMBEDDING = AdapterKey("(embedding)", "")


# Every text has one of these and of `RowResult`. A struct is made in a third of the time of a
# dataclass. Neither refers to what refers to it, so the garbage collector need not know them.
class Entry(msgspec.Struct, eq=False, gc=False):
    """One text to classify.

    cost: as computed by `cost_of`. explain: whether its token weights are wanted. trial: set while
    its name tries a second revision. counted: whether it is a text that somebody sent; not so one
    that only explains another.
    """

    adapter: AdapterKey
    encoding: Encoding
    cost: int
    explain: bool = False
    trial: Trial | None = None
    counted: bool = True


def cost_of(encoding: Encoding, spec: AdapterSpec) -> int:
    """What a text takes of the token budget: its tokens and its adapter's prompt positions."""
    return len(encoding) + spec.prompt_length


class RowResult(msgspec.Struct, eq=False, gc=False):
    """The answer to one entry.

    scores: float32 [labels], in the spec's order; of `EMBEDDING` the vector, [n]. token_weights:
    float32 [tokens], each token's share of the soft prompt; None unless the entry wanted them,
    empty if no prompt is made from the text.
    shared: its lower layers were run for another row of the same text.
    """

    scores: npt.NDArray[np.float32]
    token_weights: npt.NDArray[np.float32] | None = None
    shared: bool = False


@dataclass(frozen=True, slots=True)
class Completion:
    """The answers to one request, in the order of its entries. Seconds: of the slowest entry.

    uncertain: the entries whose texts shall be kept, to be labelled. shared: how many rows took
    their lower layers from another row of the same text.
    """

    rows: tuple[RowResult, ...]
    queue_seconds: float
    inference_seconds: float
    uncertain: tuple[int, ...] = ()
    shared: int = 0


@dataclass(frozen=True, slots=True)
class EngineHealth:
    """live: the engine has not ended and no batch hangs. ready: it is warm and takes requests.

    reason: why it is not ready, in one sentence. details: figures for people. lease: until when it
    may answer, as of `service.replicas.lease.lease_time`; None: it needs no lease.
    """

    live: bool
    ready: bool
    reason: str | None = None
    details: Mapping[str, float | str] = field(default_factory=dict)
    lease: float | None = None


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What the HTTP side needs to encode texts. max_tokens: of one text. device: the first one, of
    so many `devices`."""

    encoder: TextEncoder
    identity: BackboneIdentity
    max_tokens: int
    hidden_size: int
    intermediate_size: int
    embedding_size: int
    layers: int
    device: str
    dtype: str
    devices: int = 1


class Predictor(Protocol):
    """An engine as the routes see it. All methods are called from one event loop."""

    @property
    def info(self) -> EngineInfo:
        """Facts about the loaded backbone.

        Raises:
            NotReady: it is not loaded yet.
        """

    @property
    def load(self) -> Load | None:
        """How busy the engine is, as far as is known here."""

    def foresee(
        self, adapters: Sequence[str], *, timeout: float, client: str = "", weight: float = 1.0
    ) -> None:
        """Refuse a request that `predict` would refuse however short its texts are.

        Takes microseconds: ask before texts are tokenised.

        Args:
            adapters: names of the adapters that it needs.
            timeout: seconds until its deadline.

        Raises:
            Overloaded: as `predict`.
        """

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
        """Classify all entries of one request, or fail as a whole.

        Cancelling the call drops the entries that no batch has taken yet.

        Args:
            entries: without any, the completion is empty and comes at once.
            deadline: on the clock of `time.monotonic`.
            client: who asks. Clients share the device, in proportion to their weights.
            bulk: part of a job for which nobody waits. It has a smaller share of the device, and
                does not make batches long in which other requests are.
            elsewhere: the caller asks another engine if this one refuses, so nobody is refused.

        Raises:
            Overloaded: it would be done after its deadline, or does not fit beside what waits.
                Nothing was queued.
            TooLarge: more tokens than may ever wait.
            InvalidRequest: more distinct adapters than can be active at once.
            DeadlineExceeded: the request was not answered by its deadline, or could not have been
                by an idle device.
            AdapterLoadFailed: an adapter's file is missing or damaged.
            InferenceFailed: the batch of an entry failed, or its scores are not finite.
            NotReady: the engine has not started yet.
            EngineUnavailable: it is draining, stopped or dead.
        """

    async def drain(self) -> None:
        """Refuse new requests from now on; return when all others are answered."""


@dataclass(frozen=True, slots=True)
class CheckedAdapter:
    """A file that an engine has tried. prepared: as that engine's device wants it; None: the engine
    reads the file again."""

    spec: AdapterSpec
    prepared: object = None


class Engine(Predictor, Protocol):
    """An engine whose device is in this process."""

    async def start(self) -> EngineInfo:
        """Load the backbone and warm up; returns when the engine is ready.

        Raises:
            adapters.errors.AdapterError: the backbone is not supported or cannot be used.
            RuntimeError: the device cannot run it.
        """

    def health(self) -> EngineHealth:
        """Cheap enough for every probe."""

    async def check(self, file: Path) -> CheckedAdapter:
        """Validate an adapter file against the backbone and run it once; nothing is published.

        The file must not change meanwhile, and is not needed afterwards.

        Raises:
            OSError: it cannot be read.
            adapters.errors.InvalidAdapter, adapters.errors.IncompatibleAdapter: naming every fault.
            Overloaded, InferenceFailed, NotReady, EngineUnavailable: as `predict`.
        """

    def in_use(self, name: str) -> frozenset[str]:
        """The revisions of a name that running requests hold or wait for."""

    async def preload(self, key: AdapterKey, checked: CheckedAdapter | None = None) -> None:
        """Activate an adapter if that evicts no other.

        Args:
            checked: what `check` made of the same bytes, so that they need not be read again.

        Raises:
            AdapterLoadFailed, NotReady, EngineUnavailable: as `predict`.
        """

    def retire(self, key: AdapterKey) -> None:
        """Give back the memory of an adapter that is no longer served: now, or once no request
        holds it or waits for it. `preload` takes it back."""

    async def stop(self) -> None:
        """End the threads; open requests fail with EngineUnavailable. May be called twice."""
