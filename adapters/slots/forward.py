"""The forward pass over slots: any mixture of adapters, and every size is known before it starts.

It never waits for the device, so it can be captured as a CUDA graph:

    ids -> embeddings [T, n] -> layers 0 .. m-1 -> expand, write prompts -> layers m .. L-2 ->
        last layer, only for positions that are read -> heads -> scores [rows, labels]

`Backbone.forward` computes the same in the order that suits a CPU.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from adapters.backbone.model import Backbone
from adapters.format.spec import GeneratorInput
from adapters.packed.layout import Indices
from adapters.slots import kernels
from adapters.slots.bank import SlotBank
from adapters.slots.batch import BatchShape, Fact, Signature, at_layer, section_slices


@dataclass(frozen=True)
class SlottedExtents:
    """`adapters.packed.layout.Extents` of rows that may be followed by padding.

    lengths: int64 [rows] on the host, for devices without an attention kernel for packed rows. None
    in a graph, where only sizes are known.
    """

    cumulative: Tensor
    longest: int
    lengths: Indices | None = None

    def by_run(self, states: Tensor) -> list[Tensor]:
        """[T, ...] -> [1, length, ...] for every row, and for the padding."""
        assert self.lengths is not None, (
            "graphs are captured only with an attention kernel for rows"
        )
        sizes = self.lengths.tolist()
        sizes += [len(states) - sum(sizes)]
        return [piece.unsqueeze(0) for piece in states.split([size for size in sizes if size])]


@dataclass(frozen=True, slots=True)
class Widths:
    """The largest widths among some adapters. prompt: t * n. dense: a head has two layers."""

    bottleneck: int
    prompt: int
    labels: int
    dense: bool

    @classmethod
    def of(cls, facts: npt.NDArray[np.int64], *, hidden_size: int) -> "Widths":
        """The widths of adapters with these facts [rows, Fact]."""
        largest = facts.max(axis=0).tolist()
        return cls(
            bottleneck=largest[Fact.BOTTLENECK],
            prompt=largest[Fact.PROMPT] * hidden_size,
            labels=largest[Fact.LABELS],
            dense=bool(largest[Fact.DENSE]),
        )

    def holds(self, other: "Widths") -> bool:
        return (
            other.bottleneck <= self.bottleneck
            and other.prompt <= self.prompt
            and other.labels <= self.labels
            and other.dense <= self.dense
        )


@dataclass(frozen=True)
class Inputs:
    """A batch on its device.

    Args:
        array: int32, filled by `SlottedBatch.write` for this shape.
        lengths: `SlottedBatch.lengths`, see `SlottedExtents`.
    """

    array: Tensor
    shape: BatchShape
    signature: Signature
    lengths: list[Indices] | None = None

    @cached_property
    def sections(self) -> dict[str, Tensor]:
        """Views of the array, named as in `section_sizes`."""
        slices = section_slices(self.shape, self.signature)
        return {name: self.array[place] for name, place in slices.items()}


@dataclass(frozen=True, slots=True)
class Outputs:
    """Results in the batch's order. scores: float32 [rows, labels]. weights: float32 [tokens], the
    generators' token weights of the rows' texts."""

    scores: Tensor
    weights: Tensor


@torch.inference_mode()
def run(backbone: Backbone, bank: SlotBank, inputs: Inputs, widths: Widths) -> Outputs:
    """Classify a batch whose adapters are not wider than `widths`."""
    sections, shape, insertions = inputs.sections, inputs.shape, inputs.signature.insertions
    lengths = iter(inputs.lengths or ())
    text = sections["text.cumulative"]
    extents = SlottedExtents(text, shape.longest, next(lengths, None))
    embeddings = backbone.embed(
        sections["input_ids"], sections["token_type_ids"], sections["offsets"]
    )
    hidden, layer = embeddings, 0
    weights = torch.empty(shape.tokens, dtype=torch.float32, device=hidden.device)
    for point, positions in zip(insertions, shape.expanded, strict=True):
        hidden = backbone.run_layers(hidden, layer, point.layer, extents)
        layer = point.layer
        bottlenecks = []
        for source in point.sources:
            slots = sections[at_layer(layer, "slots", source)]
            states, starts = hidden, extents.cumulative
            if source is GeneratorInput.EMBEDDINGS:
                states, starts = embeddings, text
            texts = kernels.Texts(slots, starts, text)
            queries = kernels.grouped_project(
                states, bank.query, sections[at_layer(layer, "tiles", source)]
            )
            kernels.write_token_weights(queries, states, texts, weights, longest=shape.longest)
            pooled = kernels.weighted_sums(weights, states, texts)
            bottleneck = kernels.bottlenecks(pooled, slots, bank.table, width=widths.bottleneck)
            bottlenecks.append((bottleneck, slots))
        before, after = extents.cumulative, sections[at_layer(layer, "cumulative")]
        hidden = kernels.expand(hidden, before, after, positions=positions)
        extents = SlottedExtents(after, shape.longest, next(lengths, None))
        for bottleneck, slots in bottlenecks:
            kernels.write_prompts(bottleneck, slots, bank.table, hidden, after, width=widths.prompt)
    hidden = backbone.run_layers(hidden, layer, backbone.layers - 1, extents)
    states = backbone.read(hidden, sections["reads"].long(), extents)
    if inputs.signature.mean:
        states = _means(states, sections["reads.cumulative"])
    slots = sections["slots"]
    logits = kernels.logits(states, slots, bank.table, width=widths.labels, dense=widths.dense)
    return Outputs(kernels.scores(logits, slots, bank.table), weights)


def _means(states: Tensor, cumulative: Tensor) -> Tensor:
    """[positions read, n] -> the mean of each row's positions, float32 [rows, n]."""
    counts = cumulative.diff()
    positions = torch.arange(len(states), device=states.device)
    owners = torch.searchsorted(cumulative[1:], positions, right=True).clamp(max=len(counts) - 1)
    shares = counts.reciprocal()[owners]
    # Slot 0 for every row: none is skipped.
    texts = kernels.Texts(torch.zeros_like(counts), cumulative, cumulative)
    return kernels.weighted_sums(shares, states, texts)
