"""A BERT-like layer on a CPU whose products are in int8, by oneDNN. docs/cpu.md has the gain.

    x W^T = (sum of integers) * scale of the token * scale of the output

Weights are quantised once, each output by its own scale. Activations are quantised in every batch,
each token by its own scale: a token's result is then the same whatever else is in the batch. Sums
of integers are exact. Everything else is in float32: attention, norms, GELU, adapters' changes.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from adapters.layers import row_kernels
from adapters.layers.onednn import attend, linears_of, one_each, padded_size
from adapters.layers.tuning import LayerTuning, SplitTuning
from adapters.packed.layout import Extents

_LARGEST = 127


@dataclass(frozen=True, slots=True)
class Rows:
    """T rows of int8: states = values * scales.

    values: int8 [P, n], of which T rows are in use: P is one of a few sizes, for which oneDNN has
    kernels (`adapters.layers.onednn`). scales: float32 [T].
    """

    values: Tensor
    scales: Tensor

    @classmethod
    def empty(cls, rows: int, width: int) -> "Rows":
        values = torch.empty(padded_size(rows), width, dtype=torch.int8)
        return cls(values, torch.empty(rows))

    @classmethod
    def of(cls, states: Tensor) -> "Rows":
        """Quantise states, float32 [T, n]."""
        rows = cls.empty(*states.shape)
        row_kernels.quantise(states.numpy(), *rows.arrays)
        return rows

    @property
    def arrays(self) -> tuple[Any, Any]:
        """The rows in use, for `row_kernels`."""
        return self.values[: len(self.scales)].numpy(), self.scales.numpy()


class Int8Linear:
    """One or more `nn.Linear` with the same input as one product.

    factors: float32 [outputs], the scale of each output. bias: float32 [outputs].
    """

    def __init__(self, *linears: nn.Linear) -> None:
        weight = torch.cat([linear.weight for linear in linears]).detach()
        factors = weight.abs().amax(dim=1).clamp(min=1e-30) / _LARGEST
        values = (weight / factors.unsqueeze(1)).round().to(torch.int8)
        # [inputs, outputs]. oneDNN multiplies few rows faster if memory has that order, too; but
        # with AVX2 four times more slowly.
        wide = torch.cpu.get_capabilities().get("avx512_vnni")
        self._weight = values.t().contiguous() if wide else values.t()
        self.factors: Any = factors.numpy()
        self.bias: Any = torch.cat([linear.bias for linear in linears]).detach().numpy()

    @property
    def outputs(self) -> int:
        return len(self.bias)

    def sums(self, rows: Rows) -> tuple[Any, ...]:
        """What the kernels finish: sums [P, outputs], scales [T], factors and bias [outputs]."""
        sums = torch._int_mm(rows.values, self._weight)
        return sums.numpy(), rows.scales.numpy(), self.factors, self.bias

    def __call__(self, rows: Rows) -> Tensor:
        """float32 [T, outputs]"""
        output = torch.empty(len(rows.scales), self.outputs)
        row_kernels.finish(*self.sums(rows), output.numpy())
        return output


class _Norm:
    """The layer norm of a product with its residual."""

    def __init__(self, norm: Any) -> None:
        self._weight, self._bias = norm.weight.detach().numpy(), norm.bias.detach().numpy()
        self._epsilon = np.float32(norm.eps)

    def __call__(self, linear: Int8Linear, rows: Rows, residual: Tensor) -> Tensor:
        """float32 [T, n] -> [T, n]"""
        states = torch.empty_like(residual)
        row_kernels.finish_and_norm(
            *linear.sums(rows),
            residual.numpy(),
            self._weight,
            self._bias,
            self._epsilon,
            states.numpy(),
        )
        return states


class Int8Layer:
    """A layer's quantised weights (`adapters.layers.bert.TunableLayer`).

    When one position of each row is read, `_query` and `_key_value` replace `_projection`.
    """

    def __init__(self, layer: Any) -> None:
        self._layer = layer
        own = layer.attention.self
        self.copied = linears_of(layer)
        self._heads = _RowHeads(own)
        self._exact_gelu = own.config.hidden_act == "gelu"
        self._projection = Int8Linear(own.query, own.key, own.value)
        self._dense = Int8Linear(layer.attention.output.dense)
        self._inner_norm = _Norm(layer.attention.output.LayerNorm)
        self._up = Int8Linear(layer.intermediate.dense)
        self._down = Int8Linear(layer.output.dense)
        self._outer_norm = _Norm(layer.output.LayerNorm)

    def forward(self, states: Tensor, layout: Extents) -> Tensor:
        """[T, n] -> [T, n]"""
        projected = self._projection(Rows.of(states))
        return self._finish(_joined(self._heads.attend(projected, layout)), states)

    def read(self, states: Tensor, positions: Tensor, layout: Extents) -> Tensor:
        """As the last layer: [T, n] -> [positions, n]."""
        rows, read = Rows.of(states), states.index_select(0, positions)
        if one_each(positions, layout):
            queries = self._query(Rows.of(read))
            attended = _joined(self._heads.attend_reads(queries, self._key_value(rows), layout))
        else:
            everywhere = self._heads.attend(self._projection(rows), layout)
            attended = _joined(everywhere).index_select(0, positions)
        return self._finish(attended, read)

    def forward_tuned(self, states: Tensor, layout: Extents, tuning: LayerTuning) -> Tensor:
        """With the adapters' changes: [T, n] -> [T, n]."""
        return self._finish_tuned(self._attend_tuned(states, layout, tuning), states, tuning)

    def read_tuned(
        self, states: Tensor, positions: Tensor, layout: Extents, tuning: LayerTuning
    ) -> Tensor:
        """As the last layer, with the adapters' changes: [T, n] -> [positions, n]."""
        read, changes = states.index_select(0, positions), tuning.select(positions)
        if (
            isinstance(tuning, SplitTuning)
            and isinstance(changes, SplitTuning)
            and one_each(positions, layout)
        ):
            queries = changes.queries(read, self._query(Rows.of(read)))
            projected = tuning.keys_and_values(states, self._key_value(Rows.of(states)))
            attended = _joined(self._heads.attend_reads(queries, projected, layout))
        else:
            attended = self._attend_tuned(states, layout, tuning).index_select(0, positions)
        return self._finish_tuned(attended, read, changes)

    def _attend_tuned(self, states: Tensor, layout: Extents, tuning: LayerTuning) -> Tensor:
        projected = tuning.projection(states, self._projection(Rows.of(states)))
        return _joined(self._heads.attend(projected, layout))

    def _finish(self, attended: Tensor, residual: Tensor) -> Tensor:
        """After attention: [T, n] each."""
        states = self._inner_norm(self._dense, Rows.of(attended), residual)
        rows = Rows.of(states)
        if self._exact_gelu:
            wide = Rows.empty(len(states), self._up.outputs)
            row_kernels.finish_and_quantise(*self._up.sums(rows), *wide.arrays)
        else:
            activation = self._layer.intermediate.intermediate_act_fn
            wide = Rows.of(activation(self._up(rows)))
        return self._outer_norm(self._down, wide, states)

    def _finish_tuned(self, attended: Tensor, residual: Tensor, tuning: LayerTuning) -> Tensor:
        """As `_finish`, with changes between any of the steps."""
        layer = self._layer
        dense = tuning.dense(attended, self._dense(Rows.of(attended)))
        states = layer.attention.output.LayerNorm(dense.add_(residual))
        wide = tuning.up(states, self._up(Rows.of(states)))
        wide = tuning.activated(layer.intermediate.intermediate_act_fn(wide))
        output = tuning.down(wide, self._down(Rows.of(wide)))
        finished: Tensor = layer.output.LayerNorm(output.add_(states))
        return finished

    @cached_property
    def _query(self) -> Int8Linear:
        return Int8Linear(self._layer.attention.self.query)

    @cached_property
    def _key_value(self) -> Int8Linear:
        own = self._layer.attention.self
        return Int8Linear(own.key, own.value)


