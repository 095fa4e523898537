"""The no-adapter packed forward pass: what the same tokens cost without any adapter.

The only place of the benchmarks that reaches below the engine.
"""

from collections.abc import Sequence
from itertools import cycle
from time import perf_counter

import torch
from torch import Tensor

from adapters.adapter import random_adapter
from adapters.backbone.model import Backbone
from adapters.backbone.tokenizer import Encoding
from adapters.packed.packing import PackedBatch, Row
from benchmarks.ceilings import synchronize


@torch.inference_mode()
def forward_without_adapters(backbone: Backbone, batch: PackedBatch) -> Tensor:
    """States of every row's answer position, [rows, n]; the last layer is run for those alone."""
    trunk = backbone.trunk(batch, backbone.layers - 1)
    positions = torch.from_numpy(batch.layout.starts).to(backbone.device)
    read = backbone.family.read(
        backbone._layers[-1], trunk.hidden.unsqueeze(0), positions, batch.layout
    )
    return backbone.finish(read)


class PackedForward:
    """Batches of these texts up to a token budget, packed beforehand: only the device is timed."""

    def __init__(
        self, backbone: Backbone, encodings: Sequence[Encoding], *, max_tokens: int
    ) -> None:
        self._backbone = backbone
        spec = random_adapter(backbone).spec
        self._batches = [
            backbone.pack([Row(encoding, spec, 0) for encoding in chosen])
            for chosen in in_batches(encodings, max_tokens)
        ]

    def texts_per_second(self, seconds: float) -> float:
        """Whole batches in turns, for about so long."""
        texts, started = 0, perf_counter()
        for batch in cycle(self._batches):
            forward_without_adapters(self._backbone, batch)
            texts += len(batch.rows)
            if perf_counter() - started >= seconds:
                break
        # Not after every batch: the next one is launched while one runs.
        synchronize(self._backbone.device)
        return texts / (perf_counter() - started)


def in_batches(encodings: Sequence[Encoding], max_tokens: int) -> list[list[Encoding]]:
    """In order, as many as fit into the budget each time."""
    batches: list[list[Encoding]] = []
    left = 0
    for encoding in encodings:
        if len(encoding) > left or not batches:
            batches.append([])
            left = max_tokens
        batches[-1].append(encoding)
        left -= len(encoding)
    # A last batch that is not full would be slower a text than the others.
    return batches[:-1] if len(batches) > 1 else batches
