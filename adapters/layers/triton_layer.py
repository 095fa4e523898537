"""What runs on the device for a transformer layer: see `adapters.layers.fused`, which launches it.

Triton's language, compiled when a CUDA device first runs it. Knows no weights but those of a norm.
"""

import triton
import triton.language as tl


@triton.jit
def add_norm(
    states,
    residual,
    weight,
    bias,
    made,
    eps,
    N: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """LayerNorm of a sum, one program a token: nothing is rounded before the end."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, COLUMNS)
    here = columns < N
    total = tl.load(states + token * N + columns, mask=here, other=0.0).to(tl.float32)
    total += tl.load(residual + token * N + columns, mask=here, other=0.0).to(tl.float32)
    # Centred before it is squared: a difference of two large sums would lose what matters.
    centred = tl.where(here, total - tl.sum(total, 0) / N, 0.0)
    normal = centred * tl.rsqrt(tl.sum(centred * centred, 0) / N + eps)
    scale = tl.load(weight + columns, mask=here, other=0.0).to(tl.float32)
    shift = tl.load(bias + columns, mask=here, other=0.0).to(tl.float32)
    value = normal * scale + shift
    tl.store(made + token * N + columns, value.to(made.dtype.element_ty), mask=here)


@triton.jit
def attend(
    queries,
    keys,
    values,
    stride,
    cumulative,
    made,
    scale,
    SIZE: tl.constexpr,
    DEPTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One head of one row, every so many blocks of queries: blocks are counted from the row's own
    start, so that what a row gets does not depend on what stands beside it. `scale` is for powers
    of two."""
    head = tl.program_id(0)
    row = tl.program_id(1)
    start = tl.load(cumulative + row)
    length = tl.load(cumulative + row + 1) - start
    depth = tl.arange(0, DEPTH)
    deep = depth < SIZE
    column = head * SIZE + depth
    first = tl.program_id(2) * BLOCK
    # A row that is empty or shorter ends here: most programs of a graph for long rows do.
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
            # Other rows' values, or the tail's, must not be read: zero times NaN is NaN.
            place = (start + across).to(tl.int64)[:, None] * stride + column[None, :]
            found = known[:, None] & deep[None, :]
            key = tl.load(keys + place, mask=found, other=0.0)
            value = tl.load(values + place, mask=found, other=0.0)
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
        tl.store(made + place, mixed.to(made.dtype.element_ty), mask=asked)
        first += tl.num_programs(2) * BLOCK
