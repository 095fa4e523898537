"""The changes of adapters inside the layers: their weights, and how a batch applies them.

    vectors: y (1 + s) + b for queries, keys, values and the feed-forward part's middle,
             y + b for its output, and with `activated` also a (1 + s) for that output's input
    LoRA:    y + scaling (x A) B for some of the layer's linear maps

Vectors are float32 for every type of the states: in bfloat16, 1 + s would keep 8 bits of s.

A batch of many adapters is changed piece by piece, in place, while the rows of a piece are in the
processor's cache. docs/cpu.md has what that costs beside the products of a layer.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Self, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

from adapters.format.spec import LoraTuning, Site, Tuning, VectorTuning
from adapters.packed.layout import Extents, Layout
from adapters.packed.packing import PackedBatch


@dataclass(frozen=True, slots=True)
class VectorWeights:
    """Factors and biases of L tuned layers, float32.

    layers: those. factor: [L, 3 n + f], 1 + s. bias: [L, 4 n + f]. activated: [L, f], 1 + s, or
    None.
    """

    layers: range
    factor: Tensor
    bias: Tensor
    activated: Tensor | None

    @classmethod
    def of(cls, tuning: VectorTuning, tensors: dict[str, Tensor]) -> Self:
        """Of an adapter's tensors, named as in `VectorTuning.shapes`."""
        activated = tensors.get("tuning.activated")
        return cls(
            layers=range(*tuning.layers),
            factor=1 + tensors["tuning.scale"].float(),
            bias=tensors["tuning.bias"].float(),
            activated=None if activated is None else 1 + activated.float(),
        )

    def cast(self, _: torch.dtype) -> Self:
        """Itself: vectors stay float32."""
        return self

    @property
    def tensors(self) -> list[Tensor]:
        """All of them."""
        both = [self.factor, self.bias]
        return both if self.activated is None else [*both, self.activated]


@dataclass(frozen=True, slots=True)
class LowRank:
    """x A B for one or more linear maps with the same input, in L layers.

    a: [L, inputs, k r], the matrices of k maps side by side. b: k matrices [L, r, outputs], None in
    between for a map that is not changed.
    """

    a: Tensor
    b: tuple[Tensor | None, ...]

    def cast(self, dtype: torch.dtype) -> "LowRank":
        """A in another type, which multiplies the layer's inputs."""
        return LowRank(self.a.to(dtype), self.b)

    def block(self) -> Tensor:
        """B of all maps as one: [L, k r, all outputs], zero outside of its blocks."""
        if len(self.b) == 1 and self.b[0] is not None:
            return self.b[0]
        rows = []
        for place, each in enumerate(self.b):
            if each is not None:
                width = each.shape[-1]
                before, after = place * width, (len(self.b) - place - 1) * width
                rows.append(functional.pad(each, (before, after)))
        return torch.cat(rows, dim=-2)


@dataclass(frozen=True, slots=True)
class LoraWeights:
    """The matrices of L tuned layers, B times the scaling; None where a site is not tuned.

    layers: those. projection: of queries, keys and values.
    """

    layers: range
    projection: LowRank | None
    dense: LowRank | None
    up: LowRank | None
    down: LowRank | None

    @classmethod
    def of(cls, tuning: LoraTuning, tensors: dict[str, Tensor]) -> Self:
        """Of an adapter's tensors, named as in `LoraTuning.shapes`."""

        def matrices(*sites: Site) -> LowRank | None:
            tuned = [site for site in sites if site in tuning.sites]
            if not tuned:
                return None
            a = [tensors[f"tuning.{site}.a"] for site in tuned]
            return LowRank(
                a[0] if len(a) == 1 else torch.cat(a, dim=-1),
                tuple(
                    tensors[f"tuning.{site}.b"] * tuning.scaling if site in tuned else None
                    for site in sites
                ),
            )

        return cls(
            layers=range(*tuning.layers),
            projection=matrices(Site.QUERY, Site.KEY, Site.VALUE),
            dense=matrices(Site.DENSE),
            up=matrices(Site.UP),
            down=matrices(Site.DOWN),
        )

    def cast(self, dtype: torch.dtype) -> "LoraWeights":
        """A in another type; B stays, for outputs in float32."""
        maps = (self.projection, self.dense, self.up, self.down)
        return LoraWeights(self.layers, *(each and each.cast(dtype) for each in maps))

    @property
    def tensors(self) -> list[Tensor]:
        """All of them."""
        maps = (self.projection, self.dense, self.up, self.down)
        return [
            tensor
            for each in maps
            if each is not None
            for tensor in (each.a, *each.b)
            if tensor is not None
        ]


