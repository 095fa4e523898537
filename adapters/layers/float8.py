"""A BERT-like layer on a CUDA device whose products are in float8 (e4m3).

    x W^T = (product of values) * scale of the row * scale of the output

Weights are quantised once, each output by its own scale; activations in every batch, each row by
its own, inside the kernel that makes them:

    norm -> row -> queries, keys, values -> attention -> row -> dense -> norm -> row -> up, GELU ->
        row -> down -> norm -> row

Between products everything is as in `adapters.layers.fused`: attention, norms and residuals, and
what adapters change, in the type of the states.

The product that makes GELU's input also quantises its result, so the scale must be known before
any of the row's numbers is. The norm knows a bound: no output is larger than the norm of the row
times that of the longest row of W (Cauchy and Schwarz), and GELU makes nothing larger. The bound is
some times too large; float8 has an exponent for that. Where an adapter changes what goes into GELU
or comes out of it, that is another kernel, whose scale is the bound as well, or what the row needs.
"""

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor, nn
from triton.tools.tensor_descriptor import TensorDescriptor

from adapters.layers import triton_float8
from adapters.layers.fused import FusedTuning, add_norm, attend, split_tuning, tiling_of
from adapters.layers.narrow import Bound, Handover, NarrowRows
from adapters.layers.tuning import LayerTuning
from adapters.packed.layout import Extents

# Quantising lengthens a row by 1/16 at most, and a rounded product is longer by less than 1/100.
_SLACK = 1.08
# What decides the tiles of a product, from measurements on an H200: positions, programs, and rounds
# of programs over all multiprocessors with the share of these that work in the last one.
_FEW, _SOME, _PROGRAMS, _ROUNDS, _BUSY = 256, 768, 400, 2.4, 0.8
# Rows with which products are tried.
_TRIED = 8192
# Attention takes blocks of 64 from here on.
_LEAST_LONGEST = 33
# Bytes of shared memory that the largest tiles take at most.
_ROOM = 220 * 1024
# Of a product in bfloat16, as a share of its norm.
_ROUNDING = 0.01
_LARGEST = 448.0
# Of the norm's programs, which also quantise.
_WARPS = 2


@dataclass(frozen=True, slots=True)
class Tiles:
    """Of a product; they never change the result.

    looping: programs of a multiprocessor, each of which computes many tiles; None: one each.
    """

    rows: int
    outputs: int
    inputs: int = 128
    warps: int = 4
    stages: int = 3
    registers: int | None = None
    looping: int | None = None

    def count(self, positions: int, outputs: int) -> int:
        return math.ceil(positions / self.rows) * math.ceil(outputs / self.outputs)


