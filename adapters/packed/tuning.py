"""The changes of adapters inside the layers: their weights, and how a batch applies them.

    vectors: y (1 + s) + b for queries, keys, values and the feed-forward part's middle,
             y + b for its output, and with `activated` also a (1 + s) for that output's input
    LoRA:    y + scaling (x A) B for some of the layer's linear maps

Vectors are float32 for every type of the states: in bfloat16, 1 + s would keep 8 bits of s.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

from adapters.format.spec import LoraTuning, Site, Tuning, VectorTuning
from adapters.packed.layout import Extents

_PROJECTED = (Site.QUERY, Site.KEY, Site.VALUE)


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
    """x A B, the change of one or more linear maps with the same input in L layers.

    a: [L, inputs, r]. b: [L, r, outputs].
    """

    a: Tensor
    b: Tensor

    def cast(self, dtype: torch.dtype) -> "LowRank":
        """Both in another type."""
        return LowRank(self.a.to(dtype), self.b.to(dtype))


@dataclass(frozen=True, slots=True)
class LoraWeights:
    """The matrices of L tuned layers, B times the scaling; None where a site is not tuned.

    layers: those. projection: queries, keys and values as one map n -> 3 n.
    """

    layers: range
    projection: LowRank | None
    dense: LowRank | None
    up: LowRank | None
    down: LowRank | None

    @classmethod
    def of(cls, tuning: LoraTuning, tensors: dict[str, Tensor]) -> Self:
        """Of an adapter's tensors, named as in `LoraTuning.shapes`."""
        pairs = {
            site: LowRank(tensors[f"tuning.{site}.a"], tensors[f"tuning.{site}.b"] * tuning.scaling)
            for site in tuning.sites
        }
        return cls(
            layers=range(*tuning.layers),
            projection=_joined([pairs.get(site) for site in _PROJECTED]),
            dense=pairs.get(Site.DENSE),
            up=pairs.get(Site.UP),
            down=pairs.get(Site.DOWN),
        )

    def cast(self, dtype: torch.dtype) -> "LoraWeights":
        """All matrices in another type: they multiply every position."""
        pairs = (self.projection, self.dense, self.up, self.down)
        return LoraWeights(
            self.layers, *(None if pair is None else pair.cast(dtype) for pair in pairs)
        )

    @property
    def tensors(self) -> list[Tensor]:
        """All of them."""
        pairs = (self.projection, self.dense, self.up, self.down)
        return [tensor for pair in pairs if pair is not None for tensor in (pair.a, pair.b)]


TuningWeights: TypeAlias = VectorWeights | LoraWeights


def tuning_weights(tuning: Tuning, tensors: dict[str, Tensor]) -> TuningWeights:
    """The weights of an adapter's tuning, with gradients for `tensors` if they have them."""
    if isinstance(tuning, VectorTuning):
        return VectorWeights.of(tuning, tensors)
    return LoraWeights.of(tuning, tensors)


def _joined(pairs: Sequence[LowRank | None]) -> LowRank | None:
    """Maps with the same input as one: A side by side, B in blocks along the diagonal."""
    given = [pair for pair in pairs if pair is not None]
    if not given:
        return None
    rank = given[0].a.shape[-1]
    outputs = given[0].b.shape[-1]
    rows = []
    for column, pair in enumerate(pairs):
        if pair is not None:
            before, after = column * outputs, (len(pairs) - column - 1) * outputs
            rows.append(functional.pad(pair.b, (before, after)))
    assert all(pair.a.shape[-1] == rank for pair in given)
    return LowRank(torch.cat([pair.a for pair in given], dim=-1), torch.cat(rows, dim=-2))


class UniformTuning:
    """One adapter's changes at every position (`adapters.layers.tuning.BackboneTuning`).

    Training runs it with gradients for the weights.

    Args:
        dropout: the share of the inputs of LoRA's matrices that is dropped, in training.
    """

    def __init__(self, weights: TuningWeights, *, dropout: float = 0.0) -> None:
        self._weights = weights
        self._dropout = dropout

    def at(self, layer: int, _: Extents) -> "VectorChanges | LoraChanges | None":
        weights = self._weights
        if layer not in weights.layers:
            return None
        if isinstance(weights, VectorWeights):
            return VectorChanges(weights, layer - weights.layers.start)
        return LoraChanges(weights, layer - weights.layers.start, self._dropout)


class VectorChanges:
    """The same vectors at every position (`adapters.layers.tuning.LayerTuning`).

    index: of the layer in the weights.
    """

    def __init__(self, weights: VectorWeights, index: int) -> None:
        self._factor, self._bias = weights.factor[index], weights.bias[index]
        self._activated = None if weights.activated is None else weights.activated[index]

    def projection(self, _: Tensor, output: Tensor) -> Tensor:
        width = output.shape[1]
        return scale_and_shift(output, self._factor[:width], self._bias[:width])

    def dense(self, _: Tensor, output: Tensor) -> Tensor:
        return output

    def up(self, _: Tensor, output: Tensor) -> Tensor:
        end = len(self._factor)
        start = end - output.shape[1]
        return scale_and_shift(output, self._factor[start:], self._bias[start:end])

    def activated(self, output: Tensor) -> Tensor:
        if self._activated is None:
            return output
        if torch.is_grad_enabled():
            return (output * self._activated).to(output.dtype)
        return output.mul_(self._activated)

    def down(self, _: Tensor, output: Tensor) -> Tensor:
        bias = self._bias[len(self._factor) :]
        if torch.is_grad_enabled():
            return (output + bias).to(output.dtype)
        return output.add_(bias)

    def select(self, _: Tensor) -> Self:
        return self


def scale_and_shift(output: Tensor, factor: Tensor, bias: Tensor) -> Tensor:
    """output * factor + bias in one pass, in place where no gradient is recorded."""
    if torch.is_grad_enabled():
        return torch.addcmul(bias, output, factor).to(output.dtype)
    return torch.addcmul(bias, output, factor, out=output)


class LoraChanges:
    """The same matrices at every position (`adapters.layers.tuning.LayerTuning`).

    index: of the layer in the weights.
    """

    def __init__(self, weights: LoraWeights, index: int, dropout: float) -> None:
        self._weights, self._index, self._dropout = weights, index, dropout

    def projection(self, inputs: Tensor, output: Tensor) -> Tensor:
        return self._changed(self._weights.projection, inputs, output)

    def dense(self, inputs: Tensor, output: Tensor) -> Tensor:
        return self._changed(self._weights.dense, inputs, output)

    def up(self, inputs: Tensor, output: Tensor) -> Tensor:
        return self._changed(self._weights.up, inputs, output)

    def activated(self, output: Tensor) -> Tensor:
        return output

    def down(self, inputs: Tensor, output: Tensor) -> Tensor:
        return self._changed(self._weights.down, inputs, output)

    def select(self, _: Tensor) -> Self:
        return self

    def _changed(self, pair: LowRank | None, inputs: Tensor, output: Tensor) -> Tensor:
        if pair is None:
            return output
        if self._dropout:
            inputs = functional.dropout(inputs, self._dropout)
        return add_low_rank(output, inputs, pair.a[self._index], pair.b[self._index])


def add_low_rank(output: Tensor, inputs: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """output + (inputs A) B, in place where no gradient is recorded."""
    narrow = inputs @ a.to(inputs.dtype)
    if torch.is_grad_enabled():
        return torch.addmm(output, narrow, b.to(output.dtype))
    return output.addmm_(narrow, b.to(output.dtype))