TuningWeights: TypeAlias = VectorWeights | LoraWeights


def tuning_weights(tuning: Tuning, tensors: dict[str, Tensor]) -> TuningWeights:
    """The weights of an adapter's tuning, with gradients for `tensors` if they have them."""
    if isinstance(tuning, VectorTuning):
        return VectorWeights.of(tuning, tensors)
    return LoraWeights.of(tuning, tensors)


class UniformTuning:
    """One adapter's changes at every position (`adapters.layers.tuning.BackboneTuning`).

    Training runs it with gradients for the weights.

    Args:
        weights: None if the adapter changes no layer, and there is only `hidden_dropout`.
        dropout: the share of the inputs of LoRA's matrices that is dropped, in training.
        hidden_dropout: the share of what attention and feed-forward part add to the states of
            every layer that is dropped, in training.
    """

    def __init__(
        self,
        weights: TuningWeights | None,
        *,
        dropout: float = 0.0,
        hidden_dropout: float = 0.0,
    ) -> None:
        self._weights = weights
        self._dropout = dropout
        self._hidden_dropout = hidden_dropout
        # All layers at once: their gradients are then put together once.
        self._vectors = (
            _by_layer(weights, hidden_dropout) if isinstance(weights, VectorWeights) else []
        )
        self._blocks: dict[str, Tensor] = {}
        if isinstance(weights, LoraWeights):
            for name in ("projection", "dense", "up", "down"):
                matrices: LowRank | None = getattr(weights, name)
                if matrices is not None:
                    self._blocks[name] = matrices.block()

    def at(self, layer: int, _: Extents) -> "VectorChanges | LoraChanges | Unchanged | None":
        weights = self._weights
        if weights is None or layer not in weights.layers:
            return Unchanged(self._hidden_dropout) if self._hidden_dropout else None
        if isinstance(weights, VectorWeights):
            return self._vectors[layer - weights.layers.start]
        index = layer - weights.layers.start
        return LoraChanges(weights, self._blocks, index, self._dropout, self._hidden_dropout)


class Unchanged:
    """Nothing but dropout (`adapters.layers.tuning.LayerTuning`)."""

    def __init__(self, hidden_dropout: float) -> None:
        self.hidden_dropout = hidden_dropout

    def projection(self, _: Tensor, output: Tensor) -> Tensor:
        return output

    def dense(self, _: Tensor, output: Tensor) -> Tensor:
        return functional.dropout(output, self.hidden_dropout)

    def up(self, _: Tensor, output: Tensor) -> Tensor:
        return output

    def activated(self, output: Tensor) -> Tensor:
        return output

    def down(self, _: Tensor, output: Tensor) -> Tensor:
        return functional.dropout(output, self.hidden_dropout)

    def select(self, _: Tensor) -> Self:
        return self


def _by_layer(weights: VectorWeights, hidden_dropout: float) -> "list[VectorChanges]":
    depth = len(weights.layers)
    activated = [None] * depth if weights.activated is None else weights.activated.unbind()
    parts = zip(weights.factor.unbind(), weights.bias.unbind(), activated, strict=True)
    return [VectorChanges(*each, hidden_dropout) for each in parts]


