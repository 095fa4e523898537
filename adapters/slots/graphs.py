"""Forward passes over slots, captured as CUDA graphs and replayed.

A graph costs one launch where the same pass costs hundreds. Launches take most of a small batch's
time, and in a large one they would keep the device waiting for Python. All graphs share one memory
pool: they run one after another on one stream, so each may overwrite what the last one left.
"""

import logging
from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor

from adapters.backbone.model import Backbone
from adapters.capture import capturing
from adapters.slots.bank import SlotBank
from adapters.slots.batch import BatchShape, Signature, SlottedBatch, blank_array
from adapters.slots.buckets import Buckets, cost
from adapters.slots.forward import Inputs, Outputs, Widths, run

logger = logging.getLogger(__name__)

# A bucket that was not captured at the start is captured when this many batches have needed it.
_CAPTURE_AFTER = 16
# A graph that costs so many times what would do is still quicker than launching kernel by kernel.
_LARGER = 2
# At most this many signatures have graphs, because every graph keeps device memory.
_MAX_SIGNATURES = 12
# Signatures whose batches are counted. Beyond that, all counts start anew.
_MAX_COUNTED = 256


@dataclass(frozen=True, slots=True)
class _Graph:
    inputs: Inputs
    outputs: Outputs
    graph: torch.cuda.CUDAGraph


class CudaGraphs:
    """The captured buckets of one backbone and bank. Used from one thread, on one stream.

    Args:
        widths: a batch with wider adapters has no graph.
        max_positions: positions of a batch, prompts included.
        longest: positions of the longest row that any adapter takes.
    """

    def __init__(
        self,
        backbone: Backbone,
        bank: SlotBank,
        *,
        widths: Widths,
        max_positions: int,
        longest: int,
    ) -> None:
        self._backbone = backbone
        self._bank = bank
        self._widths = widths
        self._max_positions = max_positions
        self._longest = longest
        self._pool = torch.cuda.graph_pool_handle()
        self._buckets: dict[Signature, Buckets] = {}
        self._graphs: dict[tuple[Signature, BatchShape], _Graph] = {}
        self._captured: set[Signature] = set()
        self._misses: Counter[tuple[Signature, BatchShape]] = Counter()

    def __len__(self) -> int:
        return len(self._graphs)

    def capture_all(self, signature: Signature) -> None:
        """Capture every bucket for different texts, largest first: the small ones reuse its memory.

        Those for texts that rows share follow when they are needed.
        """
        for shape in reversed(self._buckets_of(signature).shapes):
            self._capture(signature, shape)

    def bucket_for(self, batch: SlottedBatch, widths: Widths) -> BatchShape | None:
        """The bucket whose graph can run this batch; None if there is none.

        A bucket that is needed often enough is captured here, which takes tens of milliseconds.
        Until then the graph of a bucket that is not much larger will do.
        """
        signature = batch.signature
        if not self._widths.holds(widths):
            return None
        # A signature takes one of the places only with its first graph: rare ones come and go.
        if signature not in self._captured and len(self._captured) >= _MAX_SIGNATURES:
            return None
        buckets = self._buckets_of(signature)
        shared = batch.shared is not None
        bucket = buckets.cheapest(batch.shape, shared=shared)
        if bucket is None or (signature, bucket) in self._graphs:
            return bucket
        self._misses[signature, bucket] += 1
        if self._misses[signature, bucket] < _CAPTURE_AFTER:
            there = {shape for known, shape in self._graphs if known == signature}
            larger = buckets.cheapest(batch.shape, shared=shared, among=there)
            return larger if larger and cost(larger) <= _LARGER * cost(bucket) else None
        self._capture(signature, bucket)
        return bucket

    def replay(self, signature: Signature, bucket: BatchShape, array: Tensor) -> Outputs:
        """Run a batch that was written for this bucket; the next replay overwrites the outputs."""
        captured = self._graphs[signature, bucket]
        captured.inputs.array.copy_(array, non_blocking=True)
        captured.graph.replay()
        return captured.outputs

    def _buckets_of(self, signature: Signature) -> Buckets:
        if signature not in self._buckets:
            if len(self._buckets) >= _MAX_COUNTED:
                self._buckets = {known: self._buckets[known] for known in self._captured}
                self._misses.clear()
            self._buckets[signature] = Buckets(
                signature, max_positions=self._max_positions, longest=self._longest
            )
        return self._buckets[signature]

    def _capture(self, signature: Signature, shape: BatchShape) -> None:
        array = torch.from_numpy(blank_array(shape, signature)).to(self._backbone.device)
        inputs = Inputs(array, shape, signature)
        # The first run compiles kernels and lets libraries allocate: a capture allows neither.
        run(self._backbone, self._bank, inputs, self._widths)
        graph = torch.cuda.CUDAGraph()
        with capturing(graph, stream=torch.cuda.current_stream(), pool=self._pool):
            outputs = run(self._backbone, self._bank, inputs, self._widths)
        self._graphs[signature, shape] = _Graph(inputs, outputs, graph)
        self._captured.add(signature)
        logger.debug("captured signature=%s shape=%s", signature, shape)
