"""A BERT-like layer on a CPU: the layer's own weights, in the form in which oneDNN wants them.

Knows no prompts, and not when it is asked: `adapters.layers.bert` decides. docs/cpu.md has what each step
below is worth.

- Weights are reordered once and not by every product. In float32 this is also what makes torch use
  oneDNN at all: its plain products are MKL's, which is slow on processors of other makers.
- One product for queries, keys and values; GELU is applied while the product is still in registers.
- oneDNN compiles a kernel for every number of rows that it meets, which takes longer than the
  product: sequences are padded to a few sizes.
- Attention is computed in float32; for short rows as two plain products around a softmax.
- The last layer makes queries for the rows that are read, and for no others.
"""

import math
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

# Sizes within an octave: what is padded is 1/32 on average.
_SIZES = 16
_SMALLEST_STEP = 8
# Of longer rows the scores leave the processor's caches: those go to the flash kernel.
_PLAIN_LENGTH = 64


@dataclass(frozen=True, slots=True)
class Product:
    """One or more `nn.Linear` of the same input as one product, reordered for oneDNN."""

    weight: Tensor
    bias: Tensor | None

    @classmethod
    def of(cls, *linears: nn.Linear) -> "Product":
        weight = torch.cat([linear.weight for linear in linears]).detach()
        bias = torch.cat([linear.bias for linear in linears]).detach()
        return cls(torch.ops.mkldnn._reorder_linear_weight(weight), bias)

    @classmethod
    def transposed(cls, *linears: nn.Linear) -> "Product":
        """The gradient's product: [T, outputs] -> [T, n]."""
        weight = torch.cat([linear.weight for linear in linears]).detach()
        return cls(torch.ops.mkldnn._reorder_linear_weight(weight.t().contiguous()), None)

    def padded(self, states: Tensor) -> Tensor:
        """As `__call__`, for sequences of any length."""
        return self(_padded(states))[: len(states)]

    def __call__(self, states: Tensor) -> Tensor:
        """[T, n] -> [T, outputs]"""
        made: Tensor = torch.ops.mkldnn._linear_pointwise(
            states, self.weight, self.bias, "none", [], ""
        )
        return made

    def gelu(self, states: Tensor) -> Tensor:
        """The same through the exact GELU."""
        made: Tensor = torch.ops.mkldnn._linear_pointwise(
            states, self.weight, self.bias, "gelu", [], "none"
        )
        return made


def linears_of(layer: Any) -> tuple[nn.Linear, ...]:
    """All products of a BERT-like layer."""
    own = layer.attention.self
    behind = (layer.attention.output.dense, layer.intermediate.dense, layer.output.dense)
    return (own.query, own.key, own.value, *behind)