class VectorChanges:
    """The same vectors at every position (`adapters.layers.tuning.LayerTuning`).

    factor, bias, activated: a layer's row of `VectorWeights`.
    """

    def __init__(
        self,
        factor: Tensor,
        bias: Tensor,
        activated: Tensor | None,
        hidden_dropout: float = 0.0,
    ) -> None:
        self.factor, self.bias, self.activated_factor = factor, bias, activated
        self.hidden_dropout = hidden_dropout

    def projection(self, _: Tensor, output: Tensor) -> Tensor:
        width = output.shape[1]
        return scale_and_shift(output, self.factor[:width], self.bias[:width])

    def dense(self, _: Tensor, output: Tensor) -> Tensor:
        return functional.dropout(output, self.hidden_dropout) if self.hidden_dropout else output

    def up(self, _: Tensor, output: Tensor) -> Tensor:
        end = len(self.factor)
        start = end - output.shape[1]
        return scale_and_shift(output, self.factor[start:], self.bias[start:end])

    def activated(self, output: Tensor) -> Tensor:
        if self.activated_factor is None:
            return output
        if torch.is_grad_enabled():
            return (output * self.activated_factor).to(output.dtype)
        return output.mul_(self.activated_factor)

    def down(self, _: Tensor, output: Tensor) -> Tensor:
        bias = self.bias[len(self.factor) :]
        if not torch.is_grad_enabled():
            return output.add_(bias)
        output = (output + bias).to(output.dtype)
        return functional.dropout(output, self.hidden_dropout) if self.hidden_dropout else output

    def select(self, _: Tensor) -> Self:
        return self


def scale_and_shift(output: Tensor, factor: Tensor, bias: Tensor) -> Tensor:
    """output * factor + bias in one pass, in place where no gradient is recorded."""
    if torch.is_grad_enabled():
        return torch.addcmul(bias, output, factor).to(output.dtype)
    return torch.addcmul(bias, output, factor, out=output)


class LoraChanges:
    """The same matrices at every position (`adapters.layers.tuning.LayerTuning`).

    index: of the layer in the weights. blocks: `LowRank.block` of the weights' maps.
    """

    def __init__(
        self,
        weights: LoraWeights,
        blocks: Mapping[str, Tensor],
        index: int,
        dropout: float,
        hidden_dropout: float = 0.0,
    ) -> None:
        self._weights, self._blocks = weights, blocks
        self._index, self._dropout = index, dropout
        self.hidden_dropout = hidden_dropout

    @property
    def attention_only(self) -> bool:
        """Whether nothing changes after attention."""
        weights = self._weights
        return weights.dense is None and weights.up is None and weights.down is None

    def projection(self, inputs: Tensor, output: Tensor) -> Tensor:
        return self._changed("projection", inputs, output)

    def dense(self, inputs: Tensor, output: Tensor) -> Tensor:
        return self._dropped(self._changed("dense", inputs, output))

    def up(self, inputs: Tensor, output: Tensor) -> Tensor:
        return self._changed("up", inputs, output)

    def activated(self, output: Tensor) -> Tensor:
        return output

    def down(self, inputs: Tensor, output: Tensor) -> Tensor:
        return self._dropped(self._changed("down", inputs, output))

    def select(self, _: Tensor) -> Self:
        return self

    def _dropped(self, output: Tensor) -> Tensor:
        return functional.dropout(output, self.hidden_dropout) if self.hidden_dropout else output

    def _changed(self, name: str, inputs: Tensor, output: Tensor) -> Tensor:
        matrices: LowRank | None = getattr(self._weights, name)
        if matrices is None:
            return output
        if self._dropout:
            inputs = functional.dropout(inputs, self._dropout)
        narrow = inputs @ matrices.a[self._index].to(inputs.dtype)
        block = self._blocks[name][self._index].to(output.dtype)
        if torch.is_grad_enabled():
            return torch.addmm(output, narrow, block)
        return output.addmm_(narrow, block)


