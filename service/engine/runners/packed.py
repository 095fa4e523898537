"""Runs batches on a CPU, and on any device that has no kernels for slots."""

from collections.abc import Sequence
from time import perf_counter

import numpy as np
import torch
from torch import Tensor

from adapters.adapter import Classification, PreparedAdapter, classify_timed, prepare
from adapters.backbone.model import Backbone, random_adapter
from adapters.embedding import embedder
from adapters.flattened import Layout, flatten, restore
from adapters.format.files import Adapter
from adapters.format.spec import AdapterSpec
from adapters.packed.packing import Row
from service.engine.interface import RowResult
from service.engine.runners.base import (
    NOT_FINITE,
    BatchResult,
    BatchRow,
    DeviceAdapter,
    HostAdapter,
    Loaded,
    RowFailure,
    RunningBatch,
    launch_or_halve,
    run_warm_up,
    spoil_scores,
)


class PackedRunner:
    """`service.engine.runners.base.Runner` whose `launch` returns when the batch is done.

    Args:
        lanes: batches that run side by side, each on its share of torch's threads.
        sharing: whether rows with the same text share their lower layers.
    """

    copies = False
    launches_ahead = False
    form = "packed"

    def __init__(self, backbone: Backbone, *, lanes: int = 1, sharing: bool = True) -> None:
        self.backbone = backbone
        self._sharing = sharing
        self.lanes = lanes
        self.embedder: DeviceAdapter = embedder(backbone)
        self._threads = max(1, torch.get_num_threads() // lanes)

    def enter_lane(self) -> None:
        # Applies to the calling thread only.
        torch.set_num_threads(self._threads)

    def prepare(self, adapter: Adapter) -> PreparedAdapter:
        # In the memory of an image, so that adapters from files and from images are alike to the
        # bit, and what folding has used up is freed.
        return self.restore(adapter.spec, *flatten(prepare(adapter, self.backbone)))

    def flatten(self, adapter: HostAdapter) -> tuple[Layout, Tensor]:
        return flatten(_prepared(adapter))

    def memory(self, nbytes: int, *, passing: bool) -> Tensor:  # noqa: ARG002
        return torch.empty(nbytes, dtype=torch.uint8)

    def restore(self, spec: AdapterSpec, layout: Layout, memory: Tensor) -> PreparedAdapter:
        return restore(spec, layout, memory, device=self.backbone.device)

    def load(self, adapters: Sequence[tuple[int, HostAdapter]]) -> list[DeviceAdapter]:
        # Nothing to copy: a CPU runs adapters from host memory.
        return [_prepared(adapter) for _, adapter in adapters]

    def begin_load(self, slot: int, adapter: HostAdapter) -> Loaded:  # noqa: ARG002
        return Loaded(_prepared(adapter))

    def unload(self, slot: int) -> None:
        """Whoever dropped the adapter gave back its memory."""

    def warm_up(self, max_tokens: int) -> Sequence[tuple[int, float]]:
        return run_warm_up(self, random_adapter(self.backbone), max_tokens)

    def launch(self, rows: Sequence[BatchRow]) -> RunningBatch:
        return launch_or_halve(rows, self._run, self.backbone.device)

    def _run(self, rows: Sequence[BatchRow]) -> BatchResult:
        # Keyed by identity: comparing two adapters would compare their tensors.
        indices: dict[int, int] = {}
        adapters: list[PreparedAdapter] = []
        for row in rows:
            if id(row.adapter) not in indices:
                indices[id(row.adapter)] = len(adapters)
                adapters.append(_prepared(row.adapter))
        batch = self.backbone.pack(
            [
                Row(row.encoding, _prepared(row.adapter).shape, indices[id(row.adapter)])
                for row in rows
            ]
        )
        started = perf_counter()
        classified, generator_seconds = classify_timed(
            self.backbone, batch, adapters, sharing=self._sharing
        )
        seconds = perf_counter() - started
        spoil_scores(classified[0].scores)
        outcomes = [_outcome(row, one) for row, one in zip(rows, classified, strict=True)]
        return BatchResult(outcomes, generator_seconds, seconds - generator_seconds)


def _outcome(row: BatchRow, classification: Classification) -> RowResult | RowFailure:
    if not np.isfinite(classification.scores).all():
        return NOT_FINITE
    weights = classification.token_weights if row.explain else None
    return RowResult(classification.scores, weights, shared=classification.shared_layers > 0)


def _prepared(adapter: HostAdapter | DeviceAdapter) -> PreparedAdapter:
    assert isinstance(adapter, PreparedAdapter)
    return adapter
