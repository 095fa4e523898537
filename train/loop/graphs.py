"""Training steps as CUDA graphs: one launch where the same step costs thousands.

A step of some dozens of short texts takes the device about two milliseconds, and the host ten times
as long to launch. So the whole step (states of the lower layers, forward, backward, clipping,
AdamW) is captured for each bucket of sizes. The first two steps of a bucket run as they are; then
it is captured, and all later ones are replayed.

    texts -> Padding -> PackedBatch -> Staging -> one copy -> replay

What runs is the same with and without a graph: a bucket's padding is the same, and dropout draws
from the same seed and offsets.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor

from adapters.capture import capturing
from adapters.layers.attention import VARLEN_DTYPES
from adapters.packed.layout import Put
from adapters.packed.packing import PackedBatch
from train.config.recipe import Recipe
from train.loop.buckets import Bucket, Buckets, Padding
from train.loop.distributed import ProcessGroup
from train.loop.encoded_splits import Split
from train.loop.optimizer import Optimizer
from train.loop.staging import Demands, Measured, Staging
from train.methods.method import AdapterMethod, Method

logger = logging.getLogger(__name__)

# A capture costs about as much as it saves in two steps, and some buckets are rare.
_RECORD_AFTER = 2
# Every graph keeps some megabytes of the device's memory. Steps of further buckets run as they are.
_MOST_GRAPHS = 32


@dataclass(frozen=True, slots=True)
class StepInputs:
    """All that a step reads beside weights and kept states, on the device.

    found: where its lower layers' states are (`TrunkCache.find`). true: what is true of the rows,
    as the objective wants it. real: float32 [rows], 0 for the fillers. rates: float64 [groups].
    """

    batch: PackedBatch
    found: tuple[Tensor, ...]
    true: Tensor
    real: Tensor
    rates: Tensor


# Runs a step: its summed loss and its hits, [2].
Run: TypeAlias = Callable[[StepInputs], Tensor]


class Recorder(Protocol):
    """What can run a step again without Python."""

    def lane(self) -> AbstractContextManager[None]:
        """In the block, steps run where they are recorded."""
        ...

    def record(self, run: Run, inputs: StepInputs) -> Run:
        """What runs the step again, on whatever is in the inputs' places then. Runs nothing now."""
        ...


class CudaRecorder:
    """Records CUDA graphs, all in one memory pool: they run one after another on one stream, so
    each may overwrite what the last one left."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    @contextmanager
    def lane(self) -> Iterator[None]:
        # A stream of their own: the default one cannot be captured, and autograd runs a parameter's
        # gradient on the stream that first used it.
        outside = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(outside)
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            outside.wait_stream(self._stream)

    def record(self, run: Run, inputs: StepInputs) -> Run:
        graph = torch.cuda.CUDAGraph()
        try:
            with capturing(graph, stream=self._stream, pool=self._pool):
                figures = run(inputs)
        except BaseException:
            self._recover()
            raise

        def replay(_: StepInputs) -> Tensor:
            graph.replay()
            # The next replay overwrites them.
            return figures.clone()

        return replay

    def _recover(self) -> None:
        """After a capture that failed, the generator of random numbers still thinks that it is
        captured, until a capture ends well."""
        with suppress(Exception):
            torch.cuda.synchronize(self._device)
            with capturing(torch.cuda.CUDAGraph(), stream=self._stream):
                torch.zeros(1, device=self._device)


def recorder_for(method: Method, recipe: Recipe, group: ProcessGroup | None) -> Recorder | None:
    """What records the steps of a run; None: they run as they are.

    That is so on a CPU, with several processes, with micro-batches, and for methods and types whose
    kernels need lengths on the host.
    """
    backbone = method.backbone
    recordable = (
        backbone.device.type == "cuda"
        and backbone.dtype in VARLEN_DTYPES
        and isinstance(method, AdapterMethod)
        and (group is None or group.world_size == 1)
        and recipe.micro_batch >= recipe.batch_size
    )
    return CudaRecorder(backbone.device) if recordable else None


@dataclass(frozen=True, slots=True)
class _Recorded:
    """A bucket's step. staging: where its inputs are."""

    staging: Staging
    demands: Demands
    run: Run


@dataclass(frozen=True, slots=True)
class PaddedStep:
    """A step that is ready to run. recorded: None if its bucket is not."""

    indices: Sequence[int]
    share: float
    padding: Padding
    inputs: StepInputs
    measured: Measured | None
    recorded: _Recorded | None


