"""A BERT-like layer on a CPU, by oneDNN. docs/cpu.md has the gain of each step:

- Weights are reordered once, not in every product. In float32 this also makes torch use oneDNN at
  all: its plain products use MKL, which is slow on other makers' processors.
- One product for queries, keys and values; GELU is applied while the product is in registers.
- oneDNN compiles a kernel for every new number of rows, which takes longer than the product. So
  sequences are padded to a few sizes.
- Attention is computed in float32; for short rows it is two plain products around a softmax.
- The last layer makes queries only for the positions that are read.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from adapters.layers.tuning import LayerTuning, SplitTuning
from adapters.packed.layout import Extents

# Padded sizes from one power of two to the next: padding is 1/32 on average.
_SIZES = 16
_SMALLEST_STEP = 8
# The scores of longer rows do not fit in the processor's caches: the flash kernel computes them.
_PLAIN_LENGTH = 64


@dataclass(frozen=True, slots=True)
class ReorderedLinear:
    """One or more `nn.Linear` with the same input as one product, reordered for oneDNN."""

    weight: Tensor
    bias: Tensor | None

    @classmethod
    def of(cls, *linears: nn.Linear) -> "ReorderedLinear":
        weight = torch.cat([linear.weight for linear in linears]).detach()
        bias = torch.cat([linear.bias for linear in linears]).detach()
        return cls(torch.ops.mkldnn._reorder_linear_weight(weight), bias)

    @classmethod
    def transposed(cls, *linears: nn.Linear) -> "ReorderedLinear":
        """The product of the gradient: [T, outputs] -> [T, inputs]."""
        weight = torch.cat([linear.weight for linear in linears]).detach()
        return cls(torch.ops.mkldnn._reorder_linear_weight(weight.t().contiguous()), None)

    def padded(self, states: Tensor) -> Tensor:
        """The product with padding to one of the few sizes."""
        return self(pad(states))[: len(states)]

    def __call__(self, states: Tensor, activation: Literal["none", "gelu"] = "none") -> Tensor:
        """[T, n] -> [T, outputs]; `gelu` is the exact one."""
        product: Tensor = torch.ops.mkldnn._linear_pointwise(
            states, self.weight, self.bias, activation, [], "none"
        )
        return product


def linears_of(layer: Any) -> tuple[nn.Linear, ...]:
    """All linear modules of a BERT-like layer."""
    own, output = layer.attention.self, layer.attention.output
    modules = (own.query, own.key, own.value)
    return (*modules, output.dense, layer.intermediate.dense, layer.output.dense)


@dataclass(frozen=True, slots=True)
class Heads:
    """Attention in float32: heads of d values each. Results are [positions, heads, d] a run."""

    heads: int
    size: int

    @classmethod
    def of(cls, attention: Any) -> "Heads":
        return cls(attention.num_attention_heads, attention.attention_head_size)

    def attend(self, projected: Tensor, layout: Extents) -> list[Tensor]:
        """Of all tokens, from queries, keys and values [T, 3 n]."""
        heads = projected.view(len(projected), 3, self.heads, self.size)
        return [
            attend(*rows.permute(2, 0, 3, 1, 4).unbind()) for rows in layout.by_run(heads.float())
        ]

    def attend_reads(self, queries: Tensor, projected: Tensor, layout: Extents) -> list[Tensor]:
        """Of one token of every row, from queries [reads, n], and keys with values [T, 2 n]."""
        queries = queries.float().view(len(queries), self.heads, 1, self.size)
        heads = projected.view(len(projected), 2, self.heads, self.size)
        runs = layout.by_run(heads.float())
        sizes = [len(rows) for rows in runs]
        return [
            attend(run_queries, *rows.permute(2, 0, 3, 1, 4).unbind())
            for run_queries, rows in zip(queries[: sum(sizes)].split(sizes), runs, strict=True)
        ]


class OneDnnLayer:
    """A layer's reordered weights (`adapters.layers.bert.FastLayer`).

    When one position of each row is read, `_query` and `_key_value` replace `_projection`.
    """

    def __init__(self, layer: Any) -> None:
        self._layer = layer
        own = layer.attention.self
        self.copied = linears_of(layer)
        self._heads = Heads.of(own)
        self._exact_gelu = own.config.hidden_act == "gelu"
        self._dense = ReorderedLinear.of(layer.attention.output.dense)
        self._intermediate = ReorderedLinear.of(layer.intermediate.dense)
        self._output = ReorderedLinear.of(layer.output.dense)

    def forward(self, states: Tensor, layout: Extents) -> Tensor:
        """[T, n] -> [T, n]"""
        padded = pad(states)
        attended = self._attend_all(padded, len(states), layout)
        return self._finish(attended, padded)[: len(states)]

    def read(self, states: Tensor, positions: Tensor, layout: Extents) -> Tensor:
        """As the last layer: [T, n] -> [positions, n]."""
        padded, read = pad(states), pad(states.index_select(0, positions))
        if one_each(positions, layout):
            keys_and_values = self._key_value(padded)[: len(states)]
            attended = self._heads.attend_reads(self._query(read), keys_and_values, layout)
        else:
            everywhere = torch.cat(self._attend_all(padded, len(states), layout))
            attended = [everywhere.index_select(0, positions)]
        return self._finish(attended, read)[: len(positions)]

    def forward_tuned(self, states: Tensor, layout: Extents, tuning: LayerTuning) -> Tensor:
        """With the adapters' changes: [T, n] -> [T, n]."""
        padded = pad(states)
        attended = self._attend_tuned(padded, len(states), layout, tuning)
        return self._finish_tuned(attended, padded, tuning)[: len(states)]

    def read_tuned(
        self, states: Tensor, positions: Tensor, layout: Extents, tuning: LayerTuning
    ) -> Tensor:
        """As the last layer, with the adapters' changes: [T, n] -> [positions, n]."""
        padded, read = pad(states), pad(states.index_select(0, positions))
        changes = tuning.select(positions)
        if (
            isinstance(tuning, SplitTuning)
            and isinstance(changes, SplitTuning)
            and one_each(positions, layout)
        ):
            queries, projected = self._query(read).float(), self._key_value(padded).float()
            _change(changes.queries, read, queries, len(positions))
            _change(tuning.keys_and_values, padded, projected, len(states))
            attended = self._heads.attend_reads(queries, projected[: len(states)], layout)
        else:
            everywhere = torch.cat(self._attend_tuned(padded, len(states), layout, tuning))
            attended = [everywhere.index_select(0, positions)]
        return self._finish_tuned(attended, read, changes)[: len(positions)]

    def _attend_tuned(
        self, padded: Tensor, tokens: int, layout: Extents, tuning: LayerTuning
    ) -> list[Tensor]:
        # Attention wants float32 anyway; changes are faster there, and exact.
        projected = self._projection(padded)[:tokens].float()
        projected = tuning.projection(padded[:tokens], projected)
        return self._heads.attend(projected, layout)

    def _finish_tuned(
        self, attended: list[Tensor], residual: Tensor, tuning: LayerTuning
    ) -> Tensor:
        """As `_finish`. GELU is not inside the product: a change comes before it."""
        layer = self._layer
        joined, rows = _joined(attended, residual)
        dense = self._dense(joined)
        _change(tuning.dense, joined, dense, rows)
        states = layer.attention.output.LayerNorm(dense.add_(residual))
        wide = self._intermediate(states)
        _change(tuning.up, states, wide, rows)
        if self._exact_gelu:
            torch.ops.aten.gelu_(wide)
        else:
            wide = layer.intermediate.intermediate_act_fn(wide)
        changed = tuning.activated(wide[:rows])
        if changed.data_ptr() != wide.data_ptr():
            wide[:rows] = changed
        output = self._output(wide)
        _change(tuning.down, wide, output, rows)
        finished: Tensor = layer.output.LayerNorm(output.add_(states))
        return finished

    def _attend_all(self, padded: Tensor, tokens: int, layout: Extents) -> list[Tensor]:
        """Attention of all tokens: [positions, heads, d] for each run."""
        return self._heads.attend(self._projection(padded)[:tokens], layout)

    def _finish(self, attended: list[Tensor], residual: Tensor) -> Tensor:
        """After attention: [positions, heads, d] in pieces, residual [T, n] -> [T, n]."""
        layer = self._layer
        joined, _ = _joined(attended, residual)
        states = layer.attention.output.LayerNorm(self._dense(joined) + residual)
        if self._exact_gelu:
            wide = self._intermediate(states, "gelu")
        else:
            wide = layer.intermediate.intermediate_act_fn(self._intermediate(states))
        finished: Tensor = layer.output.LayerNorm(self._output(wide) + states)
        return finished

    @cached_property
    def _projection(self) -> ReorderedLinear:
        own = self._layer.attention.self
        return ReorderedLinear.of(own.query, own.key, own.value)

    @cached_property
    def _query(self) -> ReorderedLinear:
        return ReorderedLinear.of(self._layer.attention.self.query)

    @cached_property
    def _key_value(self) -> ReorderedLinear:
        own = self._layer.attention.self
        return ReorderedLinear.of(own.key, own.value)


