"""The population stability index: its value, its chance level, empty bins and small samples."""

from math import log

import numpy as np
import pytest

from service.drift.shift import LARGE, MODERATE, shift_of


def test_the_index_is_that_of_the_textbook() -> None:
    shift = shift_of([5000, 5000], [3000, 7000], ordered=True)
    expected = (0.3 - 0.5) * log(0.3 / 0.5) + (0.7 - 0.5) * log(0.7 / 0.5)
    assert shift.psi == pytest.approx(expected, rel=1e-3)
    assert (shift.reference, shift.seen) == ((0.5, 0.5), (0.3, 0.7))
    assert shift.level == "moderate"
    assert shift_of([500, 500], [100, 900], ordered=True).level == "large"


def test_equal_counts_have_no_shift() -> None:
    for counts in ([7, 9, 300], [1000], [0, 50, 0]):
        shift = shift_of(counts, counts, ordered=False)
        assert shift.psi == pytest.approx(0.0, abs=1e-12)
        assert shift.level == "stable"


def test_an_empty_bin_gives_a_finite_index() -> None:
    """What training never saw is the clearest drift, and its logarithm has no value."""
    shift = shift_of([1000, 0], [0, 1000], ordered=True)
    assert 5 < shift.psi < 20
    assert shift.level == "large"
    vanished = shift_of([500, 500], [1000, 0], ordered=True)
    assert np.isfinite(vanished.psi)
    assert vanished.level == "large"


def test_rare_bins_are_joined_in_order_or_into_one_group() -> None:
    reference, seen = [1, 1, 500, 2, 500, 1], [0, 1, 480, 3, 510, 1]
    assert shift_of(reference, seen, ordered=True).groups == ((0, 1, 2), (3, 4, 5))
    assert shift_of(reference, seen, ordered=False).groups == ((2,), (4,), (0, 1, 3, 5))


@pytest.mark.parametrize(
    ("bins", "reference", "seen"), [(2, 400, 400), (10, 1000, 3000), (77, 999, 4000)]
)
def test_without_drift_the_index_is_as_chance_says(bins: int, reference: int, seen: int) -> None:
    """Its mean is (bins - 1) (1/n + 1/m), and it exceeds `chance` once in a thousand times."""
    random = np.random.default_rng(3)
    shares = random.dirichlet(np.full(bins, 20.0))
    values, beyond, looks = [], 0, 2000
    for _ in range(looks):
        shift = shift_of(
            random.multinomial(reference, shares).tolist(),
            random.multinomial(seen, shares).tolist(),
            ordered=False,
        )
        values.append(shift.psi / (len(shift.groups) - 1) / (1 / reference + 1 / seen))
        beyond += shift.psi > shift.chance
    assert np.mean(values) == pytest.approx(1.0, abs=0.1)
    assert beyond <= 10


def test_few_texts_raise_no_false_alarm_where_the_usual_limits_alone_would() -> None:
    random = np.random.default_rng(4)
    shares = np.full(10, 0.1)
    alarms = above_the_usual = 0
    for _ in range(500):
        shift = shift_of(
            random.multinomial(60, shares).tolist(),
            random.multinomial(100, shares).tolist(),
            ordered=True,
        )
        above_the_usual += shift.psi > MODERATE
        alarms += shift.level != "stable"
    assert above_the_usual > 250
    assert alarms <= 5


def test_a_real_shift_is_seen_in_a_few_hundred_texts() -> None:
    random = np.random.default_rng(5)
    before, after = np.full(10, 0.1), np.array([0.3, 0.2, *[0.0625] * 8])
    reference = random.multinomial(1000, before).tolist()
    for _ in range(100):
        shift = shift_of(reference, random.multinomial(500, after).tolist(), ordered=True)
        assert shift.psi > LARGE
        assert shift.level == "large"
