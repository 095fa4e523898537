"""Triton kernels for a transformer layer; `adapters.layers.fused` launches them.

Compiled when a CUDA device first runs them.
"""

import triton
import triton.language as tl

from adapters.layers.triton_float8 import LARGEST, narrowed, scale_of


@triton.jit
def _vectors_of(
    table,
    table_stride,
    slot,
    layer,
    COLUMN: tl.constexpr,
    FIRST: tl.constexpr,
    END: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Where a slot's vectors for a layer start, and whether it has any."""
    entry = table + tl.maximum(slot, 0).to(tl.int64) * table_stride
    address = tl.load(entry + COLUMN)
    first = tl.load(entry + FIRST)
    tuned = (slot >= 0) & (address != 0) & (layer >= first) & (layer < tl.load(entry + END))
    # Without the hint, an address from memory is read in small pieces (`bank._ALIGNMENT`).
    vectors = tl.multiple_of(address.to(tl.pointer_type(tl.float32)), 16)
    return vectors + (layer - first) * WIDTH, tuned


@triton.jit(do_not_specialize=["layer"])
def add_norm(
    states,
    residual,
    weight,
    bias,
    out,
    eps,
    owners,
    table,
    table_stride,
    layer,
    values,
    scales,
    wide_scales,
    slope,
    most,
    N: tl.constexpr,
    COLUMNS: tl.constexpr,
    TUNED: tl.constexpr,
    BIAS: tl.constexpr,
    FIRST: tl.constexpr,
    END: tl.constexpr,
    OFFSET: tl.constexpr,
    BIASES: tl.constexpr,
    NARROW: tl.constexpr,
    BOUNDED: tl.constexpr,
):
    """LayerNorm of a sum, one program for each token; only the result is rounded.

    TUNED: the token's slot adds a bias of its own, from OFFSET on among a layer's BIASES.
    NARROW: also the rounded result in float8, as values times a scale. BOUNDED: and a scale for
    numbers of at most its norm times `slope`, plus `most`.
    """
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, COLUMNS)
    here = columns < N
    total = tl.load(states + token * N + columns, mask=here, other=0.0).to(tl.float32)
    total += tl.load(residual + token * N + columns, mask=here, other=0.0).to(tl.float32)
    if TUNED:
        biases, tuned = _vectors_of(
            table, table_stride, tl.load(owners + token), layer, BIAS, FIRST, END, BIASES
        )
        total += tl.load(biases + OFFSET + columns, mask=here & tuned, other=0.0)
    # Centred before it is squared: the difference of two large sums would lose its digits.
    centred = tl.where(here, total - tl.sum(total, 0) / N, 0.0)
    normal = centred * tl.rsqrt(tl.sum(centred * centred, 0) / N + eps)
    scale = tl.load(weight + columns, mask=here, other=0.0).to(tl.float32)
    shift = tl.load(bias + columns, mask=here, other=0.0).to(tl.float32)
    value = (normal * scale + shift).to(out.dtype.element_ty)
    tl.store(out + token * N + columns, value, mask=here)
    if NARROW:
        row = value.to(tl.float32)
        narrow = scale_of(row)
        tl.store(values + token * N + columns, narrowed(row, narrow), mask=here)
        tl.store(scales + token, narrow)
        if BOUNDED:
            bound = tl.sqrt(tl.sum(row * row, 0)) * slope + most
            tl.store(wide_scales + token, bound / LARGEST)


@triton.jit(do_not_specialize=["layer"])
def attend(
    queries,
    keys,
    values,
    stride,
    cumulative,
    out,
    scale,
    rows,
    table,
    table_stride,
    layer,
    SIZE: tl.constexpr,
    DEPTH: tl.constexpr,
    BLOCK: tl.constexpr,
    TUNED: tl.constexpr,
    SCALE: tl.constexpr,
    BIAS: tl.constexpr,
    FIRST: tl.constexpr,
    END: tl.constexpr,
    SCALES: tl.constexpr,
    BIASES: tl.constexpr,
):
    """One head of one row; the programs of a row share its blocks of queries.

    Blocks are counted from the row's own start, so that a row's result does not depend on its
    neighbours. `scale` includes log2(e), since the softmax uses powers of two.

    TUNED: the row's slot may have vectors. The scale of the keys multiplies the queries instead.
    The bias of the keys adds the same to all scores of a query, which the softmax cancels. The
    shares of a query sum to one, so what the values get can wait for their weighted sum.
    """
    head = tl.program_id(0)
    row = tl.program_id(1)
    start = tl.load(cumulative + row)
    length = tl.load(cumulative + row + 1) - start
    depth = tl.arange(0, DEPTH)
    deep = depth < SIZE
    column = head * SIZE + depth
    first = tl.program_id(2) * BLOCK
    # Rows that are empty or shorter end here, as most programs of a graph for long rows do.
    while first < length:
        within = first + tl.arange(0, BLOCK)
        token = (start + within).to(tl.int64)
        asked = (within < length)[:, None] & deep[None, :]
        query = tl.load(queries + token[:, None] * stride + column[None, :], mask=asked, other=0.0)
        if TUNED:
            # Here, not before the loop: what is kept in registers keeps other programs out.
            n = tl.num_programs(0) * SIZE
            slot = tl.load(rows + row)
            scales, tuned = _vectors_of(table, table_stride, slot, layer, SCALE, FIRST, END, SCALES)
            biases, _ = _vectors_of(table, table_stride, slot, layer, BIAS, FIRST, END, BIASES)
            changed = deep & tuned
            query_scale = 1.0 + tl.load(scales + column, mask=changed, other=0.0)
            key_scale = 1.0 + tl.load(scales + n + column, mask=changed, other=0.0)
            query_bias = tl.load(biases + column, mask=changed, other=0.0)
            query = query.to(tl.float32) * query_scale[None, :] + query_bias[None, :]
            query = (query * key_scale[None, :]).to(queries.dtype.element_ty)
        highest = tl.full([BLOCK], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK], tl.float32)
        mixed = tl.zeros([BLOCK, DEPTH], tl.float32)
        other = 0
        while other < length:
            across = other + tl.arange(0, BLOCK)
            known = across < length
            # Never read other rows or the padding: zero times NaN is NaN.
            place = (start + across).to(tl.int64)[:, None] * stride + column[None, :]
            valid = known[:, None] & deep[None, :]
            key = tl.load(keys + place, mask=valid, other=0.0)
            value = tl.load(values + place, mask=valid, other=0.0)
            scores = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
            scores = tl.where(known[None, :], scores, float("-inf"))
            higher = tl.maximum(highest, tl.max(scores, 1))
            share = tl.exp2(scores - higher[:, None])
            shrunk = tl.exp2(highest - higher)
            total = total * shrunk + tl.sum(share, 1)
            mixed = tl.dot(
                share.to(value.dtype), value, mixed * shrunk[:, None], input_precision="ieee"
            )
            highest = higher
            other += BLOCK
        # [T, heads, SIZE], without gaps.
        place = token[:, None] * (tl.num_programs(0) * SIZE) + column[None, :]
        mixed = mixed / total[:, None]
        if TUNED:
            changed = deep & tuned
            value_scale = 1.0 + tl.load(scales + 2 * n + column, mask=changed, other=0.0)
            value_bias = tl.load(biases + 2 * n + column, mask=changed, other=0.0)
            mixed = mixed * value_scale[None, :] + value_bias[None, :]
        tl.store(out + place, mixed.to(out.dtype.element_ty), mask=asked)
        first += tl.num_programs(2) * BLOCK
