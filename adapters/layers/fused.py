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
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol, runtime_checkable

import torch
import triton
from torch import Tensor, nn
from torch.nn import functional

from adapters.layers import triton_layer
from adapters.layers.narrow import Bound, NarrowRows
from adapters.layers.tuning import LayerTuning
from adapters.packed.layout import Extents

logger = logging.getLogger(__name__)

# The blocks of larger heads do not fit in registers.
MAX_HEAD_SIZE = 128
# A device runs some hundreds of programs at a time: beyond this number more only cost launch time.
_PROGRAMS = 2048
# With vectors, attention would take 141 registers a thread for heads of 64, and a multiprocessor
# would run three programs instead of four. The limit spills 13 of them.
_TUNED_REGISTERS, _LIMITED_DEPTH = 128, 64
# The largest rounding error of bfloat16 on numbers around one.
_ROUNDING = 0.05


@dataclass(frozen=True, slots=True)
class Tiling:
    """block: queries and keys at a time. parts: programs that share the blocks of a row's head."""

    block: int
    parts: int
    warps: int = 4
    stages: int = 2


@dataclass(frozen=True, slots=True)
class RowVectors:
    """Where the kernels find the vectors that each row's adapter has for a layer.

    table: int64 [slots, columns]. rows, owners: int32, the slot of every row and of every position,
    -1 for padding. scale, bias: the columns of the table with the addresses of float32 [L, 3n + f]
    and [L, 4n + f], as in `VectorTuning.shapes`. first, end: the columns with the range of the L
    layers. intermediate_size: f.
    """

    table: Tensor
    layer: int
    rows: Tensor
    owners: Tensor
    scale: int
    bias: int
    first: int
    end: int
    intermediate_size: int

    def constants(self, n: int) -> dict[str, Any]:
        """What kernels are compiled for."""
        return {
            "TUNED": True,
            "BIAS": int(self.bias),
            "FIRST": int(self.first),
            "END": int(self.end),
            "BIASES": 4 * n + self.intermediate_size,
        }


_UNTUNED = {"TUNED": False, "BIAS": 0, "FIRST": 0, "END": 0, "BIASES": 0}


@runtime_checkable
class FusedTuning(LayerTuning, Protocol):
    """A `LayerTuning` whose vectors the kernels of a fused layer can apply."""

    @property
    def vectors(self) -> RowVectors | None:
        """What attention and norms apply; None: nothing."""
        ...

    def without_vectors(self) -> LayerTuning:
        """The other changes."""
        ...

    def up_to_activated(self, output: Tensor, *, near: bool = False) -> Tensor:
        """The vectors of `up`, GELU, and `activated`: [T, f] -> [T, f].

        Args:
            near: by `triton_float8.gelu`, instead of the exact one.
        """
        ...

    @property
    def between(self) -> bool:
        """Whether it changes or reads anything from `up` to `down`, but for the bias of `down`."""
        ...


class FusedLayer:
    """A layer's weights as the kernels want them (`adapters.layers.bert.TunableLayer`)."""

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

    def forward_tuned(self, states: Tensor, layout: Extents, tuning: LayerTuning) -> Tensor:
        """With the adapters' changes: [T, n] -> [T, n]."""
        with torch.cuda.device_of(states):
            attended = self._attended_tuned(states, layout, tuning)
            return self._finish_tuned(attended, states, tuning)

    def read_tuned(
        self, states: Tensor, positions: Tensor, layout: Extents, tuning: LayerTuning
    ) -> Tensor:
        """As the last layer, with the adapters' changes: [T, n] -> [positions, n]."""
        with torch.cuda.device_of(states):
            attended = self._attended_tuned(states, layout, tuning).index_select(0, positions)
            residual = states.index_select(0, positions)
            return self._finish_tuned(attended, residual, tuning.select(positions))

    def _attended(self, states: Tensor, layout: Extents) -> Tensor:
        """[T, n] -> [T, heads * d]"""
        projected = functional.linear(states, self._weight, self._bias)
        projected = projected.view(len(states), 3, self._heads, self._size)
        return attend(projected, layout.cumulative, longest=layout.longest)

    def _attended_tuned(self, states: Tensor, layout: Extents, tuning: LayerTuning) -> Tensor:
        """[T, n] -> [T, heads * d]"""
        tuning, vectors, _ = split_tuning(tuning)
        projected = functional.linear(states, self._weight, self._bias)
        projected = tuning.projection(states, projected)
        projected = projected.view(len(states), 3, self._heads, self._size)
        return attend(projected, layout.cumulative, longest=layout.longest, vectors=vectors)

    def _finish(self, attended: Tensor, residual: Tensor) -> Tensor:
        """After attention: [positions, heads * d], [positions, n] -> [positions, n]"""
        states = add_norm(self._attention.dense(attended), residual, self._attention.LayerNorm)
        wide = self._activate(self._intermediate.dense(states))
        return add_norm(self._output.dense(wide), states, self._output.LayerNorm)

    def _finish_tuned(self, attended: Tensor, residual: Tensor, tuning: LayerTuning) -> Tensor:
        """After attention: [positions, heads * d], [positions, n] -> [positions, n]"""
        others, vectors, up_to_activated = split_tuning(tuning)
        dense = others.dense(attended, self._attention.dense(attended))
        states = add_norm(dense, residual, self._attention.LayerNorm)
        wide = self._intermediate.dense(states)
        if up_to_activated is None or not self._exact_gelu:
            wide = tuning.activated(self._activate(tuning.up(states, wide)))
        else:
            wide = up_to_activated(others.up(states, wide))
        output = others.down(wide, self._output.dense(wide))
        return add_norm(output, states, self._output.LayerNorm, vectors=vectors)

    def _activate(self, wide: Tensor) -> Tensor:
        if self._exact_gelu:
            activated: Tensor = torch.ops.aten.gelu_(wide)
        else:
            activated = self._intermediate.intermediate_act_fn(wide)
        return activated


