"""Runs batches on a CUDA device: adapters in slots, fused kernels, CUDA graphs.

There are two streams. The device's lane computes on one; loading threads use the other to copy
adapters into slots that no batch uses. A batch uses a slot only once its load has ended, and a
slot is filled again only when nothing leases it, so the streams need no events between them.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import repeat
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adapters.adapter import PreparedAdapter, classify, prepare, rows_of
from adapters.backbone.model import Backbone, random_adapter, random_of
from adapters.embedding import embedder
from adapters.flattened import Layout
from adapters.format.files import Adapter
from adapters.format.spec import AdapterSpec, AttentionPrompt, LoraTuning, Site, VectorTuning
from adapters.layers.attention import VARLEN_DTYPES
from adapters.packed.layout import Indices
from adapters.slots.bank import ActiveAdapter, AdapterImage, SlotBank, image_of
from adapters.slots.batch import (
    BatchShape,
    Fact,
    InsertionPoint,
    Signature,
    SlottedBatch,
    Source,
    array_size,
    weights_end,
)
from adapters.slots.buckets import MOST_UNSHARED
from adapters.slots.forward import Inputs, Outputs, Widths, run
from adapters.slots.graphs import CudaGraphs
from adapters.tokenizer import Encoding
from service.engine.interface import RowResult
from service.engine.runners.base import (
    NOT_FINITE,
    BatchResult,
    BatchRow,
    DeviceAdapter,
    DeviceLost,
    HostAdapter,
    RowFailure,
    RunningBatch,
    launch_or_halve,
    run_warm_up,
    spoil_scores,
)
from service.engine.runners.pinned import Piece, PinnedMemory

logger = logging.getLogger(__name__)

# The largest adapter that graphs are captured for; a batch with a larger one runs eagerly.
_COMMON_BOTTLENECK = 64
_COMMON_PROMPT = 16
_COMMON_LABELS = 256
# A batch of fewer positions is done in about a millisecond.
_BRIEF_POSITIONS = 3072

# At the start, the scores of these texts must match the packed forward pass to bfloat16's error.
_PROBES = (
    "",
    "A first text.",
    "Another one, somewhat longer, with more than one clause in it. " * 8,
)
_PROBE_BOUND = 0.05
# Where products are in float8: a last bit of difference may round a number to its neighbour, which
# is up to an eighth away.
_FLOAT8_PROBE_BOUND = 0.15


@dataclass(frozen=True, slots=True)
class _Launched:
    """A batch on the device.

    scores, weights: in `piece`, which goes back to `memory`. weights: None if no row wants them.
    done: recorded after the copies of scores and weights. spins: as of `RunningBatch`. shape: that
    the batch was written for.
    """

    batch: SlottedBatch
    rows: Sequence[BatchRow]
    scores: Tensor
    weights: Tensor | None
    done: torch.cuda.Event
    spins: bool
    started: float
    graphs: int
    memory: PinnedMemory
    piece: Piece
    shape: BatchShape

    def is_done(self) -> bool:
        try:
            return bool(self.done.query())
        except RuntimeError:
            # `wait` raises the error.
            return True

    def wait(self) -> BatchResult:
        try:
            self.done.synchronize()
        except RuntimeError as error:
            # After an error here, CUDA raises the same error for every later call.
            raise DeviceLost(str(error).splitlines()[0]) from error
        seconds = perf_counter() - self.started
        outcomes = self._outcomes()
        self.memory.give_back(self.piece)
        return BatchResult(outcomes, backbone_seconds=seconds, graphs=self.graphs)

    def _outcomes(self) -> list[RowResult | RowFailure]:
        """One per row, in the order of `rows`."""
        batch, scores = self.batch, self.scores.numpy().copy()
        spoil_scores(scores[0])
        # Whole arrays as far as possible: every text pays for what is done row by row.
        place = np.empty_like(batch.order)
        place[batch.order] = np.arange(len(place))
        labels, rows = batch.facts[:, Fact.LABELS][place], list(scores[place])
        if (labels != scores.shape[1]).any():
            rows = [row[:width] for row, width in zip(rows, labels.tolist(), strict=True)]
        shared = repeat(False) if batch.shared is None else batch.shared[place].tolist()
        outcomes: list[RowResult | RowFailure] = list(map(RowResult, rows, repeat(None), shared))
        if not np.isfinite(scores).all():
            for index in batch.order[~np.isfinite(scores).all(axis=1)].tolist():
                outcomes[index] = NOT_FINITE
        if self.weights is not None:
            # One array for all rows.
            weights, places = self.weights.numpy().copy(), batch.weighed(self.shape)
            explained, order = batch.explained.tolist(), batch.order.tolist()
            for index, here, reads in zip(order, places, explained, strict=True):
                outcome = outcomes[index]
                if self.rows[index].explain and isinstance(outcome, RowResult):
                    outcome.token_weights = weights[here] if reads else weights[:0]
        return outcomes


@dataclass(frozen=True, slots=True)
class _Copying:
    """Images on their way into slots.

    done: recorded after their copies. memory: what is copied, kept until then.
    """

    images: Sequence[tuple[int, AdapterImage]]
    done: torch.cuda.Event
    memory: Sequence[Tensor]

    def wait(self) -> DeviceAdapter:
        self.done.synchronize()
        ((slot, image),) = self.images
        return ActiveAdapter(image.spec, slot, image.nbytes)


class SlottedRunner:
    """`service.engine.runners.base.Runner` for a CUDA device.

    Args:
        slots: adapters on the device at once.
        max_tokens: tokens of a batch, prompts included.
        sharing: whether rows with the same text share what they can.
    """

    copies = True
    launches_ahead = True
    lanes = 1
    form = "slotted"

    def __init__(
        self, backbone: Backbone, *, slots: int, max_tokens: int, sharing: bool = True
    ) -> None:
        self.backbone = backbone
        self._sharing = sharing
        device, n = backbone.device, backbone.hidden_size
        self.embedder: DeviceAdapter = embedder(backbone)
        self._bank = SlotBank(slots, device=device)
        self._computing = torch.cuda.Stream(device)
        # High priority: its copies take microseconds, and a request waits for them.
        self._loading = torch.cuda.Stream(device, priority=-1)
        self._memory = PinnedMemory()
        self._graphs: CudaGraphs | None = None
        if backbone.dtype in VARLEN_DTYPES:
            self._graphs = CudaGraphs(
                backbone,
                self._bank,
                widths=Widths(_COMMON_BOTTLENECK, _COMMON_PROMPT * n, _COMMON_LABELS, dense=False),
                max_positions=max_tokens,
                longest=min(max_tokens, backbone.max_tokens + _COMMON_PROMPT),
            )

    def enter_lane(self) -> None:
        torch.cuda.set_device(self.backbone.device)
        # Set once for this thread: entering a stream context for every batch takes longer.
        torch.cuda.set_stream(self._computing)

    def prepare(self, adapter: Adapter) -> AdapterImage:
        with torch.inference_mode(), torch.cuda.stream(self._loading):
            return image_of(adapter, self.backbone)

    def flatten(self, adapter: HostAdapter) -> tuple[Layout, Tensor]:
        image = _image(adapter)
        return image.layout, image.memory

    def memory(self, nbytes: int, *, passing: bool) -> Tensor:
        staged = self._bank.staging.take(nbytes) if passing else None
        return torch.empty(nbytes, dtype=torch.uint8) if staged is None else staged

    def restore(self, spec: AdapterSpec, layout: Layout, memory: Tensor) -> AdapterImage:
        return AdapterImage.restore(spec, layout, memory)

    def load(self, adapters: Sequence[tuple[int, HostAdapter]]) -> list[DeviceAdapter]:
        images = [(slot, _image(adapter)) for slot, adapter in adapters]
        copying = self._begin(images)
        copying.done.synchronize()
        return [ActiveAdapter(image.spec, slot, image.nbytes) for slot, image in images]

    def begin_load(self, slot: int, adapter: HostAdapter) -> "_Copying":
        return self._begin([(slot, _image(adapter))])

    def _begin(self, images: Sequence[tuple[int, AdapterImage]]) -> "_Copying":
        with torch.inference_mode(), torch.cuda.stream(self._loading):
            memory = self._bank.write(images)
            return _Copying(images, self._loading.record_event(), memory)

    def unload(self, slot: int) -> None:
        self._bank.clear(slot)

    def check(self) -> None:
        """Compare a few texts' scores with those of the packed forward pass.

        One batch has adapters of every kind of weights: a prompt, a prompt and vectors, LoRA, and a
        head alone.

        Raises:
            RuntimeError: they differ, or the kernels cannot run here.
        """
        adapters = probe_adapters(self.backbone)
        loaded = self.load([(slot, self.prepare(item)) for slot, item in enumerate(adapters)])
        limit = adapters[0].spec.max_length
        texts = [self.backbone.encoder.encode(text, max_length=limit) for text in _PROBES]
        rows = [(index, text) for text in texts for index in range(len(adapters))]
        # This runs outside a lane: the stream context also sets the device for the kernels.
        with torch.cuda.stream(self._computing):
            batch_rows = [BatchRow(text, loaded[index]) for index, text in rows]
            result = self.launch(batch_rows).wait()
        prepared = [prepare(adapter, self.backbone) for adapter in adapters]
        bound = _FLOAT8_PROBE_BOUND if self.backbone.computes == "float8" else _PROBE_BOUND
        expected = classify(self.backbone, self.backbone.pack(rows_of(prepared, rows)), prepared)
        for outcome, reference, (index, _) in zip(result.outcomes, expected, rows, strict=True):
            if isinstance(outcome, RowFailure):
                raise RuntimeError(outcome.message)
            difference = float(np.abs(outcome.scores - reference.scores).max())
            if not difference <= bound:
                method = adapters[index].spec.method
                raise RuntimeError(f"a score of {method} differs by {difference:.3g}")

    def warm_up(self, max_tokens: int) -> Sequence[tuple[int, float]]:
        adapter = random_adapter(self.backbone)
        if self._graphs is not None:
            self._capture(self._graphs, adapter.spec)
        return run_warm_up(self, adapter, max_tokens)

    def launch(self, rows: Sequence[BatchRow]) -> RunningBatch:
        if any(row.adapter is self.embedder for row in rows):
            return launch_or_halve(rows, self._launch_with_embeddings, self.backbone.device)
        return launch_or_halve(rows, self._launch, self.backbone.device)

    def _launch_with_embeddings(self, rows: Sequence[BatchRow]) -> BatchResult:
        """Vectors come from the packed forward pass, all other rows from the slots'."""
        started = perf_counter()
        adapter = self.embedder
        assert isinstance(adapter, PreparedAdapter)
        embedded = [index for index, row in enumerate(rows) if row.adapter is adapter]
        others = [index for index, row in enumerate(rows) if row.adapter is not adapter]
        outcomes: list[RowResult | RowFailure] = [NOT_FINITE] * len(rows)
        batch = self.backbone.pack(
            rows_of([adapter], [(0, rows[index].encoding) for index in embedded])
        )
        for index, answer in zip(embedded, classify(self.backbone, batch, [adapter]), strict=True):
            if np.isfinite(answer.scores).all():
                outcomes[index] = RowResult(answer.scores, shared=answer.shared_layers > 0)
        passes, graphs = 1, 0
        if others:
            rest = self._launch([rows[index] for index in others]).wait()
            passes, graphs = passes + rest.passes, rest.graphs
            for index, outcome in zip(others, rest.outcomes, strict=True):
                outcomes[index] = outcome
        return BatchResult(
            outcomes, backbone_seconds=perf_counter() - started, passes=passes, graphs=graphs
        )

    def _capture(self, graphs: CudaGraphs, spec: AdapterSpec) -> None:
        started = perf_counter()
        assert isinstance(spec.prompt, AttentionPrompt)
        sources = (Source(spec.prompt.source.value),)
        # What `fit` makes: a prompt in the middle; with vectors, above two thirds of the layers.
        usual = {False: spec.prompt.layer, True: round(2 / 3 * self.backbone.layers)}
        try:
            with torch.inference_mode():
                for vectors, layer in usual.items():
                    point = InsertionPoint(layer, sources)
                    graphs.capture_all(Signature((point,), mean=False, vectors=vectors))
        except torch.AcceleratorError as error:
            raise DeviceLost(str(error).splitlines()[0]) from error
        except Exception:
            logger.exception("no CUDA graphs here: batches are launched kernel by kernel")
            self._graphs = None
            return
        logger.info("captured graphs=%d seconds=%.1f", len(graphs), perf_counter() - started)

    @torch.inference_mode()
    def _launch(self, rows: Sequence[BatchRow]) -> _Launched:
        started = perf_counter()
        slots = np.array([_resident(row.adapter).slot for row in rows])
        texts, facts = [row.encoding for row in rows], self._bank.facts[slots]
        batch = SlottedBatch(
            texts,
            slots,
            facts,
            causal=self.backbone.family.causal,
            sharing=self._sharing and not _is_small(texts, facts),
        )
        widths = Widths.of(batch.facts, hidden_size=self.backbone.hidden_size)
        bucket = None if self._graphs is None else self._graphs.bucket_for(batch, widths)
        shape, count = bucket or batch.shape, batch.shape.rows
        explained = any(row.explain for row in rows)
        size, scores_size = array_size(shape, batch.signature), count * widths.labels
        weights_size = weights_end(shape) * explained
        piece = self._memory.take(size + scores_size + weights_size)
        batch.write(piece.array, shape)
        array = piece.integers.narrow(0, 0, size)
        if bucket is not None and self._graphs is not None:
            outputs = self._graphs.replay(batch.signature, bucket, array)
        else:
            outputs = self._run_eagerly(batch, array, widths)
        # Spinning answers a few texts sooner. For a large batch it only keeps others from the core.
        spins = max((shape.tokens, *shape.expanded)) < _BRIEF_POSITIONS
        done = torch.cuda.Event(blocking=not spins)
        scores = piece.floats.narrow(0, size, scores_size).view(count, widths.labels)
        scores.copy_(outputs.scores[:count, : widths.labels], non_blocking=True)
        weights = None
        if explained:
            weights = piece.floats.narrow(0, size + scores_size, weights_size)
            weights.copy_(outputs.weights, non_blocking=True)
        done.record()
        return _Launched(
            batch,
            rows,
            scores,
            weights,
            done,
            spins,
            started,
            int(bucket is not None),
            self._memory,
            piece,
            shape,
        )

    def _run_eagerly(self, batch: SlottedBatch, array: Tensor, widths: Widths) -> Outputs:
        inputs = Inputs(
            array.to(self.backbone.device, non_blocking=True),
            batch.shape,
            batch.signature,
            batch.lengths,
        )
        return run(self.backbone, self._bank, inputs, widths)