class Float8Linear:
    """One or more `nn.Linear` with the same input as one product.

    factors, bias: float32 [outputs].
    """

    def __init__(self, *linears: nn.Linear) -> None:
        weight = torch.cat([linear.weight for linear in linears]).detach().float()
        self._factors = weight.abs().amax(dim=1).clamp(min=1e-20) / _LARGEST
        self._weight = (weight / self._factors.unsqueeze(1)).to(torch.float8_e4m3fn)
        self._bias = torch.cat([linear.bias for linear in linears]).detach().float()
        self.outputs, self.inputs = self._weight.shape

    def bound(self) -> Bound:
        """Of what comes out for a row."""
        lengths = (self._weight.float() * self._factors.unsqueeze(1)).norm(dim=1)
        slope, most = torch.stack([lengths.max(), self._bias.abs().max()]).tolist()
        return Bound(slope * _SLACK, most * _SLACK)

    def __call__(self, rows: NarrowRows, dtype: torch.dtype, tiles: Tiles | None = None) -> Tensor:
        """[T, outputs]"""
        out = torch.empty(len(rows.values), self.outputs, dtype=dtype, device=rows.values.device)
        self._multiply(rows, out, None, dtype, tiles)
        return out

    def activated(
        self, rows: NarrowRows, dtype: torch.dtype, tiles: Tiles | None = None
    ) -> NarrowRows:
        """GELU (`triton_float8.gelu`), rounded to `dtype`, and that by `rows.wide_scales`."""
        assert rows.wide_scales is not None
        out = torch.empty(
            len(rows.values), self.outputs, dtype=rows.values.dtype, device=rows.values.device
        )
        self._multiply(rows, out, rows.wide_scales, dtype, tiles)
        return NarrowRows(out, rows.wide_scales)

    def check(self, *, activated: bool) -> None:
        """
        Args:
            activated: also what `activated` gives.

        Raises:
            RuntimeError: as of `Float8Layer.check`.
        """
        device, dtype = self._weight.device, torch.bfloat16
        random = torch.Generator().manual_seed(0)
        states = torch.randn(_TRIED, self.inputs, generator=random).to(device, dtype)
        bound, rows = self.bound(), quantised(states)
        wide = (states.float().norm(dim=1) * bound.slope + bound.most) / _LARGEST
        several = _FEW
        exact = (rows.values[:several].float() * rows.scales[:several].unsqueeze(1)) @ (
            self._weight.float() * self._factors.unsqueeze(1)
        ).T + self._bias
        first: list[Tensor] = []
        for tiles in all_tiles(device):
            for count in (_TRIED, 1):
                few = NarrowRows(rows.values[:count], rows.scales[:count], wide[:count])
                found = [self(few, dtype, tiles)]
                if activated:
                    found.append(self.activated(few, dtype, tiles).values.float())
                if not first:
                    first = found
                    error = float((found[0][:several] - exact).norm() / exact.norm())
                    if not error <= _ROUNDING:
                        raise RuntimeError(f"a product differs from PyTorch's by {error:.2g} of it")
                for one, other in zip(first, found, strict=True):
                    if not torch.equal(one[:count], other):
                        raise RuntimeError("a row of a product depends on the number of rows")

    def _multiply(
        self,
        rows: NarrowRows,
        out: Tensor,
        out_scales: Tensor | None,
        dtype: torch.dtype,
        tiles: Tiles | None,
    ) -> None:
        positions = len(out)
        tiles = tiles or tiles_of(positions, self.outputs, out.device)
        options = {} if tiles.registers is None else {"maxnreg": tiles.registers}
        grid = tiles.count(positions, self.outputs)
        if tiles.looping is not None:
            grid = min(grid, tiles.looping * _multiprocessors(out.device))
        triton_float8.multiply[(grid,)](
            TensorDescriptor.from_tensor(rows.values, [tiles.rows, tiles.inputs]),
            TensorDescriptor.from_tensor(self._weight, [tiles.outputs, tiles.inputs]),
            rows.scales,
            self._factors,
            self._bias,
            TensorDescriptor.from_tensor(out, [tiles.rows, tiles.outputs]),
            out_scales,
            positions,
            self.outputs,
            INPUTS=self.inputs,
            BLOCK_M=tiles.rows,
            BLOCK_N=tiles.outputs,
            BLOCK_K=tiles.inputs,
            GROUP=8,
            GELU=out_scales is not None,
            ROUNDED=_TYPES[dtype],
            LOOP=tiles.looping is not None,
            num_warps=tiles.warps,
            num_stages=tiles.stages,
            **options,
        )


_TYPES = {
    torch.bfloat16: triton.language.bfloat16,
    torch.float16: triton.language.float16,
    torch.float32: triton.language.float32,
}


_FEW_TILES = Tiles(64, 32, inputs=256)
_SOME_TILES = Tiles(64, 64, stages=4)
_MORE_TILES = Tiles(64, 128, registers=128)
_MANY_TILES = Tiles(128, 256, warps=8, looping=1)
# Where a program has less room.
_SMALL_TILES = (Tiles(64, 32), Tiles(128, 128, inputs=64, warps=8))


