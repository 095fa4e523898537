"""Weights that are finite, and weights that are not."""

import pytest
import torch

from adapters.errors import InvalidAdapter
from adapters.format.files import Adapter, all_finite, parse, serialize, validate


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_one_value_that_is_not_finite_is_found_anywhere(dtype: torch.dtype, value: float) -> None:
    good, bad = torch.ones(50, dtype=dtype), torch.ones(7, 9, dtype=dtype)
    assert all_finite(good, bad)
    bad[6, 8] = value
    assert not all_finite(good, bad)


def test_infinities_that_cancel_are_found() -> None:
    assert not all_finite(torch.tensor([float("inf"), float("-inf")]))


def test_finite_values_whose_sum_overflows_are_finite() -> None:
    assert all_finite(torch.full((4,), 3e38), torch.zeros(0))


def test_what_float32_cannot_hold_is_not_finite() -> None:
    assert not all_finite(torch.tensor([1e300], dtype=torch.float64))


def test_untrusted_values_are_checked_and_known_ones_are_only_parsed(
    adapter: Adapter,
) -> None:
    data = bytearray(serialize(adapter))
    # The last value of the last tensor.
    data[-4:] = b"\x00\x00\xc0\x7f"
    with pytest.raises(InvalidAdapter, match=r"1 of .* values are not finite"):
        validate(bytes(data))
    assert parse(bytes(data)).spec == adapter.spec