def split_tuning(
    tuning: LayerTuning,
) -> tuple[LayerTuning, RowVectors | None, Callable[..., Tensor] | None]:
    """What to call at the sites, what the kernels apply, and the activation that goes with it."""
    if isinstance(tuning, FusedTuning) and (vectors := tuning.vectors) is not None:
        return tuning.without_vectors(), vectors, tuning.up_to_activated
    return tuning, None, None


def attend(
    projected: Tensor,
    cumulative: Tensor,
    *,
    longest: int,
    tiling: Tiling | None = None,
    vectors: RowVectors | None = None,
) -> Tensor:
    """softmax(Q K^T / sqrt(d)) V within every row.

    Args:
        projected: [T, 3, heads, d], queries, keys and values; d at most `MAX_HEAD_SIZE`.
        cumulative: int32 [rows + 1], where rows start, and the end; rows may be empty.
        longest: no row has more tokens.
        tiling: None chooses one; it never changes the result.
        vectors: scales and biases of queries, keys and values.

    Returns:
        [T, heads * d]; undefined after the last row.
    """
    tokens, _, heads, size = projected.shape
    tiling = tiling or tiling_of(len(cumulative) - 1, heads, longest)
    assert projected.is_contiguous(), projected.stride()
    assert size <= MAX_HEAD_SIZE, size
    n = heads * size
    # A product of blocks is at least 16 wide.
    depth = max(16, triton.next_power_of_2(size))
    options: dict[str, int] = {}
    if vectors is not None and depth <= _LIMITED_DEPTH:
        options["maxnreg"] = _TUNED_REGISTERS
    out = torch.empty(tokens, n, dtype=projected.dtype, device=projected.device)
    triton_layer.attend[(heads, len(cumulative) - 1, tiling.parts)](
        *projected.unbind(1),
        projected.stride(0),
        cumulative,
        out,
        size**-0.5 * math.log2(math.e),
        *(
            (None, None, 0, 0)
            if vectors is None
            else (vectors.rows, vectors.table, vectors.table.stride(0), vectors.layer)
        ),
        SIZE=size,
        DEPTH=depth,
        BLOCK=tiling.block,
        SCALE=0 if vectors is None else int(vectors.scale),
        SCALES=0 if vectors is None else 3 * n + vectors.intermediate_size,
        **_UNTUNED if vectors is None else vectors.constants(n),
        num_warps=tiling.warps,
        num_stages=tiling.stages,
        **options,
    )
    return out


def tiling_of(rows: int, heads: int, longest: int) -> Tiling:
    block = 64 if longest > 32 else 32
    blocks = triton.cdiv(longest, block)
    # Of many rows few are long: most programs for the longest row's blocks would have no work.
    return Tiling(block, max(1, min(blocks, _PROGRAMS // (rows * heads))))


def add_norm(
    states: Tensor,
    residual: Tensor,
    norm: nn.LayerNorm,
    *,
    warps: int = 4,
    vectors: RowVectors | None = None,
    narrow: NarrowRows | None = None,
    bound: Bound | None = None,
) -> Tensor:
    """norm(states + residual), of [T, n] each.

    Args:
        vectors: the bias of `down` is added as well.
        narrow: gets the result in float8, too.
        bound: of what comes next, if `narrow` has scales for that.
    """
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
        *(
            (None, None, 0, 0)
            if vectors is None
            else (vectors.owners, vectors.table, vectors.table.stride(0), vectors.layer)
        ),
        *((None, None, None) if narrow is None else _pointers(narrow)),
        *((0.0, 0.0) if bound is None else (bound.slope, bound.most)),
        N=n,
        NARROW=narrow is not None,
        BOUNDED=bound is not None,
        OFFSET=0 if vectors is None else 3 * n + vectors.intermediate_size,
        **_UNTUNED if vectors is None else vectors.constants(n),
        COLUMNS=triton.next_power_of_2(n),
        num_warps=warps,
    )
    return out


def _pointers(narrow: NarrowRows) -> tuple[Tensor, Tensor, Tensor | None]:
    return narrow.values, narrow.scales, narrow.wide_scales


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