class PaddedSteps:
    """Runs the steps of a method padded, and as recordings where their bucket has one.

    Args:
        split: the rows that it trains on.
    """

    def __init__(
        self,
        method: Method,
        optimizer: Optimizer,
        split: Split,
        *,
        batch_size: int,
        recorder: Recorder,
    ) -> None:
        self._method, self._optimizer, self._split = method, optimizer, split
        self._device = method.backbone.device
        self._recorder = recorder
        self._lengths = split.cache.lengths
        self._buckets = Buckets(batch_size=batch_size, longest=int(self._lengths.max()))
        self._recorded: dict[Bucket, _Recorded] = {}
        self._runs: Counter[Bucket] = Counter()
        self._failed = False

    def __len__(self) -> int:
        """Recorded buckets."""
        return len(self._recorded)

    def prepare(self, indices: Sequence[int], share: float) -> PaddedStep | None:
        """A step on these rows; None if it has no bucket, or if recording failed before.

        Args:
            share: of the peak learning rate.
        """
        if self._failed:
            return None
        padding = self._buckets.padding(self._lengths[indices].tolist())
        if padding is None:
            return None
        recorded = self._recorded.get(padding.bucket)
        if recorded is None:
            measured = Measured(self._device)
            inputs = self._inputs(indices, share, padding, measured.put)
            return PaddedStep(indices, share, padding, inputs, measured, None)
        recorded.staging.begin()
        inputs = self._inputs(indices, share, padding, recorded.staging.put)
        recorded.demands.make(inputs.batch)
        return PaddedStep(indices, share, padding, inputs, None, recorded)

    def run(self, step: PaddedStep) -> Tensor:
        """Update the weights; returns the summed loss and the hits, [2]."""
        with self._recorder.lane():
            if step.recorded is None:
                return self._run(step.inputs)
            step.recorded.staging.copy()
            return step.recorded.run(step.inputs)

    def record(self, step: PaddedStep) -> str | None:
        """Record a step that has run, unless its bucket is recorded or rare; changes no weight.

        Returns:
            Why nothing will be recorded from now on, if this failed.
        """
        if step.measured is None or len(self) >= _MOST_GRAPHS:
            return None
        self._runs[step.padding.bucket] += 1
        if self._runs[step.padding.bucket] < _RECORD_AFTER:
            return None
        try:
            self._record(step, step.measured)
        except Exception as error:
            logger.warning("a step cannot be captured", exc_info=True)
            self._failed = True
            self._recorded.clear()
            return (str(error).splitlines() or [type(error).__name__])[0]
        return None

    def _record(self, step: PaddedStep, measured: Measured) -> None:
        demands = Demands.on(step.inputs.batch)
        staging = Staging(self._device, measured.nbytes)
        inputs = self._inputs(step.indices, step.share, step.padding, staging.put)
        demands.make(inputs.batch)
        staging.seal()
        # Their gradients would stay beside those of the recording.
        self._optimizer.zero_grad()
        with self._recorder.lane():
            run = self._recorder.record(self._run, inputs)
        self._recorded[step.padding.bucket] = _Recorded(staging, demands, run)
        logger.debug("recorded %s", step.padding.bucket)

    def _inputs(
        self, indices: Sequence[int], share: float, padding: Padding, put: Put
    ) -> StepInputs:
        cache = self._split.cache
        batch = cache.pack(indices, fillers=padding.fillers, put=put, room=padding.bucket.longest)
        is_real = batch.order < len(indices)
        # A filler may have any class.
        rows = np.asarray(indices)[np.where(is_real, batch.order, 0)]
        return StepInputs(
            batch=batch,
            found=cache.find(indices, batch, put=put),
            true=put(self._split.classes[torch.from_numpy(rows)]),
            real=put(torch.from_numpy(is_real.astype(np.float32))),
            rates=put(self._optimizer.rates_at(share)),
        )

    def _run(self, inputs: StepInputs) -> Tensor:
        objective = self._method.objective
        self._optimizer.set_rates(inputs.rates)
        self._optimizer.zero_grad()
        trunk = self._split.cache.look_up(inputs.batch, inputs.found)
        logits = self._method(inputs.batch, trunk)
        loss = (objective.row_losses(logits, inputs.true) * inputs.real).sum()
        (loss / inputs.real.sum()).backward()
        self._optimizer.step()
        hits = (objective.row_hits(logits, inputs.true) * inputs.real).sum()
        return torch.stack([loss.detach(), hits])