def probe_adapters(backbone: Backbone) -> list[Adapter]:
    """Seeded adapters: a prompt, a prompt and vectors, LoRA, and a head alone."""
    usual = random_adapter(backbone).spec
    layers, f = (0, backbone.layers), backbone.intermediate_size
    vectors = VectorTuning(layers=layers, intermediate_size=f)
    lora = LoraTuning(
        layers=layers,
        intermediate_size=f,
        rank=8,
        scaling=2.0,
        sites=(Site.QUERY, Site.VALUE, Site.DENSE, Site.UP, Site.DOWN),
    )
    changes: list[dict[str, Any]] = [
        {},
        {"tuning": vectors},
        {"prompt": None, "tuning": lora},
        {"prompt": None},
    ]
    return [
        random_of(usual.model_copy(update=change), seed=seed) for seed, change in enumerate(changes)
    ]


def _is_small(texts: Sequence[Encoding], facts: Indices) -> bool:
    """Whether rows with the same text would gain nothing from sharing it.

    Args:
        facts: [rows, Fact]
    """
    # Each row has a position at least. So no large batch has its texts counted.
    if len(texts) > MOST_UNSHARED:
        return False
    prompts = int(facts[:, Fact.PROMPT].sum())
    return prompts + sum([len(text.input_ids) for text in texts]) <= MOST_UNSHARED


def _image(adapter: HostAdapter) -> AdapterImage:
    assert isinstance(adapter, AdapterImage)
    return adapter


def _resident(adapter: DeviceAdapter) -> ActiveAdapter:
    assert isinstance(adapter, ActiveAdapter)
    return adapter