class _RowHeads:
    """Attention in float32, row by row: a product of several rows would sum in another order."""

    def __init__(self, attention: Any) -> None:
        self._heads, self._size = attention.num_attention_heads, attention.attention_head_size

    def attend(self, projected: Tensor, layout: Extents) -> list[Tensor]:
        """Of all tokens, from queries, keys and values [T, 3 n]: [length, heads, d] a row."""
        heads = projected.view(len(projected), 3, self._heads, self._size)
        return [
            attend(*row.permute(1, 2, 0, 3).unsqueeze(1).unbind())
            for run in layout.by_run(heads)
            for row in run.unbind()
        ]

    def attend_reads(self, queries: Tensor, projected: Tensor, layout: Extents) -> list[Tensor]:
        """Of one token of every row, from queries [rows, n], and keys with values [T, 2 n]:
        [1, heads, d] a row."""
        ones = queries.view(len(queries), 1, self._heads, 1, self._size).unbind()
        heads = projected.view(len(projected), 2, self._heads, self._size)
        rows = [row for run in layout.by_run(heads) for row in run.unbind()]
        return [
            attend(one, *row.permute(1, 2, 0, 3).unsqueeze(1).unbind())
            for one, row in zip(ones, rows, strict=True)
        ]


def _joined(attended: list[Tensor]) -> Tensor:
    """[positions, heads, d] in pieces -> [T, n]"""
    return torch.cat(attended).flatten(1)
