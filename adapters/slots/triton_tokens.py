"""Triton kernels for the tokens of every row; `adapters.slots.kernels` launches them.

Compiled when a CUDA device first runs them. A `while` loops over a row's tokens, because their
number is known only at run time; loops over the hidden size have a trip count that is compiled in.
"""

import triton
import triton.language as tl


@triton.jit
def grouped_project(
    source,
    table,
    table_stride,
    tiles,
    out,
    N: tl.constexpr,
    QUERY: tl.constexpr,
    ALIGNED: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """ALIGNED: every row of a matrix starts at a multiple of this many bytes."""
    tile = tl.program_id(0)
    slot = tl.load(tiles + tile * 3).to(tl.int64)
    first = tl.load(tiles + tile * 3 + 1).to(tl.int64)
    end = tl.load(tiles + tile * 3 + 2).to(tl.int64)
    if first >= end:
        return
    rows = first + tl.arange(0, TILE_ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    depth = tl.arange(0, DEPTH)
    here, wide = rows < end, columns < N
    address = tl.load(table + slot * table_stride + QUERY)
    total = tl.zeros([TILE_ROWS, COLUMNS], tl.float32)
    if address != 0:
        matrix = address.to(tl.pointer_type(source.dtype.element_ty))
        for start in range(0, N, DEPTH):
            k = start + depth
            deep = k < N
            a = tl.load(
                source + rows[:, None] * N + k[None, :],
                mask=here[:, None] & deep[None, :],
                other=0.0,
            )
            # Without the hint, an address from memory is read in small pieces.
            places = tl.multiple_of(matrix + k[:, None] * N + columns[None, :], [1, ALIGNED])
            b = tl.load(places, mask=deep[:, None] & wide[None, :], other=0.0)
            total = tl.dot(a, b, total, input_precision="ieee")
    tl.store(
        out + rows[:, None] * N + columns[None, :],
        total.to(out.dtype.element_ty),
        mask=here[:, None] & wide[None, :],
    )


@triton.jit
def _block_scores(
    queries,
    keys,
    query_tokens,
    key_tokens,
    query_mask,
    key_mask,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """[BLOCK, BLOCK] of Q K^T; the masks are False for tokens past the end of the row."""
    depth = tl.arange(0, DEPTH)
    total = tl.zeros([BLOCK, BLOCK], tl.float32)
    for start in range(0, N, DEPTH):
        k = start + depth
        deep = k < N
        a = tl.load(
            queries + query_tokens[:, None] * N + k[None, :],
            mask=query_mask[:, None] & deep[None, :],
            other=0.0,
        )
        b = tl.load(
            keys + key_tokens[None, :] * N + k[:, None],
            mask=key_mask[None, :] & deep[:, None],
            other=0.0,
        )
        total = tl.dot(a, b, total, input_precision="ieee")
    return total


@triton.jit
def normalizers(
    queries,
    keys,
    slots,
    starts,
    ends,
    normalizers,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """log sum exp of every query's scores, laid out as the text tokens."""
    row = tl.program_id(0)
    if tl.load(slots + row) < 0:
        return
    first = tl.load(starts + row)
    length = tl.load(ends + row) - first
    within = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    if tl.program_id(1) * BLOCK >= length:
        return
    start = first.to(tl.int64)
    here = within < length
    highest = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    other = 0
    while other < length:
        across = other + tl.arange(0, BLOCK)
        block = _block_scores(
            queries, keys, start + within, start + across, here, across < length, N, BLOCK, DEPTH
        )
        block = tl.where((across < length)[None, :], block, float("-inf"))
        higher = tl.maximum(highest, tl.max(block, 1))
        total = total * tl.exp(highest - higher) + tl.sum(tl.exp(block - higher[:, None]), 1)
        highest = higher
        other += BLOCK
    tl.store(normalizers + start + within, highest + tl.log(total), mask=here)


@triton.jit
def column_means(
    queries,
    keys,
    slots,
    starts,
    ends,
    table,
    table_stride,
    normalizers,
    weights,
    N: tl.constexpr,
    FIRST_TOKEN: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """The mean over queries of exp(score - normalizer); 1 for the first token if it alone counts.

    One program for each block of keys and no atomics: a text's weights are the same in every run.
    """
    row = tl.program_id(0)
    slot = tl.load(slots + row).to(tl.int64)
    if slot < 0:
        return
    first = tl.load(starts + row)
    length = tl.load(ends + row) - first
    within = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    if tl.program_id(1) * BLOCK >= length:
        return
    start = first.to(tl.int64)
    here = within < length
    total = tl.zeros([BLOCK], tl.float32)
    other = 0
    while other < length:
        across = other + tl.arange(0, BLOCK)
        block = _block_scores(
            queries, keys, start + across, start + within, across < length, here, N, BLOCK, DEPTH
        )
        normalizer = tl.load(normalizers + start + across, mask=across < length, other=float("inf"))
        total += tl.sum(tl.exp(block - normalizer[:, None]), 0)
        other += BLOCK
    share = total / length
    if tl.load(table + slot * table_stride + FIRST_TOKEN) != 0:
        share = tl.where(within == 0, 1.0, 0.0)
    tl.store(weights + start + within, share, mask=here)


@triton.jit
def weighted_sums(
    weights,
    source,
    slots,
    starts,
    ends,
    out,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0)
    if tl.load(slots + row) < 0:
        return
    first = tl.load(starts + row)
    length = tl.load(ends + row) - first
    start = first.to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    wide = columns < N
    total = tl.zeros([COLUMNS], tl.float32)
    token = 0
    while token < length:
        within = token + tl.arange(0, ROWS)
        here = within < length
        share = tl.load(weights + start + within, mask=here, other=0.0)
        states = tl.load(
            source + (start + within)[:, None] * N + columns[None, :],
            mask=here[:, None] & wide[None, :],
            other=0.0,
        )
        total += tl.sum(share[:, None] * states.to(tl.float32), 0)
        token += ROWS
    tl.store(out + row * N + columns, total, mask=wide)


@triton.jit
def expand(
    source,
    before,
    after,
    parents,
    out,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    entry = tl.program_id(0)
    parent = tl.load(parents + entry)
    if parent < 0:
        return
    start = tl.load(before + parent).to(tl.int64)
    length = tl.load(before + parent + 1) - start
    # The room for a prompt is in front of the entry.
    target = tl.load(after + entry + 1).to(tl.int64) - length
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    wide = columns < N
    token = 0
    while token < length:
        within = token + tl.arange(0, ROWS)
        mask = (within < length)[:, None] & wide[None, :]
        states = tl.load(source + (start + within)[:, None] * N + columns[None, :], mask=mask)
        tl.store(out + (target + within)[:, None] * N + columns[None, :], states, mask=mask)
        token += ROWS


@triton.jit
def table_rows(
    offsets,
    owners,
    table,
    table_stride,
    out,
    WIDTH: tl.constexpr,
    TABLE: tl.constexpr,
    POSITIONS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The row of its position in its slot's table for every token; later positions get the last."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(owners + token).to(tl.int64)
    if slot < 0:
        return
    address = tl.load(table + slot * table_stride + TABLE)
    if address == 0:
        return
    last = tl.load(table + slot * table_stride + POSITIONS) - 1
    place = tl.minimum(tl.load(offsets + token).to(tl.int64), last)
    matrix = address.to(tl.pointer_type(out.dtype.element_ty))
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    wide = columns < WIDTH
    value = tl.load(matrix + place * WIDTH + columns, mask=wide)
    tl.store(out + token * WIDTH + columns, value, mask=wide)