def _joined(attended: list[Tensor], residual: Tensor) -> tuple[Tensor, int]:
    """[positions, heads, d] in pieces as one, padded like the residual; and the positions."""
    rows = sum(map(len, attended))
    padding = attended[0].new_zeros(len(residual) - rows, *attended[0].shape[1:])
    return torch.cat([*attended, padding]).to(residual.dtype).flatten(1), rows


def _change(
    change: Callable[[Tensor, Tensor], Tensor], inputs: Tensor, output: Tensor, rows: int
) -> None:
    """Put a change into a padded output."""
    unpadded = output[:rows]
    changed = change(inputs[:rows], unpadded)
    if changed.data_ptr() != unpadded.data_ptr():
        unpadded.copy_(changed)


def attend(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """[rows, heads, queries or length, d] each -> [rows * queries, heads, d]"""
    if queries.shape[2] * keys.shape[2] > _PLAIN_LENGTH**2:
        attended = functional.scaled_dot_product_attention(queries, keys, values)
    else:
        scores = torch.matmul(queries * queries.shape[-1] ** -0.5, keys.transpose(-1, -2))
        attended = torch.matmul(scores.softmax(-1), values)
    return attended.transpose(1, 2).flatten(0, 1)


def one_each(positions: Tensor, layout: Extents) -> bool:
    """Whether one position of every row is read, in the rows' order."""
    ends = layout.cumulative[1:]
    if len(positions) != len(ends):
        return False
    rows = torch.searchsorted(ends, positions.to(ends.dtype), right=True)
    return torch.equal(rows, torch.arange(len(rows)))


def pad(states: Tensor) -> Tensor:
    """[T, n] with zero rows appended, up to the next of the few sizes."""
    missing = padded_size(len(states)) - len(states)
    return torch.cat([states, states.new_zeros(missing, states.shape[1])]) if missing else states


def padded_size(rows: int) -> int:
    """The next of the few sizes."""
    step: int = max(_SMALLEST_STEP, 2 ** (rows.bit_length() - 1) // _SIZES)
    return math.ceil(rows / step) * step


@cache
def types() -> tuple[torch.dtype, ...]:
    """The types that oneDNN multiplies fast on this machine."""
    architecture = torch.cpu.get_capabilities().get("architecture")
    if architecture != "x86_64" or not torch.backends.mkldnn.is_available():
        return ()
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return (torch.float32, torch.bfloat16)
    return (torch.float32,)
