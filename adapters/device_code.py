"""What runs on the device for every row of a batch: see `adapters.kernels`, which launches it.

Triton's language, compiled when a CUDA device first runs it. A `while` goes over what only a row
knows (its tokens, its depth); products over the hidden size have their trip count compiled in.
"""

import triton
import triton.language as tl


@triton.jit
def grouped_project(
    source,
    query,
    tiles,
    made,
    query_stride,
    N: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    tile = tl.program_id(0)
    slot = tl.load(tiles + tile * 3).to(tl.int64)
    first = tl.load(tiles + tile * 3 + 1).to(tl.int64)
    behind = tl.load(tiles + tile * 3 + 2).to(tl.int64)
    if first >= behind:
        return
    rows = first + tl.arange(0, TILE_ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    depth = tl.arange(0, DEPTH)
    here, wide = rows < behind, columns < N
    matrix = query + slot * query_stride
    total = tl.zeros([TILE_ROWS, COLUMNS], tl.float32)
    for start in range(0, N, DEPTH):
        k = start + depth
        deep = k < N
        a = tl.load(
            source + rows[:, None] * N + k[None, :], mask=here[:, None] & deep[None, :], other=0.0
        )
        b = tl.load(
            matrix + k[:, None] * N + columns[None, :],
            mask=deep[:, None] & wide[None, :],
            other=0.0,
        )
        total = tl.dot(a, b, total, input_precision="ieee")
    tl.store(
        made + rows[:, None] * N + columns[None, :],
        total.to(made.dtype.element_ty),
        mask=here[:, None] & wide[None, :],
    )


@triton.jit
def _block_scores(
    queries,
    keys,
    some,
    others,
    some_here,
    others_here,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """[BLOCK, BLOCK] of Q K^T at tokens `some` and `others`."""
    depth = tl.arange(0, DEPTH)
    total = tl.zeros([BLOCK, BLOCK], tl.float32)
    for start in range(0, N, DEPTH):
        k = start + depth
        deep = k < N
        a = tl.load(
            queries + some[:, None] * N + k[None, :],
            mask=some_here[:, None] & deep[None, :],
            other=0.0,
        )
        b = tl.load(
            keys + others[None, :] * N + k[:, None],
            mask=others_here[None, :] & deep[:, None],
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
    cumulative,
    normalizers,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """log sum exp of every query's scores, by the text tokens' places."""
    row = tl.program_id(0)
    if tl.load(slots + row) < 0:
        return
    text = tl.load(cumulative + row)
    length = tl.load(cumulative + row + 1) - text
    within = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    if tl.program_id(1) * BLOCK >= length:
        return
    start = tl.load(starts + row).to(tl.int64)
    here = within < length
    highest = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    other = 0
    while other < length:
        across = other + tl.arange(0, BLOCK)
        found = _block_scores(
            queries,
            keys,
            start + within,
            start + across,
            here,
            across < length,
            N,
            BLOCK,
            DEPTH,
        )
        found = tl.where((across < length)[None, :], found, float("-inf"))
        higher = tl.maximum(highest, tl.max(found, 1))
        total = total * tl.exp(highest - higher) + tl.sum(tl.exp(found - higher[:, None]), 1)
        highest = higher
        other += BLOCK
    tl.store(normalizers + text + within, highest + tl.log(total), mask=here)


@triton.jit
def column_means(
    queries,
    keys,
    slots,
    starts,
    cumulative,
    normalizers,
    weights,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """The mean over queries of exp(score - normalizer): one program a block of keys, no atomics, so
    that a text's weights are the same in every run."""
    row = tl.program_id(0)
    if tl.load(slots + row) < 0:
        return
    text = tl.load(cumulative + row)
    length = tl.load(cumulative + row + 1) - text
    within = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    if tl.program_id(1) * BLOCK >= length:
        return
    start = tl.load(starts + row).to(tl.int64)
    here = within < length
    total = tl.zeros([BLOCK], tl.float32)
    other = 0
    while other < length:
        across = other + tl.arange(0, BLOCK)
        found = _block_scores(
            queries,
            keys,
            start + across,
            start + within,
            across < length,
            here,
            N,
            BLOCK,
            DEPTH,
        )
        normalizer = tl.load(normalizers + text + across, mask=across < length, other=float("inf"))
        total += tl.sum(tl.exp(found - normalizer[:, None]), 0)
        other += BLOCK
    tl.store(weights + text + within, total / length, mask=here)


@triton.jit
def weighted_sums(
    weights,
    source,
    slots,
    starts,
    cumulative,
    made,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0)
    if tl.load(slots + row) < 0:
        return
    text = tl.load(cumulative + row)
    length = tl.load(cumulative + row + 1) - text
    start = tl.load(starts + row).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    wide = columns < N
    total = tl.zeros([COLUMNS], tl.float32)
    token = 0
    while token < length:
        within = token + tl.arange(0, ROWS)
        here = within < length
        share = tl.load(weights + text + within, mask=here, other=0.0)
        states = tl.load(
            source + (start + within)[:, None] * N + columns[None, :],
            mask=here[:, None] & wide[None, :],
            other=0.0,
        )
        total += tl.sum(share[:, None] * states.to(tl.float32), 0)
        token += ROWS
    tl.store(made + row * N + columns, total, mask=wide)


@triton.jit
def _tanh(x):
    # exp of a negative number only: it cannot overflow.
    small = tl.exp(-2.0 * tl.abs(x))
    size = (1.0 - small) / (1.0 + small)
    return tl.where(x < 0, -size, size)


@triton.jit
def rowwise_linear(
    states,
    states_stride,
    slots,
    table,
    table_stride,
    made,
    made_stride,
    places,
    depth_all,
    MATRIX: tl.constexpr,
    WIDTH: tl.constexpr,
    DEEPEST: tl.constexpr,
    FINAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PLACED: tl.constexpr,
    DEPTH: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """A row times its slot's matrix [depth, width], plus its bias: products and sums in float32."""
    row = tl.program_id(0)
    slot = tl.load(slots + row).to(tl.int64)
    if slot < 0:
        return
    width = tl.load(table + slot * table_stride + WIDTH)
    first = tl.program_id(1) * COLUMNS
    if first >= width:
        return
    deepest = depth_all
    if DEEPEST >= 0:
        deepest = tl.load(table + slot * table_stride + DEEPEST).to(tl.int32)
    matrix = tl.load(table + slot * table_stride + MATRIX).to(tl.pointer_type(tl.float32))
    columns = first + tl.arange(0, COLUMNS)
    wide = columns < width
    total = tl.zeros([COLUMNS], tl.float32)
    start = 0
    while start < deepest:
        k = start + tl.arange(0, DEPTH)
        deep = k < deepest
        state = tl.load(states + row * states_stride + k, mask=deep, other=0.0).to(tl.float32)
        block = tl.load(
            matrix + k[:, None] * width + columns[None, :],
            mask=deep[:, None] & wide[None, :],
            other=0.0,
        )
        total += tl.sum(state[:, None] * block, 0)
        start += DEPTH
    # The bias stands behind its matrix.
    total += tl.load(matrix + deepest * width + columns, mask=wide, other=0.0)
    if ACTIVATION == 1:
        total = tl.maximum(total, 0.0)
    elif ACTIVATION == 2:
        total = _tanh(total)
    elif ACTIVATION < 0:
        final = tl.load(table + slot * table_stride + FINAL)
        if final == 1:
            total = tl.maximum(total, 0.0)
        elif final == 2:
            total = _tanh(total)
    place = row.to(tl.int64)
    if PLACED:
        place = tl.load(places + row).to(tl.int64)
    tl.store(made + place * made_stride + columns, total.to(made.dtype.element_ty), mask=wide)


@triton.jit
def scores(
    logits,
    slots,
    table,
    table_stride,
    stride,
    widest,
    LABELS: tl.constexpr,
    SIGMOID: tl.constexpr,
    TEMPERATURE: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0)
    slot = tl.load(slots + row).to(tl.int64)
    if slot < 0:
        return
    labels = tl.load(table + slot * table_stride + LABELS)
    sigmoid = tl.load(table + slot * table_stride + SIGMOID)
    bits = tl.load(table + slot * table_stride + TEMPERATURE).to(tl.int32)
    temperature = bits.to(tl.float32, bitcast=True)
    highest = tl.full([COLUMNS], float("-inf"), tl.float32)
    total = tl.zeros([COLUMNS], tl.float32)
    start = 0
    while start < labels:
        columns = start + tl.arange(0, COLUMNS)
        value = tl.load(logits + row * stride + columns, mask=columns < labels, other=float("-inf"))
        value = value / temperature
        higher = tl.maximum(highest, value)
        # What has seen nothing yet adds exp(-inf), not exp(-inf + inf).
        known = tl.where(higher > float("-inf"), higher, 0.0)
        total = total * tl.exp(highest - known) + tl.exp(value - known)
        highest = higher
        start += COLUMNS
    top = tl.max(highest, 0)
    whole = tl.sum(total * tl.exp(highest - top), 0)
    start = 0
    while start < widest:
        columns = start + tl.arange(0, COLUMNS)
        value = tl.load(logits + row * stride + columns, mask=columns < labels, other=0.0)
        value = value / temperature
        score = tl.exp(value - top) / whole
        if sigmoid != 0:
            score = 1.0 / (1.0 + tl.exp(-value))
        score = tl.where(columns < labels, score, 0.0)
        tl.store(logits + row * stride + columns, score, mask=columns < widest)
        start += COLUMNS
