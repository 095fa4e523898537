"""The contract of a runner, and what both runners share.

`packed` runs on any device, adapter by adapter where it must; `slotted` runs on CUDA, where the
cost is in launching. Every failure becomes an outcome of its row: `Runner.launch` and
`RunningBatch.wait` raise nothing but `DeviceLost`.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Protocol

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adapters.backbone.model import Backbone
from adapters.faults import fault_point
from adapters.flattened import Layout
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


# Enough to find two rows of a thousand that fail alone.
_MAX_ERRORS = 32
# A full batch that takes longer is not run a second time at the start.
_QUICK_SECONDS = 0.1


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


class BatchRow(msgspec.Struct, eq=False, gc=False):
    """One row of a batch, a struct because every text has one.

    explain: whether its token weights are wanted.
    """

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

    @property
    def spins(self) -> bool:
        """Whether `wait` keeps a core busy all the while."""

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

    @property
    def spins(self) -> bool:
        return False

    def is_done(self) -> bool:
        return True

    def wait(self) -> "BatchResult":
        return self


class Loading(Protocol):
    """An adapter on its way into a slot."""

    def wait(self) -> DeviceAdapter:
        """Return it when batches can use it."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """A `Loading` that is done."""

    adapter: DeviceAdapter

    def wait(self) -> DeviceAdapter:
        return self.adapter


class Runner(Protocol):
    """A backbone and adapters on one device.

    `prepare`, `flatten`, `restore` and `load` are called from loading threads, everything else from
    the device's lanes.
    """

    @property
    def backbone(self) -> Backbone: ...

    @property
    def launches_ahead(self) -> bool:
        """Whether a batch may be launched while another one runs."""

    @property
    def copies(self) -> bool:
        """Whether an adapter in a slot needs no host memory."""

    @property
    def lanes(self) -> int:
        """Threads that may each launch and await batches of their own, side by side."""

    @property
    def embedder(self) -> DeviceAdapter:
        """The adapter of rows whose answer is their vector. It is in no slot."""

    def enter_lane(self) -> None:
        """Called once by each of these threads before anything else."""

    def prepare(self, adapter: Adapter) -> HostAdapter:
        """Do everything for an adapter that needs no slot.

        Raises:
            IncompatibleAdapter, InvalidAdapter: it cannot run here.
        """

    @property
    def form(self) -> str:
        """Names the form of its host adapters: images of another form are of no use."""

    def flatten(self, adapter: HostAdapter) -> tuple[Layout, Tensor]:
        """A prepared adapter without its spec: JSON values, and memory, uint8 on the CPU."""

    def memory(self, nbytes: int, *, passing: bool) -> Tensor:
        """Host memory, uint8 [nbytes], that an adapter is read into.

        Args:
            passing: the adapter is loaded at once and then dropped. For these there may be a little
                memory from which loading takes one copy less.
        """

    def restore(self, spec: AdapterSpec, layout: Layout, memory: Tensor) -> HostAdapter:
        """The adapter that was flattened; it may keep `memory`.

        Raises:
            Exception: of any kind, if this is no layout of this memory.
        """

    def load(self, adapters: Sequence[tuple[int, HostAdapter]]) -> list[DeviceAdapter]:
        """Copy adapters into slots (from 0) that no batch uses; returns when they can be used."""

    def begin_load(self, slot: int, adapter: HostAdapter) -> "Loading":
        """Begin to copy one adapter; what is copied need not be known to be whole yet."""

    def unload(self, slot: int) -> None:
        """Give back the memory of a slot that no batch uses. Called by any thread."""

    def warm_up(self, max_tokens: int) -> Sequence[tuple[int, float]]:
        """Run one short text and a batch of `max_tokens`, so that the first requests are not slow.

        Returns the tokens and seconds of a few batches that were run again once all was warm.

        Raises:
            RuntimeError: the device cannot run this backbone.
        """

    def launch(self, rows: Sequence[BatchRow]) -> RunningBatch:
        """Start a batch of any mixture of adapters.

        A batch that fails, for lack of memory or otherwise, is halved, so that only the rows fail
        that fail alone: `launch_or_halve`. So does a row whose scores are not finite.
        """


def run_warm_up(runner: Runner, adapter: Adapter, max_tokens: int) -> list[tuple[int, float]]:
    """Run one short text, then as many of the longest texts as a batch of `max_tokens` holds; then
    both again, now with a clock. Where a full batch is slow, a quarter of it is timed.

    Raises:
        RuntimeError: a row has no answer.
    """
    (loaded,) = runner.load([(0, runner.prepare(adapter))])
    encode, spec = runner.backbone.encoder.encode, adapter.spec
    short = BatchRow(encode("warm", max_length=spec.max_length), loaded)
    long = BatchRow(encode("warm up " * spec.max_length, max_length=spec.max_length), loaded)
    fitting = max(1, max_tokens // (len(long.encoding) + spec.prompt_length))

    def run(rows: Sequence[BatchRow]) -> tuple[int, float]:
        started = perf_counter()
        result = runner.launch(rows).wait()
        seconds = perf_counter() - started
        for outcome in result.outcomes:
            if isinstance(outcome, RowFailure):
                raise RuntimeError(f"the warm-up failed: {outcome.message}")
        if result.passes > 1:
            logger.warning(
                "a batch of %d tokens does not fit into the device's memory: it took %d passes",
                max_tokens,
                result.passes,
            )
        return sum(len(row.encoding) + spec.prompt_length for row in rows), seconds

    run([short])
    _, seconds = run([long] * fitting)
    quick = seconds < _QUICK_SECONDS
    return [run([short]), run([long] * (fitting if quick else -(-fitting // 4)))]


def launch_or_halve(
    rows: Sequence[BatchRow],
    launch: Callable[[Sequence[BatchRow]], RunningBatch],
    device: torch.device,
) -> RunningBatch:
    """Launch a batch. If it fails, run its halves one after the other, until each row is answered
    or has failed alone.

    A batch that lacks memory is halved as often as it takes. After `_MAX_ERRORS` other errors the
    remaining rows fail without another attempt: then the rows are not the cause.

    Raises:
        DeviceLost: after this error every later call to the device fails.
    """
    return _launch_or_halve(rows, launch, device, [])


def _launch_or_halve(
    rows: Sequence[BatchRow],
    launch: Callable[[Sequence[BatchRow]], RunningBatch],
    device: torch.device,
    errors: list[str],
) -> RunningBatch:
    """errors: of this batch up to now."""
    if len(errors) >= _MAX_ERRORS:
        return _failed(rows, errors[-1])
    try:
        _inject_faults()
        return launch(rows)
    except torch.AcceleratorError as error:
        raise DeviceLost(str(error).splitlines()[0]) from error
    except DeviceLost:
        raise
    except Exception as error:
        lacks_memory = is_out_of_memory(error)
        if not lacks_memory:
            # With its traceback only once: what the halves raise is mostly the same.
            logger.error(
                "a batch of %d rows failed: %r",
                len(rows),
                error,
                exc_info=None if errors else error,
            )
            errors.append(type(error).__name__)
    # Not inside the handler: the traceback would keep the failed pass's tensors alive.
    if len(rows) == 1 and not lacks_memory:
        return _failed(rows, errors[-1])
    if len(rows) == 1:
        logger.error("the device has no memory for a text of %d tokens", len(rows[0].encoding))
        return BatchResult([RowFailure("out_of_memory", "the device has no memory for this text")])
    if device.type == "cuda":
        torch.cuda.current_stream().synchronize()
        torch.cuda.empty_cache()
    middle = len(rows) // 2
    first = _launch_or_halve(rows[:middle], launch, device, errors).wait()
    return _joined(first, _launch_or_halve(rows[middle:], launch, device, errors).wait())


def _failed(rows: Sequence[BatchRow], error: str) -> BatchResult:
    return BatchResult([RowFailure("batch_error", f"the batch failed: {error}")] * len(rows))


def _inject_faults() -> None:
    """The faults of a device, for tests: `adapters.faults`."""
    if fault_point("runner.out_of_memory"):
        raise torch.OutOfMemoryError("out of memory: injected by a test")
    if fault_point("runner.kernel"):
        raise RuntimeError("a kernel failed: injected by a test")
    if fault_point("runner.device_lost"):
        raise DeviceLost("injected by a test")


def spoil_scores(scores: NDArray[np.float32]) -> None:
    """Make the scores of a row not finite if a test asks for it."""
    if fault_point("runner.not_finite"):
        scores[...] = np.nan


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


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device or the host had no memory left."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(
        sign in str(error).lower() for sign in _OUT_OF_MEMORY
    )