@dataclass(frozen=True, slots=True)
class _Span:
    """Neighbouring rows of one tuned adapter."""

    first: int
    end: int
    weights: TuningWeights


@dataclass(frozen=True, slots=True)
class _VectorPiece:
    """Neighbouring spans of `length` positions each, from position `start` on.

    factor: [spans, L, 1, 3 n + f]. bias: [spans, L, 1, 4 n + f]. activated: [spans, L, 1, f], or
    None.
    """

    layers: range
    start: int
    length: int
    factor: Tensor
    bias: Tensor
    activated: Tensor | None

    def rows(self, states: Tensor) -> Tensor:
        """A view: [T, d] -> [spans, length, d]."""
        spans = len(self.factor)
        piece = states.narrow(0, self.start, spans * self.length)
        return piece.view(spans, self.length, -1)


@dataclass(frozen=True, slots=True)
class _LoraPiece:
    """The positions of one adapter's rows."""

    place: slice
    weights: LoraWeights


@dataclass(frozen=True, slots=True)
class _Pieces:
    """All tuned positions of one layout."""

    vectors: list[_VectorPiece]
    lora: list[_LoraPiece]


class MixedTuning:
    """The changes of a batch's adapters to their own rows, in place, so without gradients.

    Args:
        weights: by the batch's adapter index; the rows of all others stay as they are.
    """

    def __init__(self, batch: PackedBatch, weights: Mapping[int, TuningWeights]) -> None:
        self._reads = batch.read_layout
        self._spans: list[_Span] = []
        row = 0
        for adapter, rows in groupby(batch.rows, key=lambda each: each.adapter):
            first, row = row, row + sum(1 for _ in rows)
            if (found := weights.get(adapter)) is not None:
                self._spans.append(_Span(first, row, found))
        # By the layout's identity: the batch keeps all its layouts.
        self._pieces: dict[int, _Pieces] = {}

    def at(self, layer: int, layout: Extents) -> "MixedChanges | None":
        assert isinstance(layout, Layout), "the pieces of a batch are made on the host"
        assert not torch.is_grad_enabled(), "a mixed batch is changed in place"
        if not any(layer in span.weights.layers for span in self._spans):
            return None
        return MixedChanges(self._of(layout), self._of(self._reads), layer)

    def _of(self, layout: Layout) -> _Pieces:
        pieces = self._pieces.get(id(layout))
        if pieces is None:
            pieces = self._pieces[id(layout)] = _cut(self._spans, layout)
        return pieces


def _cut(spans: list[_Span], layout: Layout) -> _Pieces:
    """The pieces of a layout: spans of vectors are joined while one view holds them."""
    starts, ends = layout.starts.tolist(), layout.ends.tolist()
    vectors: list[_VectorPiece] = []
    lora: list[_LoraPiece] = []
    members: list[VectorWeights] = []
    begin = length = 0

    def close() -> None:
        if members:
            vectors.append(_piece(members, begin, length))
        members.clear()

    for span in spans:
        start, end = starts[span.first], ends[span.end - 1]
        if isinstance(span.weights, LoraWeights):
            lora.append(_LoraPiece(slice(start, end), span.weights))
            continue
        follows = (
            members
            and start == begin + len(members) * length
            and end - start == length
            and members[-1].layers == span.weights.layers
            and (members[-1].activated is None) == (span.weights.activated is None)
        )
        if not follows:
            close()
            begin, length = start, end - start
        members.append(span.weights)
    close()
    return _Pieces(vectors, lora)


def _piece(members: list[VectorWeights], begin: int, length: int) -> _VectorPiece:
    activated = [each.activated for each in members if each.activated is not None]
    return _VectorPiece(
        layers=members[0].layers,
        start=begin,
        length=length,
        factor=_stacked([each.factor for each in members]),
        bias=_stacked([each.bias for each in members]),
        activated=_stacked(activated) if activated else None,
    )


