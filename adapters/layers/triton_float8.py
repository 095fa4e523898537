"""Triton kernels for products in float8; `adapters.layers.float8` launches them.

Compiled when a CUDA device first runs them. A row is quantised by itself, from its rounded values,
always by the same arithmetic: so it gets the same bits whichever kernel did it.
"""

import triton
import triton.language as tl

# The largest number of float8_e4m3fn.
LARGEST = tl.constexpr(448.0)
# A row of zeros has a scale, too.
_LEAST = tl.constexpr(1e-20)


@triton.jit
def scale_of(row):
    """Of one row of float32: its largest value becomes `LARGEST`."""
    return tl.maximum(tl.max(tl.abs(row), 0), _LEAST) / LARGEST


@triton.jit
def narrowed(value, scale):
    """A multiple of the scale in float8; what is too large becomes the largest."""
    return (value * (1.0 / scale)).to(tl.float8e4nv)


@triton.jit
def gelu(value):
    """GELU within 4e-5 of the exact one, which rounding to float8 hides, in a third of its time.

    The integral of the normal density from 0, fitted as value * P(value^2) up to 4.3.
    """
    end = tl.minimum(tl.maximum(value, -4.3), 4.3)
    t = end * end
    p = 4.1971847e-11 * t - 4.24879932e-09
    p = p * t + 1.9021776e-07
    p = p * t - 5.00606456e-06
    p = p * t + 8.71166533e-05
    p = p * t - 0.00107138071
    p = p * t + 0.00969513116
    p = p * t - 0.0661555694
    p = p * t + 0.398802067
    return value * (0.5 + end * p)


@triton.jit
def quantise(
    states,
    stride,
    values,
    scales,
    least,
    N: tl.constexpr,
    COLUMNS: tl.constexpr,
    GELU: tl.constexpr,
    BOUNDED: tl.constexpr,
):
    """One row: states [N] -> values [N] times its scale.

    GELU: of the states, which are replaced. BOUNDED: the scale is not smaller than the row's in
    `least`.
    """
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, COLUMNS)
    here = columns < N
    places = states + token * stride + columns
    row = tl.load(places, mask=here, other=0.0).to(tl.float32)
    if GELU:
        rounded = gelu(row).to(states.dtype.element_ty)
        tl.store(places, rounded, mask=here)
        row = rounded.to(tl.float32)
    scale = scale_of(row)
    if BOUNDED:
        scale = tl.maximum(scale, tl.load(least + token))
    tl.store(values + token * N + columns, narrowed(row, scale), mask=here)
    tl.store(scales + token, scale)


@triton.jit
def _tile(
    tile,
    rows,
    weight,
    scales,
    factors,
    bias,
    out,
    out_scales,
    positions,
    outputs,
    INPUTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    GELU: tl.constexpr,
    ROUNDED: tl.constexpr,
):
    along = tl.cdiv(outputs, BLOCK_N)
    # Tiles of GROUP neighbouring blocks of rows are neighbours, so that caches keep their inputs.
    group = tile // (GROUP * along)
    first = group * GROUP
    size = tl.minimum(tl.cdiv(positions, BLOCK_M) - first, GROUP)
    row = (first + tile % size) * BLOCK_M
    column = (tile % (GROUP * along)) // size * BLOCK_N
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, INPUTS, BLOCK_K):
        left = rows.load([row, start])
        right = weight.load([column, start])
        total = tl.dot(left, right.T, total)
    places = row + tl.arange(0, BLOCK_M)
    columns = column + tl.arange(0, BLOCK_N)
    within = places < positions
    wide = columns < outputs
    scale = tl.load(scales + places, mask=within, other=0.0)
    factor = tl.load(factors + columns, mask=wide, other=0.0)
    shift = tl.load(bias + columns, mask=wide, other=0.0)
    value = (total * scale[:, None] * factor[None, :] + shift[None, :]).to(ROUNDED)
    if GELU:
        wanted = tl.load(out_scales + places, mask=within, other=1.0)
        activated = gelu(value.to(tl.float32)).to(ROUNDED).to(tl.float32)
        out.store([row, column], narrowed(activated, wanted[:, None]))
    else:
        out.store([row, column], value)


@triton.jit(do_not_specialize=["positions", "outputs"])
def multiply(
    rows,
    weight,
    scales,
    factors,
    bias,
    out,
    out_scales,
    positions,
    outputs,
    INPUTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    GELU: tl.constexpr,
    ROUNDED: tl.constexpr,
    LOOP: tl.constexpr,
):
    """x W^T * scales * factors + bias, rounded.

    GELU: of that, rounded again, in float8 as a multiple of `out_scales`.
    rows, weight, out: tensor descriptors of [T, INPUTS], [outputs, INPUTS] and [T, outputs].
    ROUNDED: the type to round to.
    LOOP: fewer programs than tiles; each starts to read its next tile while it writes one.

    Every tile sums from the first input to the last, so what a row gets does not depend on the
    number of rows, nor on the size of the tiles.
    """
    if LOOP:
        tiles = tl.cdiv(positions, BLOCK_M) * tl.cdiv(outputs, BLOCK_N)
        for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
            _tile(
                tile,
                rows,
                weight,
                scales,
                factors,
                bias,
                out,
                out_scales,
                positions,
                outputs,
                INPUTS,
                BLOCK_M,
                BLOCK_N,
                BLOCK_K,
                GROUP,
                GELU,
                ROUNDED,
            )
    else:
        _tile(
            tl.program_id(0),
            rows,
            weight,
            scales,
            factors,
            bias,
            out,
            out_scales,
            positions,
            outputs,
            INPUTS,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
            GROUP,
            GELU,
            ROUNDED,
        )
