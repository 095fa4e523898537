"""Thresholds: what they leave unanswered, and a precision that holds on other texts as well."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from adapters.format.spec import Decision
from adapters.packed.head import scores
from train.abstaining import CONFIDENCE, CURVE, Judged, _chance, least_rows

PRECISIONS = [0.8, 0.9, 0.95]


def _logits(best: Tensor) -> Tensor:
    """Two logits a row, so that the first label has this score."""
    return torch.stack([best.logit(), torch.zeros_like(best)], dim=1)


def _judged(best: list[float], right: list[bool]) -> Judged:
    true = torch.tensor([0 if one else 1 for one in right])
    return Judged.of_logits(_logits(torch.tensor(best)), true, temperature=1.0)


def test_a_threshold_answers_what_reaches_it() -> None:
    judged = _judged([0.6, 0.9, 0.7, 0.8], [False, True, True, False])
    expected = {0.0: (4, 0.5), 0.65: (3, 2 / 3), 0.75: (2, 0.5), 0.85: (1, 1.0), 0.95: (0, None)}
    for threshold, (count, accuracy) in expected.items():
        part = judged.answered(threshold)
        assert (part.answered, part.rows, part.coverage) == (count, 4, count / 4)
        assert part.accuracy == (None if accuracy is None else pytest.approx(accuracy))


def test_a_score_that_is_the_threshold_is_answered_as_the_service_does() -> None:
    logits = _logits(torch.linspace(0.55, 0.95, 40))
    served = scores(logits, "softmax", 1.7).max(dim=-1).values
    judged = Judged.of_logits(logits, torch.zeros(40, dtype=torch.int64), temperature=1.7)
    for score in served.tolist():
        assert judged.answered(score).answered == int((served.double() >= score).sum())


def test_the_chance_of_few_errors_is_the_binomials() -> None:
    logs = np.concatenate([[0.0], np.log(np.arange(1, 401)).cumsum()])
    for count, errors, rate in ((59, 0, 0.05), (200, 3, 0.05), (400, 60, 0.2), (7, 1, 0.5)):
        terms = (
            math.comb(count, k) * rate**k * (1 - rate) ** (count - k) for k in range(errors + 1)
        )
        assert _chance(errors, count, rate, logs) == pytest.approx(math.fsum(terms), rel=1e-9)
    assert _chance(10, 200, 0.05, logs) == 1.0


@pytest.mark.parametrize(("precision", "rows"), [(0.9, 29), (0.95, 59), (0.99, 299)])
def test_few_rows_show_no_high_precision_even_if_all_are_right(precision: float, rows: int) -> None:
    assert least_rows(precision) == rows
    assert _judged([0.9] * (rows - 1), [True] * (rows - 1)).threshold(precision) is None
    assert _judged([0.9] * 4 * rows, [True] * 4 * rows).threshold(precision) == 0.0


def test_all_wrong_reaches_nothing() -> None:
    judged = _judged([0.9] * 200, [False] * 200)
    assert judged.threshold(0.5) is None
    assert judged.highest_precision() is None


def test_the_lowest_threshold_that_passes_is_taken() -> None:
    # The better half is right, the other half is a guess.
    best = torch.linspace(0.99, 0.51, 1000)
    right = [index < 500 or index % 2 == 0 for index in range(1000)]
    judged = _judged(best.tolist(), right)
    threshold = judged.threshold(0.95)
    assert threshold is not None
    part = judged.answered(threshold)
    # 5 % of errors among 1 / 0.9 of the good half would be the most, less what the proof costs.
    assert 500 <= part.answered <= 556
    assert part.accuracy is not None
    assert part.accuracy >= 0.95
    assert judged.highest_precision() == 0.99
    assert judged.threshold(0.99) is not None
    lower = judged.threshold(0.8)
    assert lower is not None
    assert lower < threshold


@pytest.mark.slow
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("rows", [60, 300])
def test_a_chosen_threshold_keeps_its_promise_on_other_texts(precision: float, rows: int) -> None:
    """Scores promise too much: a text with the score s is right with probability s ** 2.

    Above t the true precision is the mean of s ** 2 from t to 1. A threshold breaks its promise if
    that is below the precision; by chance this may happen to 1 - CONFIDENCE of the draws at most.
    """
    random, draws, broken, chosen = np.random.default_rng(7), 200, 0, 0
    for _ in range(draws):
        drawn = random.uniform(0.5, 1.0, rows)
        right = random.uniform(size=rows) < drawn**2
        threshold = _judged(drawn.tolist(), right.tolist()).threshold(precision)
        if threshold is None:
            continue
        chosen += 1
        low = max(threshold, 0.5)
        true = (1 - low**3) / 3 / (1 - low)
        broken += true < precision
    allowed = draws * (1 - CONFIDENCE)
    assert broken <= allowed + 3 * math.sqrt(allowed * CONFIDENCE)
    if rows == 300 and precision == 0.8:
        assert chosen > draws / 4


ROWS = st.lists(
    st.tuples(st.floats(0.5, 1.0, width=32, exclude_max=True), st.booleans()),
    min_size=1,
    max_size=80,
)


@given(ROWS, st.sampled_from(PRECISIONS))
@settings(max_examples=150, deadline=None)
def test_what_is_chosen_and_stored_is_consistent(
    rows: list[tuple[float, bool]], precision: float
) -> None:
    judged = _judged([score for score, _ in rows], [right for _, right in rows])
    curve = judged.curve()
    assert curve[0].answered == len(rows)
    assert 1 <= len(curve) <= len(CURVE)
    # The spec takes every curve.
    points = [(part.threshold, part.coverage, part.accuracy or 0.0) for part in curve]
    assert Decision(coverage=tuple(points)).coverage == tuple(points)
    threshold = judged.threshold(precision)
    if threshold is not None:
        part = judged.answered(threshold)
        assert part.accuracy is not None
        assert part.accuracy > precision
        assert part.answered >= least_rows(precision)
        highest = judged.highest_precision()
        assert highest is not None
        assert highest >= precision