class OneDnnLayer:
    """A layer's products, each made when it is first asked for, and what runs between them."""

    def __init__(self, layer: Any) -> None:
        self._layer = layer
        own = layer.attention.self
        self.copied = linears_of(layer)
        self._heads, self._size = own.num_attention_heads, own.attention_head_size
        self._exact_gelu = own.config.hidden_act == "gelu"

    def forward(self, states: Tensor, layout: Any) -> Tensor:
        """[T, n] -> [T, n]; `layout` as `adapters.layers.attention` takes it."""
        entering = _padded(states)
        attended = self._attended(entering, len(states), layout)
        return self._finish(attended, entering)[: len(states)]

    def read(self, states: Tensor, positions: Tensor, layout: Any) -> Tensor:
        """As the last layer: [T, n] -> [positions, n]."""
        entering, reading = _padded(states), _padded(states.index_select(0, positions))
        if _one_each(positions, layout):
            found = self._attended_by(reading, entering, len(states), layout)
        else:
            everywhere = torch.cat(self._attended(entering, len(states), layout))
            found = [everywhere.index_select(0, positions)]
        return self._finish(found, reading)[: len(positions)]

    def _attended(self, entering: Tensor, tokens: int, layout: Any) -> list[Tensor]:
        """Attention of all tokens: [positions, heads, d] a run."""
        made = self._projection(entering).view(len(entering), 3, self._heads, self._size)
        return [
            _attend(*rows.permute(2, 0, 3, 1, 4).unbind())
            for rows in layout.by_run(made[:tokens].float())
        ]

    def _attended_by(
        self, reading: Tensor, entering: Tensor, tokens: int, layout: Any
    ) -> list[Tensor]:
        """Attention of one token of every row, `reading`: [rows, heads, d] a run."""
        queries = self._query(reading).float().view(len(reading), self._heads, 1, self._size)
        made = self._key_value(entering).view(len(entering), 2, self._heads, self._size)
        runs = layout.by_run(made[:tokens].float())
        sizes = [len(rows) for rows in runs]
        return [
            _attend(some, *rows.permute(2, 0, 3, 1, 4).unbind())
            for some, rows in zip(queries[: sum(sizes)].split(sizes), runs, strict=True)
        ]

    def _finish(self, attended: list[Tensor], entering: Tensor) -> Tensor:
        """What follows attention: [positions, heads, d] in pieces -> [T, n], T of `entering`."""
        layer = self._layer
        rows = sum(map(len, attended))
        nothing = attended[0].new_zeros(len(entering) - rows, *attended[0].shape[1:])
        joined = torch.cat([*attended, nothing]).to(entering.dtype).flatten(1)
        states = layer.attention.output.LayerNorm(self._dense(joined) + entering)
        if self._exact_gelu:
            wide = self._intermediate.gelu(states)
        else:
            wide = layer.intermediate.intermediate_act_fn(self._intermediate(states))
        finished: Tensor = layer.output.LayerNorm(self._output(wide) + states)
        return finished

    @cached_property
    def _projection(self) -> Product:
        own = self._layer.attention.self
        return Product.of(own.query, own.key, own.value)

    @cached_property
    def _query(self) -> Product:
        return Product.of(self._layer.attention.self.query)

    @cached_property
    def _key_value(self) -> Product:
        own = self._layer.attention.self
        return Product.of(own.key, own.value)

    @cached_property
    def _dense(self) -> Product:
        return Product.of(self._layer.attention.output.dense)

    @cached_property
    def _intermediate(self) -> Product:
        return Product.of(self._layer.intermediate.dense)

    @cached_property
    def _output(self) -> Product:
        return Product.of(self._layer.output.dense)


def _attend(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """[rows, heads, queries or length, d] each -> [rows * queries, heads, d]"""
    if queries.shape[2] * keys.shape[2] > _PLAIN_LENGTH**2:
        attended = functional.scaled_dot_product_attention(queries, keys, values)
    else:
        scores = torch.matmul(queries * queries.shape[-1] ** -0.5, keys.transpose(-1, -2))
        attended = torch.matmul(scores.softmax(-1), values)
    return attended.transpose(1, 2).flatten(0, 1)


def _one_each(positions: Tensor, layout: Any) -> bool:
    """Whether one position of every row is read, in the rows' order."""
    behind = layout.cumulative[1:]
    if len(positions) != len(behind):
        return False
    rows = torch.searchsorted(behind, positions.to(behind.dtype), right=True)
    return torch.equal(rows, torch.arange(len(rows)))


def _padded(states: Tensor) -> Tensor:
    """Zero rows behind [T, n], up to the next of the few sizes that there are."""
    rows = len(states)
    step = max(_SMALLEST_STEP, 2 ** (rows.bit_length() - 1) // _SIZES)
    missing = math.ceil(rows / step) * step - rows
    return functional.pad(states, (0, 0, 0, missing)) if missing else states


@cache
def types() -> tuple[torch.dtype, ...]:
    """What oneDNN is known to multiply fast on this machine."""
    architecture = torch.cpu.get_capabilities().get("architecture")
    if architecture != "x86_64" or not torch.backends.mkldnn.is_available():
        return ()
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return (torch.float32, torch.bfloat16)
    return (torch.float32,)
