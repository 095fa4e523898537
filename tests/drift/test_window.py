"""A window counts the last texts, between a half and all of what it may hold."""

import sys

import pytest

from service.drift.window import MOST_TEXTS, Window


def test_it_counts_every_text_until_it_is_full_and_then_forgets_the_older_half() -> None:
    window = Window(bins=3, texts=10)
    assert (window.texts, window.since) == (0, None)
    for number in range(10):
        window.add([0, 2], float(number))
    assert (window.texts, window.since, window.counts()) == (10, 0.0, [10, 0, 10])
    window.add([1], 10.0)
    # The texts of 0 to 4 are gone.
    assert (window.texts, window.since, window.counts()) == (6, 5.0, [5, 1, 5])
    for number in range(11, 40):
        window.add([1], float(number))
    assert window.counts() == [0, window.texts, 0]
    assert 5 <= window.texts <= 10


@pytest.mark.parametrize("texts", [200, 100_000])
def test_no_count_overflows(texts: int) -> None:
    assert texts <= 2 * MOST_TEXTS
    window = Window(bins=1, texts=texts)
    for _ in range(2 * texts + 3):
        window.add([0], 0.0)
    assert window.counts() == [window.texts]
    assert texts // 2 <= window.texts <= texts


def test_ten_thousand_adapters_of_a_hundred_bins_take_less_than_eight_megabytes() -> None:
    window = Window(bins=107, texts=4000)
    parts = (window, *(getattr(window, name) for name in ("_before", "_now")))
    assert 10_000 * sum(map(sys.getsizeof, parts)) < 8e6
