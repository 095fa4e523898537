"""What the check of a key may cost a request; `python -m benchmarks access` prints the figures."""

import pytest

from benchmarks.access import measure

pytestmark = [pytest.mark.slow, pytest.mark.alone]

# The goal is 20 on a quiet machine with a quick processor; slow ones have taken 30.
MOST_MICROSECONDS = 60.0


def test_a_thousand_keys_cost_a_request_no_more_than_one() -> None:
    one, thousand = measure(1, 2000, 5), measure(1000, 2000, 5)
    for case, microseconds in thousand.items():
        assert microseconds < MOST_MICROSECONDS, case
        assert microseconds < 4 * one[case] + 5, case