def tiles_of(positions: int, outputs: int, device: torch.device) -> Tiles:
    if not _has_room(device):
        return _SMALL_TILES[positions > _FEW]
    # Few rows are as quick as the weight is read, by as many programs as can share it.
    if positions <= _FEW and _FEW_TILES.count(positions, outputs) <= _PROGRAMS:
        return _FEW_TILES
    if positions <= _SOME and _SOME_TILES.count(positions, outputs) <= _PROGRAMS:
        return _SOME_TILES
    # The largest tiles read least, unless many multiprocessors have none in the last round.
    rounds = _MANY_TILES.count(positions, outputs) / _multiprocessors(device)
    if rounds > _ROUNDS or rounds / math.ceil(rounds) > _BUSY:
        return _MANY_TILES
    return _MORE_TILES


def all_tiles(device: torch.device) -> tuple[Tiles, ...]:
    """Every result of `tiles_of`."""
    if not _has_room(device):
        return _SMALL_TILES
    return _FEW_TILES, _SOME_TILES, _MORE_TILES, _MANY_TILES


@cache
def _has_room(device: torch.device) -> bool:
    """Whether a program has room for large tiles: on Hopper, but not on Ada."""
    if device.type == "cpu":
        # Triton interprets the kernels.
        return True
    properties = torch.cuda.get_device_properties(device)
    return int(getattr(properties, "shared_memory_per_block_optin", 0)) >= _ROOM


@cache
def _multiprocessors(device: torch.device) -> int:
    if device.type == "cpu":
        return 3  # any number will do
    return torch.cuda.get_device_properties(device).multi_processor_count


def quantised(states: Tensor, *, least: Tensor | None = None, gelu: bool = False) -> NarrowRows:
    """[T, n] -> each row times its own scale.

    Args:
        least: scales are not smaller than these, float32 [T].
        gelu: GELU of the states (`triton_float8.gelu`), in place, and that in float8.
    """
    assert states.stride(1) == 1, states.stride()
    positions, width = states.shape
    rows = NarrowRows.empty(positions, width, states.device)
    triton_float8.quantise[(positions,)](
        states,
        states.stride(0),
        rows.values,
        rows.scales,
        least,
        N=width,
        COLUMNS=triton.next_power_of_2(width),
        GELU=gelu,
        BOUNDED=least is not None,
        num_warps=4 if width <= 1024 else 8,
    )
    return rows


