"""What runs batches on a device, and where it keeps adapters. Knows no queue and no request.

Two devices, one interface: `packed_runner` runs any device, adapter by adapter where it must;
`slotted_runner` runs CUDA devices, where launching is what costs. Whatever happens on the device
ends in one outcome a row: `launch` and `finish` raise `DeviceLost` and nothing else.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from adapters.backbone.model import Backbone
from adapters.backbone.tokenizer import Encoding
from adapters.format.files import Adapter
from adapters.format.spec import AdapterSpec
from service.engine.interface import RowResult
from service.errors import InferenceFailure

logger = logging.getLogger(__name__)

# torch's CPU allocator raises a plain RuntimeError, and so do some CUDA libraries; oneDNN does not
# say why it could not make room for a primitive's code.
_OUT_OF_MEMORY = (
    "out of memory",
    "defaultcpuallocator",
    "can't allocate memory",
    "could not create a primitive",
    "could not execute a primitive",
)


class DeviceLost(Exception):
    """The device cannot be used any more; only a new process gets it back."""


class Hosted(Protocol):
    """An adapter in host memory."""

    @property
    def nbytes(self) -> int: ...


class Placed(Protocol):
    """An adapter on the device."""

    @property
    def spec(self) -> AdapterSpec: ...
    @property
    def nbytes(self) -> int: ...


class Asked(NamedTuple):
    """One row of a batch. explain: its token weights are asked for."""

    encoding: Encoding
    adapter: Placed
    explain: bool = False


@dataclass(frozen=True, slots=True)
class RowFailure:
    """Why a row has no answer."""

    reason: InferenceFailure
    message: str


NOT_FINITE = RowFailure("not_finite", "the scores are not finite")


@dataclass(frozen=True, slots=True)
class Ran:
    """What became of a batch.

    outcomes: one a row, in order. generator_seconds, backbone_seconds: as in `BatchReport`.
    passes: forward passes that it took. graphs: how many of them were one launch.
    """

    outcomes: list[RowResult | RowFailure]
    generator_seconds: float | None = None
    backbone_seconds: float = 0.0
    passes: int = 1
    graphs: int = 0


class Flight(Protocol):
    """A batch on the device."""


class Runner(Protocol):
    """A backbone and adapters on one device.

    `adopt` and `place` are called from loading threads, everything else from the device's lanes.
    """

    @property
    def backbone(self) -> Backbone: ...

    @property
    def ahead(self) -> bool:
        """Whether a batch may be launched while another one runs."""

    @property
    def lanes(self) -> int:
        """Threads that may launch and finish batches of their own, side by side."""

    def enter_lane(self) -> None:
        """Called once by each of them before anything else."""

    def adopt(self, adapter: Adapter) -> Hosted:
        """Do everything for an adapter that does not need its place on the device.

        Raises:
            IncompatibleAdapter, InvalidAdapter: it cannot run here.
        """

    def place(self, adapters: Sequence[tuple[int, Hosted]]) -> list[Placed]:
        """Put adapters in places (0 to all the runner has) that no batch uses; returns when they
        can be."""

    def warm_up(self, max_tokens: int) -> None:
        """Run a lone short text and a batch of `max_tokens`: the first requests find all there.

        Raises:
            RuntimeError: the device cannot run this backbone.
        """

    def launch(self, rows: Sequence[Asked]) -> Flight:
        """Start a batch of any mixture of adapters.

        A batch that does not fit into memory is halved until it does; a single row that does not
        fails alone, and so does a row whose scores are not finite. Other errors fail all rows.
        """

    def landed(self, flight: Flight) -> bool:
        """Whether `finish` would not wait."""

    def finish(self, flight: Flight) -> Ran:
        """Wait for a batch. Batches are finished in the order in which they were launched."""


def warm_up_batches(backbone: Backbone, adapter: Placed, max_tokens: int) -> Iterator[list[Asked]]:
    """A lone short text, and as many of the longest as a batch of `max_tokens` takes."""
    encode, spec = backbone.encoder.encode, adapter.spec
    short = encode("warm", max_length=spec.max_length)
    long = encode("warm up " * spec.max_length, max_length=spec.max_length)
    yield [Asked(short, adapter)]
    yield [Asked(long, adapter)] * max(1, max_tokens // (len(long) + spec.prompt_length))


def require_answers(ran: Ran, max_tokens: int) -> None:
    """
    Raises:
        RuntimeError: a row of the warm-up has no answer.
    """
    if failures := [item for item in ran.outcomes if isinstance(item, RowFailure)]:
        raise RuntimeError(f"the warm-up failed: {failures[0].message}")
    if ran.passes > 1:
        logger.warning(
            "a batch of %d tokens does not fit into the device's memory: it took %d passes",
            max_tokens,
            ran.passes,
        )


def failed(rows: Sequence[Asked], error: Exception) -> Ran | None:
    """What becomes of a batch that raised; None: there was no memory for it, so halve it."""
    if not _is_out_of_memory(error):
        logger.error("a batch of %d rows failed", len(rows), exc_info=error)
        message = f"the batch failed: {type(error).__name__}"
        return Ran([RowFailure("batch_error", message)] * len(rows))
    if len(rows) == 1:
        logger.error("the device has no memory for a text of %d tokens", len(rows[0].encoding))
        return Ran([RowFailure("out_of_memory", "the device has no memory for this text")])
    return None


def joined(first: Ran, second: Ran) -> Ran:
    """Two halves of a batch as one."""
    return Ran(
        first.outcomes + second.outcomes,
        None
        if first.generator_seconds is None or second.generator_seconds is None
        else first.generator_seconds + second.generator_seconds,
        first.backbone_seconds + second.backbone_seconds,
        first.passes + second.passes,
        first.graphs + second.graphs,
    )


def _is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(
        sign in str(error).lower() for sign in _OUT_OF_MEMORY
    )
