"""A BERT-like layer on a CUDA device: fewer, larger kernels over the layer's own weights.

Knows no prompts. For float16 and bfloat16, where no gradient is asked for; everything else goes
through the layer as `transformers` has it (`adapters.layers.bert`).

- One product for queries, keys and values.
- Attention for the rows there are: flash kernels work in blocks of 128 queries by 128 keys, and
  most rows are shorter than one.
- A residual and its norm are one kernel that rounds once; GELU is applied in place.
- The last layer does what follows attention for the positions that are read, and for no others.

Rows meet in attention alone. A tail that no row owns is not attended: what is there, be it NaN,
stays in the tail.
"""

import logging
import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor, nn
from torch.nn import functional

from adapters.layers import triton_layer as layer_code

logger = logging.getLogger(__name__)

# Larger heads' blocks do not fit a processor's registers.
MAX_HEAD_SIZE = 128
# Of which a device runs some hundreds at a time: from here on another program only costs its start.
_PROGRAMS = 2048
# What bfloat16 may differ by on numbers around one.
_ROUNDING = 0.05


@dataclass(frozen=True, slots=True)
class _Tiling:
    """block: queries and keys taken at a time. parts: programs that share a row's blocks of one
    head."""

    block: int
    parts: int
    warps: int = 4
    stages: int = 2


class FusedLayer:
    """A layer's weights as the kernels want them; `copied` names those that are held twice."""

    def __init__(self, layer: Any) -> None:
        own = layer.attention.self
        self.copied: tuple[nn.Linear, ...] = (own.query, own.key, own.value)
        self._weight = torch.cat([linear.weight for linear in self.copied]).detach()
        self._bias = torch.cat([linear.bias for linear in self.copied]).detach()
        self._heads, self._size = own.num_attention_heads, own.attention_head_size
        self._attention, self._intermediate = layer.attention.output, layer.intermediate
        self._output = layer.output
        self._exact_gelu = own.config.hidden_act == "gelu"

    def forward(self, states: Tensor, layout: Any) -> Tensor:
        """[T, n] -> [T, n]"""
        # Triton launches on the thread's device, whatever its arguments' one is.
        with torch.cuda.device_of(states):
            return self._finish(self._attended(states, layout), states)

    def read(self, states: Tensor, positions: Tensor, layout: Any) -> Tensor:
        """As the last layer: [T, n] -> [positions, n]."""
        with torch.cuda.device_of(states):
            attended = self._attended(states, layout).index_select(0, positions)
            return self._finish(attended, states.index_select(0, positions))

    def _attended(self, states: Tensor, layout: Any) -> Tensor:
        """[T, n] -> [T, heads * d]"""
        made = functional.linear(states, self._weight, self._bias)
        projected = made.view(len(made), 3, self._heads, self._size)
        return attend(projected, layout.cumulative, longest=layout.longest)

    def _finish(self, attended: Tensor, entering: Tensor) -> Tensor:
        """What follows attention: [positions, heads * d], [positions, n] -> [positions, n]"""
        states = add_norm(self._attention.dense(attended), entering, self._attention.LayerNorm)
        wide = self._intermediate.dense(states)
        if self._exact_gelu:
            wide = torch.ops.aten.gelu_(wide)
        else:
            wide = self._intermediate.intermediate_act_fn(wide)
        return add_norm(self._output.dense(wide), states, self._output.LayerNorm)


def attend(projected: Tensor, cumulative: Tensor, *, longest: int) -> Tensor:
    """softmax(Q K^T / sqrt(d)) V within every row.

    Args:
        projected: [T, 3, heads, d], queries, keys and values; d at most `MAX_HEAD_SIZE`.
        cumulative: int32 [rows + 1], the rows' starts and the last one's end; rows may be empty.
        longest: no row has more tokens.

    Returns:
        [T, heads * d]; undefined behind the last row.
    """
    tiling = _tiling(len(cumulative) - 1, projected.shape[2], longest)
    return _attend(projected, cumulative, tiling)


def add_norm(states: Tensor, residual: Tensor, norm: nn.LayerNorm, *, warps: int = 4) -> Tensor:
    """norm(states + residual), of [T, n] each."""
    assert states.is_contiguous(), states.stride()
    assert residual.is_contiguous(), residual.stride()
    n = states.shape[1]
    made = torch.empty_like(states)
    layer_code.add_norm[(len(states),)](
        states,
        residual,
        norm.weight,
        norm.bias,
        made,
        norm.eps,
        N=n,
        COLUMNS=triton.next_power_of_2(n),
        num_warps=warps,
    )
    return made


@cache
def usable(device: torch.device, dtype: torch.dtype, *, heads: int, size: int) -> bool:
    """Whether the kernels can be compiled for this device and give what PyTorch gives: tried once.

    A device or compiler that nobody has tried yet must still serve, if slowly.
    """
    try:
        error = _error(device, dtype, heads=heads, size=size)
    except Exception:
        logger.exception("fused layers cannot be used here")
        return False
    if not error <= _ROUNDING:
        logger.error("fused layers are wrong here: they differ from PyTorch's by %g", error)
    return error <= _ROUNDING


def _error(device: torch.device, dtype: torch.dtype, *, heads: int, size: int) -> float:
    """The largest difference on a few random rows."""
    lengths = (1, 0, 70, 33)
    random = torch.Generator().manual_seed(0)
    projected = torch.randn(sum(lengths), 3, heads, size, generator=random).to(device, dtype)
    cumulative = torch.tensor((0, *lengths)).cumsum(0).to(device, torch.int32)
    with torch.cuda.device_of(projected):
        attended = attend(projected, cumulative, longest=max(lengths))
    exact = [
        functional.scaled_dot_product_attention(*row.float().permute(1, 2, 0, 3)).transpose(0, 1)
        for row in projected.split(lengths)
    ]
    norm = nn.LayerNorm(heads * size, device=device, dtype=dtype).requires_grad_(False)
    states, residual = (projected[:, index].flatten(1).contiguous() for index in range(2))
    normal = functional.layer_norm(states.float() + residual.float(), (heads * size,))
    with torch.cuda.device_of(states):
        found = torch.stack([attended, add_norm(states, residual, norm)])
    # One maximum, which NaN goes through.
    return float((found - torch.stack([torch.cat(exact).flatten(1), normal])).abs().max())


def _tiling(rows: int, heads: int, longest: int) -> _Tiling:
    block = 64 if longest > 32 else 32
    blocks = triton.cdiv(longest, block)
    # Of many rows few are long: a program for every block of the longest would mostly find none.
    return _Tiling(block, max(1, min(blocks, _PROGRAMS // (rows * heads))))


def _attend(projected: Tensor, cumulative: Tensor, tiling: _Tiling) -> Tensor:
    tokens, _, heads, size = projected.shape
    assert projected.is_contiguous(), projected.stride()
    assert size <= MAX_HEAD_SIZE, size
    made = torch.empty(tokens, heads * size, dtype=projected.dtype, device=projected.device)
    layer_code.attend[(heads, len(cumulative) - 1, tiling.parts)](
        *projected.unbind(1),
        projected.stride(0),
        cumulative,
        made,
        size**-0.5 * math.log2(math.e),
        SIZE=size,
        # No product of blocks is narrower than 16.
        DEPTH=max(16, triton.next_power_of_2(size)),
        BLOCK=tiling.block,
        num_warps=tiling.warps,
        num_stages=tiling.stages,
    )
    return made