class Float8Layer:
    """A layer's quantised weights (`adapters.layers.bert.TunableLayer`).

    Args:
        handover: shared by the layers of a backbone.
    """

    def __init__(self, layer: Any, handover: Handover) -> None:
        own = layer.attention.self
        linears = (
            *(own.query, own.key, own.value, layer.attention.output.dense),
            *(layer.intermediate.dense, layer.output.dense),
        )
        self.copied: tuple[nn.Linear, ...] = linears
        self._handover = handover
        self._heads, self._size = own.num_attention_heads, own.attention_head_size
        self._projection = Float8Linear(*linears[:3])
        self._dense, self._up, self._down = (Float8Linear(linear) for linear in linears[3:])
        self._inner_norm, self._outer_norm = (
            layer.attention.output.LayerNorm,
            layer.output.LayerNorm,
        )
        self._activation = layer.intermediate.intermediate_act_fn
        self._exact_gelu = own.config.hidden_act == "gelu"
        self._bound = self._up.bound() if self._exact_gelu else None

    def forward(self, states: Tensor, layout: Extents) -> Tensor:
        """[T, n] -> [T, n]"""
        # Triton launches on the thread's current device, not on its arguments' device.
        with torch.cuda.device_of(states):
            return self._handed(*self._finish(self._attended(states, layout), states))

    def read(self, states: Tensor, positions: Tensor, layout: Extents) -> Tensor:
        """As the last layer: [T, n] -> [positions, n]."""
        with torch.cuda.device_of(states):
            attended = self._attended(states, layout).index_select(0, positions)
            return self._finish(attended, states.index_select(0, positions))[0]

    def forward_tuned(self, states: Tensor, layout: Extents, tuning: LayerTuning) -> Tensor:
        """With the adapters' changes: [T, n] -> [T, n]."""
        with torch.cuda.device_of(states):
            attended = self._attended(states, layout, tuning)
            return self._handed(*self._finish(attended, states, tuning))

    def read_tuned(
        self, states: Tensor, positions: Tensor, layout: Extents, tuning: LayerTuning
    ) -> Tensor:
        """As the last layer, with the adapters' changes: [T, n] -> [positions, n]."""
        with torch.cuda.device_of(states):
            attended = self._attended(states, layout, tuning).index_select(0, positions)
            residual = states.index_select(0, positions)
            return self._finish(attended, residual, tuning.select(positions))[0]

    def check(self) -> None:
        """Try its products with random rows, few and many.

        Raises:
            RuntimeError: they are not those of PyTorch, or depend on the number of rows.
            Exception: of any kind, if kernels cannot be compiled or launched.
        """
        with torch.inference_mode():
            for linear in (self._projection, self._dense, self._up, self._down):
                linear.check(activated=linear is self._up and self._exact_gelu)

    def _handed(self, states: Tensor, rows: NarrowRows) -> Tensor:
        self._handover.put(states, rows)
        return states

    def _attended(
        self, states: Tensor, layout: Extents, tuning: LayerTuning | None = None
    ) -> Tensor:
        """[T, n] -> [T, heads * d]"""
        narrow = self._handover.take(states)
        projected = self._projection(quantised(states) if narrow is None else narrow, states.dtype)
        vectors = None
        if tuning is not None:
            others, vectors, _ = split_tuning(tuning)
            projected = others.projection(states, projected)
        projected = projected.view(len(states), 3, self._heads, self._size)
        rows = len(layout.cumulative) - 1
        # Always blocks of one size: other blocks may round a sum to its neighbour.
        tiling = tiling_of(rows, self._heads, max(layout.longest, _LEAST_LONGEST))
        return attend(
            projected, layout.cumulative, longest=layout.longest, tiling=tiling, vectors=vectors
        )

    def _finish(
        self, attended: Tensor, residual: Tensor, tuning: LayerTuning | None = None
    ) -> tuple[Tensor, NarrowRows]:
        """After attention: [positions, heads * d], [positions, n] -> [positions, n], twice."""
        dtype, size = residual.dtype, (len(residual), residual.shape[1])
        dense = self._dense(quantised(attended), dtype)
        vectors = None
        if tuning is not None:
            others, vectors, _ = split_tuning(tuning)
            dense = others.dense(attended, dense)
        rows = NarrowRows.empty(*size, residual.device, wide=self._bound is not None)
        states = add_norm(
            dense, residual, self._inner_norm, warps=_WARPS, narrow=rows, bound=self._bound
        )
        if tuning is None or (isinstance(tuning, FusedTuning) and not tuning.between):
            output = self._down(self._activated(rows, dtype), dtype)
        else:
            output = self._feed_forward_tuned(states, rows, tuning)
        finished = NarrowRows.empty(*size, residual.device)
        states = add_norm(
            output, states, self._outer_norm, warps=_WARPS, vectors=vectors, narrow=finished
        )
        return states, finished

    def _activated(self, rows: NarrowRows, dtype: torch.dtype) -> NarrowRows:
        """What `up` and the activation make of rows: [positions, f]."""
        if self._exact_gelu:
            return self._up.activated(rows, dtype)
        return quantised(self._activation(self._up(rows, dtype)))

    def _feed_forward_tuned(self, states: Tensor, rows: NarrowRows, tuning: LayerTuning) -> Tensor:
        """With the adapters' changes, but for those of `add_norm`: [positions, n] twice -> once."""
        others, _, up_to_activated = split_tuning(tuning)
        wide, gelu = others.up(states, self._up(rows, states.dtype)), False
        if self._exact_gelu and up_to_activated is not None:
            wide = up_to_activated(wide, near=True)
        elif self._exact_gelu and isinstance(tuning, FusedTuning):
            # Without vectors nothing else changes it.
            gelu = True
        else:
            wide = tuning.activated(self._activation(wide))
        narrow = quantised(wide, least=rows.wide_scales, gelu=gelu)
        return others.down(wide, self._down(narrow, states.dtype))
