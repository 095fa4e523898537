"""What is done between the int8 products of a layer, row by row, as machine code.

PyTorch takes six operations to turn a product into the next one's int8 input, and each reads and
writes the whole sequence. Here a row stays in the processor's first cache meanwhile. Numba compiles
these functions at the start; they run on the caller's thread, without the interpreter's lock.

Every row is computed by itself in a fixed order, so its result never depends on the others. A row
with a value that is not finite gets a scale that is not finite, which no later step loses.
"""

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from numba import njit

Float32: TypeAlias = npt.NDArray[np.float32]
Int8: TypeAlias = npt.NDArray[np.int8]
Int32: TypeAlias = npt.NDArray[np.int32]

# `reassoc` lets a sum use all lanes of a register. Which lanes is fixed when it is compiled.
_OPTIONS: dict[str, Any] = {
    "nogil": True,
    "error_model": "numpy",
    "fastmath": {"arcp", "contract", "nsz", "reassoc"},
}

_ONE, _HALF, _ZERO = np.float32(1), np.float32(0.5), np.float32(0)
_LARGEST = np.float32(127)
# A row of zeros has a scale, too.
_LEAST = np.float32(1e-30)
_MAGNITUDE = np.int32(0x7FFFFFFF)

# erf(x / sqrt(2)) / 2 = x P(x^2) / Q(x^2), fitted for |x| up to 5.4, where it is 0.5: GELU then
# differs by at most 1.2e-6 from the exact one, a thousandth of a step of int8.
_END = np.float32(5.4)
_P0, _P1, _P2, _P3, _P4, _P5, _P6 = (
    np.float32(value)
    for value in (
        *(0.3989421821527426, 0.03481123323287272, 0.004436678323905608, 0.0001591673776913864),
        *(3.1331109303322675e-06, -2.222471160770834e-08, 1.1580498687341202e-10),
    )
)
_Q1, _Q2, _Q3, _Q4 = (
    np.float32(value)
    for value in (
        *(0.2539238162702649, 0.028444989808587267),
        *(0.0017650098050200848, 5.872123113914771e-05),
    )
)


@njit(inline="always", **_OPTIONS)
def _gelu(x: Any) -> Any:
    end = min(max(x, -_END), _END)
    t = end * end
    p = _P0 + t * (_P1 + t * (_P2 + t * (_P3 + t * (_P4 + t * (_P5 + t * _P6)))))
    q = _ONE + t * (_Q1 + t * (_Q2 + t * (_Q3 + t * _Q4)))
    return x * (_HALF + end * p / q)


@njit(**_OPTIONS)
def _quantise_row(row: Any, bits: Any, values: Any) -> Any:
    """bits: the same memory as int32. As integers, NaN and infinities are the largest magnitudes,
    which a maximum of numbers would lose."""
    largest = np.int32(0)
    for column in range(len(row)):
        largest = max(largest, bits[column] & _MAGNITUDE)
    kept = np.empty(1, np.int32)
    kept[0] = largest
    magnitude = kept.view(np.float32)[0]
    if magnitude < _LEAST:
        magnitude = _LEAST
    inverse = _LARGEST / magnitude
    for column in range(len(row)):
        values[column] = np.int8(np.int32(np.rint(row[column] * inverse)))
    return magnitude / _LARGEST


@njit(**_OPTIONS)
def quantise(states: Float32, values: Int8, scales: Float32) -> None:
    """states [T, n] -> values [T, n] times scales [T]."""
    for index in range(len(states)):
        row = states[index]
        scales[index] = _quantise_row(row, row.view(np.int32), values[index])


@njit(**_OPTIONS)
def finish(sums: Int32, scales: Float32, factors: Float32, bias: Float32, output: Float32) -> None:
    """sums [T, n] * scales [T] * factors [n] + bias [n] -> output [T, n]."""
    for index in range(len(output)):
        scale = scales[index]
        for column in range(output.shape[1]):
            value = np.float32(sums[index, column])
            output[index, column] = value * (scale * factors[column]) + bias[column]


@njit(**_OPTIONS)
def finish_and_quantise(
    sums: Int32,
    scales: Float32,
    factors: Float32,
    bias: Float32,
    values: Int8,
    value_scales: Float32,
) -> None:
    """GELU of what `finish` gives -> values [T, n] times value_scales [T]."""
    width = values.shape[1]
    row = np.empty(width, np.float32)
    bits = row.view(np.int32)
    for index in range(len(values)):
        scale = scales[index]
        for column in range(width):
            value = np.float32(sums[index, column])
            row[column] = _gelu(value * (scale * factors[column]) + bias[column])
        value_scales[index] = _quantise_row(row, bits, values[index])


@njit(**_OPTIONS)
def finish_and_norm(
    sums: Int32,
    scales: Float32,
    factors: Float32,
    bias: Float32,
    residual: Float32,
    weight: Float32,
    shift: Float32,
    epsilon: Any,
    states: Float32,
) -> None:
    """The layer norm of what `finish` gives and residual [T, n] -> states [T, n].

    weight, shift: [n], of the norm.
    """
    width = states.shape[1]
    count = np.float32(width)
    for index in range(len(states)):
        row, scale, total = states[index], scales[index], _ZERO
        for column in range(width):
            value = np.float32(sums[index, column]) * (scale * factors[column])
            value += bias[column] + residual[index, column]
            row[column] = value
            total += value
        mean, squares = total / count, _ZERO
        for column in range(width):
            distance = row[column] - mean
            squares += distance * distance
        inverse = _ONE / np.sqrt(squares / count + epsilon)
        for column in range(width):
            row[column] = (row[column] - mean) * inverse * weight[column] + shift[column]
