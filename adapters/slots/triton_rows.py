"""Triton kernels for one vector per row; `adapters.slots.kernels` launches them.

Compiled when a CUDA device first runs them. Weights are found by their address in the slot table
(`adapters.slots.bank.Column`); products and sums are float32.
"""

import triton
import triton.language as tl


@triton.jit
def _tanh(x):
    # exp of a negative number cannot overflow.
    small = tl.exp(-2.0 * tl.abs(x))
    size = (1.0 - small) / (1.0 + small)
    return tl.where(x < 0, -size, size)


@triton.jit
def _activated(x, code):
    """Of a code of `adapters.slots.bank.Activation`."""
    if code == 1:
        x = tl.maximum(x, 0.0)
    elif code == 2:
        x = _tanh(x)
    elif code == 3:
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    return x


@triton.jit
def rowwise_linear(
    states,
    states_stride,
    slots,
    table,
    table_stride,
    out,
    out_stride,
    places,
    inputs,
    MATRIX: tl.constexpr,
    WIDTH: tl.constexpr,
    INPUTS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PLACED: tl.constexpr,
    DEPTH: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """A row times its slot's matrix [inputs, width], plus its bias."""
    row = tl.program_id(0)
    slot = tl.load(slots + row).to(tl.int64)
    if slot < 0:
        return
    width = tl.load(table + slot * table_stride + WIDTH)
    first = tl.program_id(1) * COLUMNS
    if first >= width:
        return
    if INPUTS >= 0:
        inputs = tl.load(table + slot * table_stride + INPUTS).to(tl.int32)
    matrix = tl.load(table + slot * table_stride + MATRIX).to(tl.pointer_type(tl.float32))
    columns = first + tl.arange(0, COLUMNS)
    wide = columns < width
    total = tl.zeros([COLUMNS], tl.float32)
    start = 0
    while start < inputs:
        k = start + tl.arange(0, DEPTH)
        deep = k < inputs
        state = tl.load(states + row * states_stride + k, mask=deep, other=0.0).to(tl.float32)
        block = tl.load(
            matrix + k[:, None] * width + columns[None, :],
            mask=deep[:, None] & wide[None, :],
            other=0.0,
        )
        total += tl.sum(state[:, None] * block, 0)
        start += DEPTH
    # The bias follows its matrix.
    total += tl.load(matrix + inputs * width + columns, mask=wide, other=0.0)
    if ACTIVATION >= 0:
        total = _activated(total, tl.load(table + slot * table_stride + ACTIVATION))
    place = row.to(tl.int64)
    if PLACED:
        place = tl.load(places + row).to(tl.int64)
    tl.store(out + place * out_stride + columns, total.to(out.dtype.element_ty), mask=wide)


@triton.jit
def route(
    logits,
    stride,
    slots,
    table,
    table_stride,
    ROUTED: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """In place: the largest share of the softmax, and 0 for all other prompts."""
    row = tl.program_id(0)
    slot = tl.load(slots + row).to(tl.int64)
    if slot < 0:
        return
    if tl.load(table + slot * table_stride + ROUTED) == 0:
        return
    width = tl.load(table + slot * table_stride + WIDTH)
    columns = tl.arange(0, COLUMNS)
    here = columns < width
    value = tl.load(logits + row * stride + columns, mask=here, other=float("-inf"))
    top = tl.max(value, 0)
    share = 1.0 / tl.sum(tl.exp(value - top), 0)
    # The first of equal ones.
    chosen = tl.min(tl.where(value == top, columns, COLUMNS), 0)
    tl.store(logits + row * stride + columns, tl.where(columns == chosen, share, 0.0), mask=here)


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
    """softmax or sigmoid of logits / temperature, in place."""
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
        # A column that has seen no label adds exp(-inf) = 0, not exp(-inf + inf) = NaN.
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
