"""The contract of a runner, and what both runners share.

`packed` runs on any device, adapter by adapter where it must; `slotted` runs on CUDA, where the
cost is in launching. Every failure becomes an outcome of its row: `Runner.launch` and
`RunningBatch.wait` raise nothing but `DeviceLost`.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from adapters.backbone.model import Backbone
from adapters.format.files import Adapter
from adapters.format.spec import AdapterSpec
from adapters.tokenizer import Encoding
from service.engine.interface import RowResult
from service.errors import InferenceFailure

logger = logging.getLogger(__name__)

# torch's CPU allocator raises a plain RuntimeError, as do some CUDA libraries. oneDNN does not say
# why it could not make room for a primitive's code.
_OUT_OF_MEMORY = (
    "out of memory",
    "defaultcpuallocator",
    "can't allocate memory",
    "could not create a primitive",
    "could not execute a primitive",
)


class DeviceLost(Exception):
    """The device cannot be used any more; only a new process gets it back."""


class HostAdapter(Protocol):
    """An adapter in host memory, in the form that its runner can load."""

    @property
    def spec(self) -> AdapterSpec: ...
    @property
    def nbytes(self) -> int: ...


class DeviceAdapter(HostAdapter, Protocol):
    """An adapter in a slot of the device."""


class BatchRow(NamedTuple):
    """One row of a batch. explain: whether its token weights are wanted."""

    encoding: Encoding
    adapter: DeviceAdapter
    explain: bool = False


@dataclass(frozen=True, slots=True)
class RowFailure:
    """Why a row has no answer."""

    reason: InferenceFailure
    message: str


NOT_FINITE = RowFailure("not_finite", "the scores are not finite")


class RunningBatch(Protocol):
    """A batch that was launched."""

    def is_done(self) -> bool:
        """Whether `wait` would return at once."""

    def wait(self) -> "BatchResult":
        """Wait for the result. Batches are awaited in the order in which they were launched."""


@dataclass(frozen=True, slots=True)
class BatchResult:
    """The result of a batch; also a `RunningBatch` that is done.

    outcomes: one per row, in order. generator_seconds, backbone_seconds: as in `BatchReport`.
    passes: forward passes that it took. graphs: how many of them were a single graph launch.
    """

    outcomes: list[RowResult | RowFailure]
    generator_seconds: float | None = None
    backbone_seconds: float = 0.0
    passes: int = 1
    graphs: int = 0

    def is_done(self) -> bool:
        return True

    def wait(self) -> "BatchResult":
        return self


class Runner(Protocol):
    """A backbone and adapters on one device.

    `prepare` and `load` are called from loading threads, everything else from the device's lanes.
    """

    @property
    def backbone(self) -> Backbone: ...

    @property
    def launches_ahead(self) -> bool:
        """Whether a batch may be launched while another one runs."""

    @property
    def lanes(self) -> int:
        """Threads that may each launch and await batches of their own, side by side."""

    def enter_lane(self) -> None:
        """Called once by each of these threads before anything else."""

    def prepare(self, adapter: Adapter) -> HostAdapter:
        """Do everything for an adapter that needs no slot.

        Raises:
            IncompatibleAdapter, InvalidAdapter: it cannot run here.
        """

    def load(self, adapters: Sequence[tuple[int, HostAdapter]]) -> list[DeviceAdapter]:
        """Copy adapters into slots (from 0) that no batch uses; returns when they can be used."""

    def warm_up(self, max_tokens: int) -> None:
        """Run one short text and a batch of `max_tokens`, so that the first requests are not slow.

        Raises:
            RuntimeError: the device cannot run this backbone.
        """

    def launch(self, rows: Sequence[BatchRow]) -> RunningBatch:
        """Start a batch of any mixture of adapters.

        A batch that does not fit into memory is halved until it does; a single row that does not
        fit fails alone, and so does a row whose scores are not finite. Other errors fail all rows.
        """


def run_warm_up(runner: Runner, adapter: Adapter, max_tokens: int) -> None:
    """Run one short text, then as many of the longest texts as a batch of `max_tokens` holds.

    Raises:
        RuntimeError: a row has no answer.
    """
    (loaded,) = runner.load([(0, runner.prepare(adapter))])
    encode, spec = runner.backbone.encoder.encode, adapter.spec
    short = BatchRow(encode("warm", max_length=spec.max_length), loaded)
    long = BatchRow(encode("warm up " * spec.max_length, max_length=spec.max_length), loaded)
    fitting = max(1, max_tokens // (len(long.encoding) + spec.prompt_length))
    for rows in ([short], [long] * fitting):
        result = runner.launch(rows).wait()
        for outcome in result.outcomes:
            if isinstance(outcome, RowFailure):
                raise RuntimeError(f"the warm-up failed: {outcome.message}")
        if result.passes > 1:
            logger.warning(
                "a batch of %d tokens does not fit into the device's memory: it took %d passes",
                max_tokens,
                result.passes,
            )


def launch_or_halve(
    rows: Sequence[BatchRow],
    launch: Callable[[Sequence[BatchRow]], RunningBatch],
    device: torch.device,
) -> RunningBatch:
    """Launch a batch. If there is no memory for it, run its halves one after the other.

    Raises:
        DeviceLost: after this error every later call to the device fails.
    """
    try:
        return launch(rows)
    except torch.AcceleratorError as error:
        raise DeviceLost(str(error).splitlines()[0]) from error
    except Exception as error:
        failure = _failure_of(rows, error)
    # Not inside the handler: the traceback would keep the failed pass's tensors alive.
    if failure is not None:
        return BatchResult([failure] * len(rows))
    if device.type == "cuda":
        torch.cuda.current_stream().synchronize()
        torch.cuda.empty_cache()
    middle = len(rows) // 2
    first = launch_or_halve(rows[:middle], launch, device).wait()
    return _joined(first, launch_or_halve(rows[middle:], launch, device).wait())


def _failure_of(rows: Sequence[BatchRow], error: Exception) -> RowFailure | None:
    """Why every row of a batch fails; None if the batch lacked memory and can be halved."""
    if not _is_out_of_memory(error):
        logger.error("a batch of %d rows failed", len(rows), exc_info=error)
        return RowFailure("batch_error", f"the batch failed: {type(error).__name__}")
    if len(rows) == 1:
        logger.error("the device has no memory for a text of %d tokens", len(rows[0].encoding))
        return RowFailure("out_of_memory", "the device has no memory for this text")
    return None


def _joined(first: BatchResult, second: BatchResult) -> BatchResult:
    """The results of two halves of a batch as one."""
    seconds = None
    if first.generator_seconds is not None and second.generator_seconds is not None:
        seconds = first.generator_seconds + second.generator_seconds
    return BatchResult(
        first.outcomes + second.outcomes,
        seconds,
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
