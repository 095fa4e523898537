"""The forward pass over slots: any mixture of adapters, every size known before it starts.

Data flow, all on the device and without a look back at the host, so that it can be captured as a
CUDA graph:

    ids -> embeddings [T, n] -> layers 0 .. m-1 -> expand, write prompts -> layers m .. L-2 ->
        last layer, read positions only -> heads -> scores [rows, labels]

The same method as `Backbone.forward`, whose order of things suits a CPU.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from adapters.backbone.model import Backbone
from adapters.format.spec import GeneratorInput
from adapters.slots import kernels
from adapters.slots.bank import SlotBank
from adapters.slots.batch import Caps, Fact, Signature, section_offsets


@dataclass(frozen=True)
class SlottedExtents:
    """The rows of a sequence that may have a tail which is nobody's.

    cumulative: int32 [rows + 1], on the device. lengths: the same on the host, for devices without
    a kernel for packed rows; None where the sizes alone must do (a graph). longest: no row has more
    positions.
    """

    cumulative: Tensor
    longest: int
    lengths: npt.NDArray[np.int64] | None = None

    def by_run(self, states: Tensor) -> list[Tensor]:
        """[T, ...] -> [1, length, ...] for every row, and for the tail."""
        assert self.lengths is not None, "a graph is captured only where rows have their own kernel"
        sizes = self.lengths.tolist()
        sizes += [len(states) - sum(sizes)]
        return [piece.unsqueeze(0) for piece in states.split([size for size in sizes if size])]


@dataclass(frozen=True, slots=True)
class Widest:
    """The largest of its kind among a batch's adapters. prompt: t * n. dense: some head has two
    layers."""

    bottleneck: int
    prompt: int
    labels: int
    dense: bool

    @classmethod
    def of(cls, facts: npt.NDArray[np.int64], *, hidden_size: int) -> "Widest":
        """Of adapters whose facts [rows, Fact] these are."""
        most = facts.max(axis=0).tolist()
        return cls(
            bottleneck=most[Fact.BOTTLENECK],
            prompt=most[Fact.PROMPT] * hidden_size,
            labels=most[Fact.LABELS],
            dense=bool(most[Fact.DENSE]),
        )

    def holds(self, other: "Widest") -> bool:
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
        array: int32, as `Plan.write` filled it.
        lengths: `Plan.lengths`, see `SlottedExtents`.
    """

    array: Tensor
    caps: Caps
    signature: Signature
    lengths: list[npt.NDArray[np.int64]] | None = None

    @cached_property
    def sections(self) -> list[Tensor]:
        """Views, in the order of `section_sizes`."""
        return [
            self.array[start : start + size]
            for start, size in section_offsets(self.caps, self.signature)
        ]


@dataclass(frozen=True, slots=True)
class Outputs:
    """scores: float32 [rows, labels]. weights: float32 [tokens], the generators' token weights, by
    the rows' text tokens. Both in the plan's order."""

    scores: Tensor
    weights: Tensor


@torch.inference_mode()
def run(backbone: Backbone, bank: SlotBank, inputs: Inputs, widest: Widest) -> Outputs:
    """Classify a batch."""
    sections: Iterator[Tensor] = iter(inputs.sections)
    lengths, positions = iter(inputs.lengths or ()), iter(inputs.caps.expanded)
    longest = inputs.caps.longest
    input_ids, token_type_ids, offsets = next(sections), next(sections), next(sections)
    text = next(sections)
    extents = SlottedExtents(text, longest, next(lengths, None))
    embeddings = backbone.embed(input_ids, token_type_ids, offsets)
    hidden, layer = embeddings, 0
    weights = torch.empty(inputs.caps.tokens, dtype=torch.float32, device=hidden.device)
    for stop in inputs.signature.stops:
        hidden = backbone.through(hidden, layer, stop.layer, extents)
        layer = stop.layer
        made = []
        for source in stop.sources:
            slots, tiles = next(sections), next(sections)
            embedded = source is GeneratorInput.EMBEDDINGS
            made.append(
                _bottlenecks(
                    embeddings if embedded else hidden,
                    bank,
                    _Texts(slots, text if embedded else extents.cumulative, text, longest),
                    tiles,
                    weights,
                    widest,
                )
            )
        before, behind = extents.cumulative, next(sections)
        hidden = kernels.expand(hidden, before, behind, positions=next(positions))
        extents = SlottedExtents(behind, longest, next(lengths, None))
        for bottleneck, slots in made:
            kernels.write_prompts(
                bottleneck, slots, bank.table, hidden, extents.cumulative, widest=widest.prompt
            )
    hidden = backbone.through(hidden, layer, backbone.layers - 1, extents)
    states = backbone.read(hidden, next(sections).long(), extents)
    if inputs.signature.mean:
        states = _means(states, next(sections))
    slots = next(sections)
    logits = kernels.logits(states, slots, bank.table, widest=widest.labels, dense=widest.dense)
    return Outputs(kernels.scores(logits, slots, bank.table), weights)


@dataclass(frozen=True, slots=True)
class _Texts:
    """The rows whose prompts are made, where they start in their source, and their lengths."""

    slots: Tensor
    starts: Tensor
    cumulative: Tensor
    longest: int


def _bottlenecks(
    source: Tensor,
    bank: SlotBank,
    texts: _Texts,
    tiles: Tensor,
    weights: Tensor,
    widest: Widest,
) -> tuple[Tensor, Tensor]:
    """The generators up to their bottleneck [rows, c]; writes the token weights."""
    slots, starts, cumulative = texts.slots, texts.starts, texts.cumulative
    queries = kernels.grouped_project(source, bank.query, tiles)
    kernels.write_token_weights(
        queries, source, slots, starts, cumulative, weights, longest=texts.longest
    )
    pooled = kernels.weighted_sums(weights, source, slots, starts, cumulative)
    return kernels.bottlenecks(pooled, slots, bank.table, widest=widest.bottleneck), slots


def _means(states: Tensor, cumulative: Tensor) -> Tensor:
    """[positions read, n] -> the mean of every row's, float32 [rows, n]."""
    counts = cumulative.diff()
    positions = torch.arange(len(states), device=states.device)
    owners = torch.searchsorted(cumulative[1:], positions, right=True).clamp(max=len(counts) - 1)
    each = counts.reciprocal()[owners]
    # Every row takes part, whatever its slot.
    everyone = torch.zeros_like(counts)
    return kernels.weighted_sums(each, states, everyone, cumulative, cumulative)