def _stacked(tensors: list[Tensor]) -> Tensor:
    """[L, d] of each member -> [members, L, 1, d], without a copy of a single one."""
    stacked = tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack(tensors)
    return stacked.unsqueeze(2)


class MixedChanges:
    """Each row's own changes to one layer (`adapters.layers.tuning.SplitTuning`).

    reads: the pieces of the positions that the last layer reads.
    """

    def __init__(self, pieces: _Pieces, reads: _Pieces, layer: int) -> None:
        self._reads, self._layer = reads, layer
        self._vectors = [
            (
                piece,
                piece.factor.select(1, layer - piece.layers.start),
                piece.bias.select(1, layer - piece.layers.start),
            )
            for piece in pieces.vectors
            if layer in piece.layers
        ]
        self._lora = [
            (piece, layer - piece.weights.layers.start)
            for piece in pieces.lora
            if layer in piece.weights.layers
        ]

    def projection(self, inputs: Tensor, output: Tensor) -> Tensor:
        self._scale(output, 0)
        return self._low_rank("projection", inputs, output)

    def queries(self, inputs: Tensor, output: Tensor) -> Tensor:
        self._scale(output, 0)
        return self._low_rank("projection", inputs, output, first=0, maps=1)

    def keys_and_values(self, inputs: Tensor, output: Tensor) -> Tensor:
        self._scale(output, output.shape[1] // 2)
        return self._low_rank("projection", inputs, output, first=1, maps=2)

    def dense(self, inputs: Tensor, output: Tensor) -> Tensor:
        return self._low_rank("dense", inputs, output)

    def up(self, inputs: Tensor, output: Tensor) -> Tensor:
        if self._vectors:
            self._scale(output, self._vectors[0][1].shape[-1] - output.shape[1])
        return self._low_rank("up", inputs, output)

    def activated(self, output: Tensor) -> Tensor:
        for piece, _, _ in self._vectors:
            if piece.activated is not None:
                factor = piece.activated.select(1, self._layer - piece.layers.start)
                piece.rows(output).mul_(factor)
        return output

    def down(self, inputs: Tensor, output: Tensor) -> Tensor:
        width = output.shape[1]
        for piece, factor, bias in self._vectors:
            piece.rows(output).add_(bias.narrow(2, factor.shape[-1], width))
        return self._low_rank("down", inputs, output)

    def select(self, _: Tensor) -> "MixedChanges":
        """Of the positions that the batch reads, and no others."""
        return MixedChanges(self._reads, self._reads, self._layer)

    def _scale(self, output: Tensor, start: int) -> None:
        """By the columns of factors and biases from `start` on."""
        width = output.shape[1]
        for piece, factor, bias in self._vectors:
            rows = piece.rows(output)
            torch.addcmul(
                bias.narrow(2, start, width), rows, factor.narrow(2, start, width), out=rows
            )

    def _low_rank(
        self, name: str, inputs: Tensor, output: Tensor, *, first: int = 0, maps: int | None = None
    ) -> Tensor:
        """first, maps: those of the joined maps whose outputs these are; None: all of them."""
        for piece, index in self._lora:
            matrices: LowRank | None = getattr(piece.weights, name)
            if matrices is None:
                continue
            end = len(matrices.b) if maps is None else first + maps
            narrow = (inputs[piece.place] @ matrices.a[index]).to(output.dtype)
            changed = output[piece.place]
            width, used = output.shape[1] // (end - first), 0
            for place, b in enumerate(matrices.b):
                if b is None:
                    continue
                rank = b.shape[1]
                if first <= place < end:
                    columns = changed.narrow(1, (place - first) * width, width)
                    columns.addmm_(narrow.narrow(1, used, rank), b[index].to(columns.dtype))
                used += rank
        return output
