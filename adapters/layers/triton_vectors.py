"""Triton kernels for vectors in training; `adapters.layers.vectors` launches them.

Compiled when a CUDA device first runs them. They compute in float32 and round once.
"""

import triton
import triton.language as tl


@triton.jit
def _cdf(value):
    """Of the normal distribution: the exact GELU is value times it."""
    return 0.5 * (1.0 + tl.erf(value * 0.7071067811865476))


@triton.jit(do_not_specialize=["positions"])
def shift(
    states,
    factor,
    bias,
    after,
    out,
    positions,
    WIDTH: tl.constexpr,
    GELU: tl.constexpr,
    AFTER: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """y factor + bias, then GELU, then times `after`, as far as each is wanted."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    wide = columns < WIDTH
    here = (rows < positions)[:, None] & wide[None, :]
    places = rows.to(tl.int64)[:, None] * WIDTH + columns[None, :]
    value = tl.load(states + places, mask=here, other=0.0).to(tl.float32)
    value *= tl.load(factor + columns, mask=wide, other=0.0)[None, :]
    value += tl.load(bias + columns, mask=wide, other=0.0)[None, :]
    if GELU:
        value *= _cdf(value)
    if AFTER:
        value *= tl.load(after + columns, mask=wide, other=0.0)[None, :]
    tl.store(out + places, value.to(out.dtype.element_ty), mask=here)


@triton.jit(do_not_specialize=["positions"])
def unshift(
    gradient,
    states,
    factor,
    bias,
    after,
    below,
    sums,
    positions,
    WIDTH: tl.constexpr,
    GELU: tl.constexpr,
    AFTER: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEPS: tl.constexpr,
):
    """The gradients of `shift`: of y, and of the vectors summed over this program's positions.

    sums: float32 [2 or 3, programs, WIDTH], for factor, bias and `after`; added up later, always in
    the same order.
    """
    part = tl.program_id(0)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    wide = columns < WIDTH
    scale = tl.load(factor + columns, mask=wide, other=0.0)[None, :]
    if GELU:
        shifts = tl.load(bias + columns, mask=wide, other=0.0)[None, :]
    if AFTER:
        last = tl.load(after + columns, mask=wide, other=0.0)[None, :]
        of_after = tl.zeros([ROWS, COLUMNS], tl.float32)
    # Summed over rows at the end: threads must meet for that.
    of_factor = tl.zeros([ROWS, COLUMNS], tl.float32)
    of_bias = tl.zeros([ROWS, COLUMNS], tl.float32)
    for step in range(STEPS):
        rows = (part * STEPS + step) * ROWS + tl.arange(0, ROWS)
        here = (rows < positions)[:, None] & wide[None, :]
        places = rows.to(tl.int64)[:, None] * WIDTH + columns[None, :]
        slope = tl.load(gradient + places, mask=here, other=0.0).to(tl.float32)
        value = tl.load(states + places, mask=here, other=0.0).to(tl.float32)
        if GELU:
            shifted = value * scale + shifts
            share = _cdf(shifted)
            if AFTER:
                of_after += slope * shifted * share
                slope *= last
            slope *= share + shifted * tl.exp(-0.5 * shifted * shifted) * 0.3989422804014327
        of_factor += slope * value
        of_bias += slope
        tl.store(below + places, (slope * scale).to(below.dtype.element_ty), mask=here)
    parts = tl.num_programs(0)
    tl.store(sums + part * WIDTH + columns, tl.sum(of_factor, 0), mask=wide)
    tl.store(sums + (parts + part) * WIDTH + columns, tl.sum(of_bias, 0), mask=wide)
    if AFTER:
        tl.store(sums + (2 * parts + part) * WIDTH + columns, tl.sum(of_after, 0), mask=wide)
