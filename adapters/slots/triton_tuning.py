"""Triton kernels for what adapters change inside the layers; `adapters.slots.tuning` launches them.

Compiled when a CUDA device first runs them. A program finds the weights of a slot by their address
in the slot table (`adapters.slots.bank.Column`). Products work on tiles, which are positions of one
slot. Elementwise changes work on blocks of neighbouring positions, because a slot's last tile is
seldom full.
"""

import triton
import triton.language as tl

from adapters.layers.triton_float8 import gelu


@triton.jit
def _layer_of(entry, layer, FIRST: tl.constexpr, END: tl.constexpr):
    """Index of the layer among the slot's tuned layers, negative if it is not one of them."""
    first = tl.load(entry + FIRST)
    end = tl.load(entry + END)
    return tl.where(layer < end, layer - first, -1)


@triton.jit
def _vectors(address):
    """Vectors at an address from the table."""
    # Without the hint, an address from memory is read in small pieces (`bank._ALIGNMENT`).
    return tl.multiple_of(address.to(tl.pointer_type(tl.float32)), 16)


@triton.jit(do_not_specialize=["layer", "positions"])
def modulate(
    output,
    stride,
    owners,
    positions,
    table,
    table_stride,
    layer,
    OFFSET: tl.constexpr,
    WIDTH: tl.constexpr,
    SCALES: tl.constexpr,
    BIASES: tl.constexpr,
    WIDE: tl.constexpr,
    SCALE: tl.constexpr,
    BIAS: tl.constexpr,
    ACTIVATED: tl.constexpr,
    FIRST: tl.constexpr,
    END: tl.constexpr,
    SCALED: tl.constexpr,
    SHIFTED: tl.constexpr,
    GELU: tl.constexpr,
    NEAR: tl.constexpr,
    AFTER: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """In place: y (1 + s) + b, then GELU, then y (1 + a), as far as each is wanted.

    A program works on neighbouring positions, slot by slot: most have one slot. Positions without a
    slot, the padding, are left as they are.

    OFFSET: where the site's columns start among a layer's vectors. SCALES, BIASES, WIDE: the widths
    of a layer's s, b and a. NEAR: which GELU (`adapters.layers.triton_float8.gelu`).
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    wide = columns < WIDTH
    here = rows < positions
    slots = tl.load(owners + rows, mask=here, other=-1)
    places = output + rows.to(tl.int64)[:, None] * stride + columns[None, :]
    # Read beside the slots: the vectors are known only three reads later.
    states = tl.load(places, mask=here[:, None] & wide[None, :], other=0.0)
    slot = tl.max(slots, 0)
    while slot >= 0:
        entry = table + slot.to(tl.int64) * table_stride
        index = _layer_of(entry, layer, FIRST, END)
        shifts = tl.load(entry + BIAS)
        tuned = (index >= 0) & (shifts != 0)
        value = states.to(tl.float32)
        if SCALED:
            scales = _vectors(tl.load(entry + SCALE)) + index * SCALES
            value *= 1.0 + tl.load(scales + OFFSET + columns, mask=wide & tuned, other=0.0)[None, :]
        if SHIFTED:
            biases = _vectors(shifts) + index * BIASES
            value += tl.load(biases + OFFSET + columns, mask=wide & tuned, other=0.0)[None, :]
        if GELU and NEAR:
            value = gelu(value)
        elif GELU:
            value = 0.5 * value * (1.0 + tl.erf(value * 0.7071067811865476))
        if AFTER:
            after = tl.load(entry + ACTIVATED)
            factors = _vectors(after) + index * WIDE
            known = wide & tuned & (after != 0)
            value *= 1.0 + tl.load(factors + columns, mask=known, other=0.0)[None, :]
        changed = (slots == slot)[:, None] & wide[None, :]
        tl.store(places, value.to(output.dtype.element_ty), mask=changed)
        slot = tl.max(tl.where(slots < slot, slots, -1), 0)


@triton.jit(do_not_specialize=["layer"])
def shrink(
    inputs,
    inputs_stride,
    tiles,
    table,
    table_stride,
    layer,
    out,
    INPUTS: tl.constexpr,
    A: tl.constexpr,
    FIRST: tl.constexpr,
    END: tl.constexpr,
    WIDTH: tl.constexpr,
    SITES: tl.constexpr,
    RANK: tl.constexpr,
    ALIGNED: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """x A for one of the sites with the same input.

    A: the column of the first of them. WIDTH: the column of r. RANK: at least r; the columns beyond
    r become 0. ALIGNED: every row of A^T starts at a multiple of this many bytes.
    """
    tile = tl.program_id(0)
    site = tl.program_id(1)
    first = tl.load(tiles + tile * 3 + 1)
    end = tl.load(tiles + tile * 3 + 2)
    if first >= end:
        return
    entry = table + tl.load(tiles + tile * 3).to(tl.int64) * table_stride
    address = tl.load(entry + A + site)
    if address == 0:
        return
    index = _layer_of(entry, layer, FIRST, END)
    if index < 0:
        return
    rank = tl.load(entry + WIDTH).to(tl.int32)
    matrix = address.to(tl.pointer_type(inputs.dtype.element_ty)) + index * rank * INPUTS
    rows = (first + tl.arange(0, TILE_ROWS)).to(tl.int64)
    here = rows < end
    columns = tl.arange(0, RANK)
    depth = tl.arange(0, DEPTH)
    total = tl.zeros([TILE_ROWS, RANK], tl.float32)
    for start in range(0, INPUTS, DEPTH):
        k = start + depth
        deep = k < INPUTS
        a = tl.load(
            inputs + rows[:, None] * inputs_stride + k[None, :],
            mask=here[:, None] & deep[None, :],
            other=0.0,
        )
        # Without the hint, an address from memory is read in small pieces.
        places = tl.multiple_of(matrix + columns[None, :] * INPUTS + k[:, None], [ALIGNED, 1])
        b = tl.load(places, mask=deep[:, None] & (columns < rank)[None, :], other=0.0)
        total = tl.dot(a, b, total, input_precision="ieee")
    tl.store(
        out + rows[:, None] * (SITES * RANK) + site * RANK + columns[None, :],
        total.to(out.dtype.element_ty),
        mask=here[:, None],
    )


@triton.jit(do_not_specialize=["layer"])
def widen(
    narrow,
    tiles,
    table,
    table_stride,
    layer,
    output,
    output_stride,
    OUTPUTS: tl.constexpr,
    B: tl.constexpr,
    FIRST: tl.constexpr,
    END: tl.constexpr,
    WIDTH: tl.constexpr,
    SITES: tl.constexpr,
    RANK: tl.constexpr,
    ALIGNED: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """y + h B, in place, for one of the sites, whose outputs are side by side.

    B: the column of the first of them. ALIGNED: as in `shrink`, of B. The programs of a tile share
    its blocks of columns.
    """
    tile = tl.program_id(0)
    site = tl.program_id(2)
    first = tl.load(tiles + tile * 3 + 1)
    end = tl.load(tiles + tile * 3 + 2)
    if first >= end:
        return
    entry = table + tl.load(tiles + tile * 3).to(tl.int64) * table_stride
    address = tl.load(entry + B + site)
    if address == 0:
        return
    index = _layer_of(entry, layer, FIRST, END)
    if index < 0:
        return
    rank = tl.load(entry + WIDTH).to(tl.int32)
    matrix = address.to(tl.pointer_type(output.dtype.element_ty)) + index * rank * OUTPUTS
    rows = (first + tl.arange(0, TILE_ROWS)).to(tl.int64)
    here = rows < end
    inner = tl.arange(0, RANK)
    a = tl.load(
        narrow + rows[:, None] * (SITES * RANK) + site * RANK + inner[None, :],
        mask=here[:, None],
        other=0.0,
    )
    start = tl.program_id(1) * COLUMNS
    while start < OUTPUTS:
        columns = start + tl.arange(0, COLUMNS)
        wide = columns < OUTPUTS
        targets = output + rows[:, None] * output_stride + site * OUTPUTS + columns[None, :]
        known = here[:, None] & wide[None, :]
        states = tl.load(targets, mask=known, other=0.0)
        places = tl.multiple_of(matrix + inner[:, None] * OUTPUTS + columns[None, :], [1, ALIGNED])
        b = tl.load(places, mask=(inner < rank)[:, None] & wide[None, :], other=0.0)
        total = states.to(tl.float32) + tl.dot(a, b, input_precision="ieee")
        tl.store(targets, total.to(output.dtype.element_ty), mask=known)
        start += tl.num_programs(1) * COLUMNS
