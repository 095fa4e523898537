"""Triton kernels for a transformer layer; `adapters.layers.fused` launches them.

Compiled when a CUDA device first runs them.
"""

import triton
import triton.language as tl


@triton.jit
def add_norm(states, residual, weight, bias, out, eps, N: tl.constexpr, COLUMNS: tl.constexpr):
    """LayerNorm of a sum, one program for each token; only the result is rounded."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, COLUMNS)
    here = columns < N
    total = tl.load(states + token * N + columns, mask=here, other=0.0).to(tl.float32)
    total += tl.load(residual + token * N + columns, mask=here, other=0.0).to(tl.float32)
    # Centred before it is squared: the difference of two large sums would lose its digits.
    centred = tl.where(here, total - tl.sum(total, 0) / N, 0.0)
    normal = centred * tl.rsqrt(tl.sum(centred * centred, 0) / N + eps)
    scale = tl.load(weight + columns, mask=here, other=0.0).to(tl.float32)
    shift = tl.load(bias + columns, mask=here, other=0.0).to(tl.float32)
    value = normal * scale + shift
    tl.store(out + token * N + columns, value.to(out.dtype.element_ty), mask=here)


@triton.jit
def attend(
    queries,
    keys,
    values,
    stride,
    cumulative,
    out,
    scale,
    SIZE: tl.constexpr,
    DEPTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One head of one row; the programs of a row share its blocks of queries.

    Blocks are counted from the row's own start, so that a row's result does not depend on its
    neighbours. `scale` includes log2(e), since the softmax uses powers of two.
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
        tl.store(out + place, mixed.to(out.dtype.element_ty), mask=asked)
        first += tl.num_programs(2) * BLOCK
