"""The forward pass over slots: any mixture of adapters, and every size is known before it starts.

It never waits for the device, so it can be captured as a CUDA graph:

    ids -> embeddings [T, n] -> layers 0 .. m-1 -> expand, write prompts -> layers m .. L-2 ->
        last layer, only for positions that are read -> heads -> scores [rows, labels]

Rows with the same text are one entry of the sequence until their adapters change it; expanding then
copies it for each (`adapters.slots.sharing`).

`Backbone.forward` computes the same in the order that suits a CPU.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from adapters.backbone.model import Backbone
from adapters.packed.layout import Indices
from adapters.slots import kernels
from adapters.slots.bank import SlotBank
from adapters.slots.batch import (
    BatchShape,
    Fact,
    Signature,
    Source,
    at_layer,
    section_slices,
    weight_slices,
    weights_end,
)
from adapters.slots.extents import Places, SlottedExtents
from adapters.slots.tuning import Sizes, SlotTuning


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
    """scores: float32 [rows, labels], in the batch's order. weights: float32, the generators' token
    weights at the positions after each insertion (`SlottedBatch.weighed`)."""

    scores: Tensor
    weights: Tensor


@torch.inference_mode()
def run(backbone: Backbone, bank: SlotBank, inputs: Inputs, widths: Widths) -> Outputs:
    """Classify a batch whose adapters are not wider than `widths`."""
    sections, shape, signature = inputs.sections, inputs.shape, inputs.signature
    table, slots = bank.table, sections["slots"]
    lengths = iter(inputs.lengths or ())
    text = sections["text.cumulative"]
    tuning = None
    if signature.tuned:
        sizes = Sizes(backbone.hidden_size, backbone.intermediate_size)
        tuning = SlotTuning(table, signature, sizes, _places(inputs, "reads", "slots"))

    def extents_of(name: str, cumulative: Tensor) -> SlottedExtents:
        places = _places(inputs, name, f"{name}.slots") if signature.tuned else None
        return SlottedExtents(cumulative, shape.longest, next(lengths, None), places)

    extents = extents_of("text", text)
    embeddings = _embed(backbone, table, sections)
    hidden, layer = embeddings, 0
    size, places = weights_end(shape), weight_slices(shape)
    all_weights = torch.empty(size, dtype=torch.float32, device=hidden.device)
    for point, positions, place in zip(signature.insertions, shape.expanded, places, strict=True):
        weights = all_weights[place]
        hidden = backbone.run_layers(hidden, layer, point.layer, extents, tuning)
        layer = point.layer
        before, after = extents.cumulative, sections[at_layer(layer, "cumulative")]
        hidden = kernels.expand(
            hidden, before, after, sections[at_layer(layer, "parents")], positions=positions
        )
        extents = extents_of(f"layer{layer}", after)
        prompts = []
        for source in point.sources:
            here = sections[at_layer(layer, "slots", source)]
            # The vectors of a static prompt are a bias: no bottleneck is read.
            bottleneck = weights.new_empty(shape.rows, 0)
            if source is not Source.STATIC:
                states = hidden
                if source is Source.EMBEDDINGS:
                    parents = sections[at_layer(layer, "parents", source)]
                    states = kernels.expand(embeddings, text, after, parents, positions=positions)
                texts = kernels.Texts(here, sections[at_layer(layer, "starts")], after[1:])
                queries = kernels.grouped_project(
                    states, table, sections[at_layer(layer, "tiles", source)]
                )
                kernels.write_token_weights(
                    queries, states, texts, table, weights, longest=shape.longest
                )
                pooled = kernels.weighted_sums(weights, states, texts)
                bottleneck = kernels.bottlenecks(pooled, here, table, width=widths.bottleneck)
                if signature.routed:
                    kernels.route(bottleneck, here, table)
            prompts.append((bottleneck, here))
        for bottleneck, here in prompts:
            kernels.write_prompts(bottleneck, here, table, hidden, after, width=widths.prompt)
    hidden = backbone.run_layers(hidden, layer, backbone.layers - 1, extents, tuning)
    states = backbone.read(hidden, sections["reads"].long(), extents, tuning)
    if signature.mean:
        states = _means(states, sections["reads.cumulative"])
    logits = kernels.logits(states, slots, table, width=widths.labels, dense=widths.dense)
    return Outputs(kernels.scores(logits, slots, table), all_weights)


def _places(inputs: Inputs, name: str, slots: str) -> Places:
    """Of the text, the sequence after an insertion, or what is read. slots: a section."""
    sections = inputs.sections
    owners = sections[f"{name}.owners"] if inputs.signature.vectors else None
    return Places(sections[f"{name}.tiles"], owners, sections[slots])


def _embed(backbone: Backbone, table: Tensor, sections: Mapping[str, Tensor]) -> Tensor:
    """The input of the first layer: [tokens, n]"""
    ids, offsets = sections["input_ids"], sections["offsets"]
    words = None
    if (owners := sections.get("table.owners")) is not None:
        embeddings = backbone.word_embeddings
        added = kernels.table_rows(offsets, owners, table, like=embeddings.weight)
        words = embeddings(ids) + added
    shifts = sections.get("shifts")
    return backbone.embed(ids, sections["token_type_ids"], offsets, shifts=shifts, words=words)


def _means(states: Tensor, cumulative: Tensor) -> Tensor:
    """[positions read, n] -> the mean of each row's positions, float32 [rows, n]."""
    counts = cumulative.diff()
    positions = torch.arange(len(states), device=states.device)
    owners = torch.searchsorted(cumulative[1:], positions, right=True).clamp(max=len(counts) - 1)
    shares = counts.reciprocal()[owners]
    # Slot 0 for every row: none is skipped.
    texts = kernels.Texts(torch.zeros_like(counts), cumulative, cumulative[1:])
    return kernels.weighted_sums(shares, states, texts)
