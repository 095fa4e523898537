"""A BERT-like layer on a CUDA device: fewer and larger kernels, in float16 and bfloat16.

- One product for queries, keys and values.
- Attention for short rows: flash kernels work in blocks of 128 queries by 128 keys, and most rows
  are shorter than that.
- A residual and its norm are one kernel that rounds once; GELU is applied in place.
- After attention, the last layer computes only the positions that are read.

Positions after the last row are not attended to: whatever they hold, even NaN, stays there.
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

from adapters.layers import triton_layer
from adapters.packed.layout import Extents

logger = logging.getLogger(__name__)

# The blocks of larger heads do not fit in registers.
MAX_HEAD_SIZE = 128
# A device runs some hundreds of programs at a time: beyond this number more only cost launch time.
_PROGRAMS = 2048
# The largest rounding error of bfloat16 on numbers around one.
_ROUNDING = 0.05


@dataclass(frozen=True, slots=True)
class Tiling:
    """block: queries and keys at a time. parts: programs that share the blocks of a row's head."""

    block: int
    parts: int
    warps: int = 4
    stages: int = 2


class FusedLayer:
    """A layer's weights as the kernels want them (`adapters.layers.bert.FastLayer`)."""

    def __init__(self, layer: Any) -> None:
        own = layer.attention.self
        self.copied: tuple[nn.Linear, ...] = (own.query, own.key, own.value)
        self._weight = torch.cat([linear.weight for linear in self.copied]).detach()
        self._bias = torch.cat([linear.bias for linear in self.copied]).detach()
        self._heads, self._size = own.num_attention_heads, own.attention_head_size
        self._attention, self._intermediate = layer.attention.output, layer.intermediate
        self._output = layer.output
        self._exact_gelu = own.config.hidden_act == "gelu"

    def forward(self, states: Tensor, layout: Extents) -> Tensor:
        """[T, n] -> [T, n]"""
        # Triton launches on the thread's current device, not on its arguments' device.
        with torch.cuda.device_of(states):
            return self._finish(self._attended(states, layout), states)

    def read(self, states: Tensor, positions: Tensor, layout: Extents) -> Tensor:
        """As the last layer: [T, n] -> [positions, n]."""
        with torch.cuda.device_of(states):
            attended = self._attended(states, layout).index_select(0, positions)
            return self._finish(attended, states.index_select(0, positions))

    def _attended(self, states: Tensor, layout: Extents) -> Tensor:
        """[T, n] -> [T, heads * d]"""
        projected = functional.linear(states, self._weight, self._bias)
        projected = projected.view(len(states), 3, self._heads, self._size)
        return attend(projected, layout.cumulative, longest=layout.longest)

    def _finish(self, attended: Tensor, residual: Tensor) -> Tensor:
        """After attention: [positions, heads * d], [positions, n] -> [positions, n]"""
        states = add_norm(self._attention.dense(attended), residual, self._attention.LayerNorm)
        wide = self._intermediate.dense(states)
        if self._exact_gelu:
            wide = torch.ops.aten.gelu_(wide)
        else:
            wide = self._intermediate.intermediate_act_fn(wide)
        return add_norm(self._output.dense(wide), states, self._output.LayerNorm)


def attend(
    projected: Tensor, cumulative: Tensor, *, longest: int, tiling: Tiling | None = None
) -> Tensor:
    """softmax(Q K^T / sqrt(d)) V within every row.

    Args:
        projected: [T, 3, heads, d], queries, keys and values; d at most `MAX_HEAD_SIZE`.
        cumulative: int32 [rows + 1], where rows start, and the end; rows may be empty.
        longest: no row has more tokens.
        tiling: None chooses one; it never changes the result.

    Returns:
        [T, heads * d]; undefined after the last row.
    """
    tokens, _, heads, size = projected.shape
    tiling = tiling or tiling_of(len(cumulative) - 1, heads, longest)
    assert projected.is_contiguous(), projected.stride()
    assert size <= MAX_HEAD_SIZE, size
    out = torch.empty(tokens, heads * size, dtype=projected.dtype, device=projected.device)
    triton_layer.attend[(heads, len(cumulative) - 1, tiling.parts)](
        *projected.unbind(1),
        projected.stride(0),
        cumulative,
        out,
        size**-0.5 * math.log2(math.e),
        SIZE=size,
        # A product of blocks is at least 16 wide.
        DEPTH=max(16, triton.next_power_of_2(size)),
        BLOCK=tiling.block,
        num_warps=tiling.warps,
        num_stages=tiling.stages,
    )
    return out


def tiling_of(rows: int, heads: int, longest: int) -> Tiling:
    block = 64 if longest > 32 else 32
    blocks = triton.cdiv(longest, block)
    # Of many rows few are long: most programs for the longest row's blocks would have no work.
    return Tiling(block, max(1, min(blocks, _PROGRAMS // (rows * heads))))


def add_norm(states: Tensor, residual: Tensor, norm: nn.LayerNorm, *, warps: int = 4) -> Tensor:
    """norm(states + residual), of [T, n] each."""
    assert states.is_contiguous(), states.stride()
    assert residual.is_contiguous(), residual.stride()
    n = states.shape[1]
    out = torch.empty_like(states)
    triton_layer.add_norm[(len(states),)](
        states,
        residual,
        norm.weight,
        norm.bias,
        out,
        norm.eps,
        N=n,
        COLUMNS=triton.next_power_of_2(n),
        num_warps=warps,
    )
    return out


@cache
def usable(device: torch.device, dtype: torch.dtype, *, heads: int, size: int) -> bool:
    """Whether the kernels compile for this device and agree with PyTorch; tried once.

    An untested device or compiler must still serve, if slowly.
    """
    try:
        error = _error(device, dtype, heads=heads, size=size)
    except Exception:
        logger.exception("fused layers cannot be used on this device")
        return False
    if not error <= _ROUNDING:
        logger.error("fused layers are not used: they differ from PyTorch by %g", error)
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
        results = torch.stack([attended, add_norm(states, residual, norm)])
    # One maximum, which NaN passes through.
    return float((results - torch.stack([torch.cat(exact).flatten(1), normal])).abs().max())
