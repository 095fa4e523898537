"""The figures of a model card: computed by hand, bounded, and consistent with `measure`."""

import json
import math
from dataclasses import asdict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from train.metrics import CONFUSIONS, MATRIX_LABELS, Assessment, Estimate, assess, measure

ABC = ("a", "b", "c")


def _answers(predicted: list[int], labels: int) -> Tensor:
    """Logits whose argmax is that."""
    return torch.nn.functional.one_hot(torch.tensor(predicted), labels).float() * 3


def _probabilities(first: list[float]) -> Tensor:
    """Logits of two labels, of which the first has these probabilities."""
    column = torch.tensor(first, dtype=torch.float64)
    return torch.stack([column, 1 - column], dim=1).log()


def _noisy(rows: int, labels: int, *, right: float = 0.8, seed: int = 0) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    classes = torch.randint(labels, (rows,), generator=random)
    other = torch.randint(labels, (rows,), generator=random)
    keep = torch.rand(rows, generator=random) < right
    logits = torch.randn(rows, labels, generator=random)
    logits[torch.arange(rows), torch.where(keep, classes, other)] += 6
    return logits, classes


def _width(estimate: Estimate) -> float:
    return estimate.high - estimate.low


def _of_hand() -> Assessment:
    """a a a b b c answered with a a b b c c."""
    true, predicted = [0, 0, 0, 1, 1, 2], [0, 0, 1, 1, 2, 2]
    return assess(_answers(predicted, 3), torch.tensor(true), ABC)


def test_figures_are_those_computed_by_hand() -> None:
    assessment = _of_hand()
    assert assessment.rows == 6
    assert assessment.matrix == ((2, 1, 0), (0, 1, 1), (0, 0, 1))
    assert assessment.accuracy.value == pytest.approx(4 / 6)
    assert assessment.macro_f1.value == pytest.approx((4 / 5 + 2 / 4 + 2 / 3) / 3)
    # R_K: (4*6 - (2*3 + 2*2 + 2*1)) / sqrt((36 - 12) * (36 - 14)).
    assert assessment.matthews.value == pytest.approx(12 / math.sqrt(24 * 22))


def test_each_label_has_its_own_figures() -> None:
    a, b, c = _of_hand().labels
    assert (a.label, a.support, a.predicted) == ("a", 3, 2)
    assert (a.precision, a.recall, a.f1) == pytest.approx((1.0, 2 / 3, 0.8))
    assert (b.precision, b.recall, b.f1) == pytest.approx((0.5, 0.5, 0.5))
    assert (c.support, c.predicted) == (1, 2)
    assert (c.precision, c.recall, c.f1) == pytest.approx((0.5, 1.0, 2 / 3))


def test_a_figure_that_is_undefined_is_none_and_never_zero() -> None:
    assessment = assess(_answers([0, 0, 0], 3), torch.tensor([0, 0, 1]), ABC)
    _, missed, absent = assessment.labels
    assert (missed.precision, missed.recall, missed.f1) == (None, 0.0, 0.0)
    assert (absent.precision, absent.recall, absent.f1) == (None, None, None)
    assert assessment.matthews == Estimate(0.0, 0.0, 0.0), (
        "one single answer correlates with nothing"
    )


def test_calibration_is_that_computed_by_hand() -> None:
    # Top scores 0.90 (right) and 0.92 (wrong) share a bin; 0.62 (right) and 0.55 (wrong) do not.
    logits = _probabilities([0.90, 0.92, 0.38, 0.45])
    reliability = assess(logits, torch.tensor([0, 1, 1, 0]), ("x", "y")).unscaled
    filled = {round(item.low, 4): item for item in reliability.bins if item.rows}
    assert {low: item.rows for low, item in filled.items()} == {0.5333: 1, 0.6: 1, 0.8667: 2}
    assert filled[0.8667].score == pytest.approx(0.91)
    assert filled[0.8667].accuracy == 0.5
    expected = 2 / 4 * (0.91 - 0.5) + 1 / 4 * (1 - 0.62) + 1 / 4 * 0.55
    assert reliability.expected_calibration_error == pytest.approx(expected)
    brier = (2 * 0.1**2 + 2 * 0.92**2 + 2 * 0.38**2 + 2 * 0.55**2) / 4
    assert reliability.brier == pytest.approx(brier)
    likelihood = -(math.log(0.9) + math.log(0.08) + math.log(0.62) + math.log(0.45)) / 4
    assert reliability.negative_log_likelihood == pytest.approx(likelihood)


def test_every_row_is_in_one_bin_the_lowest_and_the_highest_score_too() -> None:
    logits = torch.tensor([[0.0, 0.0], [1000.0, 0.0], [0.0, 1000.0]])
    bins = assess(logits, torch.tensor([0, 0, 1]), ("x", "y")).unscaled.bins
    assert len(bins) == 15
    assert (bins[0].low, bins[-1].high) == (0.0, 1.0)
    assert [item.rows for item in bins if item.low < 0.5 <= item.high] == [1]
    assert bins[-1].rows == 2
    assert all((item.score is None) == (item.rows == 0) for item in bins)


def test_the_temperature_changes_scores_and_no_answer() -> None:
    logits, classes = _noisy(200, 5)
    labels = tuple("abcde")
    cold, warm = (assess(logits, classes, labels, temperature=value) for value in (1.0, 2.5))
    assert cold.scaled == cold.unscaled == warm.unscaled
    assert (warm.accuracy, warm.matrix, warm.labels) == (cold.accuracy, cold.matrix, cold.labels)
    divided = assess(logits.double() / 2.5, classes, labels)
    for name in ("bins", "brier", "negative_log_likelihood", "expected_calibration_error"):
        assert getattr(warm.scaled, name) == getattr(divided.unscaled, name)
    assert warm.coverage == divided.coverage


def test_answers_with_equal_scores_are_counted_together() -> None:
    # Scores 0.9 0.8 0.7 0.7 0.6 and so on; the rows at 0.6 are wrong.
    first = [0.6, 0.7, 0.9, 0.7, 0.8, 0.6, 0.6, 0.6, 0.6, 0.6]
    right = [0, 1, 1, 1, 1, 0, 0, 0, 0, 0]
    coverage = assess(_probabilities(first), 1 - torch.tensor(right), ("x", "y")).coverage
    shares = {item.coverage: (item.rows, item.accuracy) for item in coverage}
    assert shares == {1.0: (10, 0.4), 0.9: (10, 0.4), 0.8: (10, 0.4), 0.5: (10, 0.4)}
    coverage = assess(_probabilities(first[:6]), 1 - torch.tensor(right[:6]), ("x", "y")).coverage
    assert [(item.rows, item.accuracy) for item in coverage][-1] == (4, 1.0)
    assert coverage[-1].threshold == pytest.approx(0.7)


@settings(deadline=None, max_examples=60)
@given(st.integers(2, 30), st.integers(1, 60), st.floats(0, 1), st.integers(0, 2**31))
def test_estimates_are_the_metrics_of_training_and_lie_inside_their_intervals(
    labels: int, rows: int, right: float, seed: int
) -> None:
    logits, classes = _noisy(rows, labels, right=right, seed=seed)
    assessment = assess(logits, classes, [str(index) for index in range(labels)])
    metrics = measure(logits.argmax(dim=1), classes, labels=labels)
    for name in ("accuracy", "macro_f1", "matthews"):
        estimate: Estimate = getattr(assessment, name)
        assert estimate.value == pytest.approx(getattr(metrics, name), abs=1e-12)
        assert -1 <= estimate.low <= estimate.value <= estimate.high <= 1


def test_resampling_cells_gives_the_same_intervals_as_resampling_rows() -> None:
    logits, classes = _noisy(300, 4)
    assessment = assess(logits, classes, tuple("abcd"))
    predicted, random = logits.argmax(dim=1), torch.Generator().manual_seed(1)
    drawn = [
        measure(predicted[chosen], classes[chosen], labels=4)
        for chosen in torch.randint(300, (1000, 300), generator=random)
    ]
    for name in ("accuracy", "macro_f1", "matthews"):
        values = torch.tensor([getattr(metrics, name) for metrics in drawn]).double()
        low, high = values.quantile(torch.tensor([0.025, 0.975]).double()).tolist()
        estimate: Estimate = getattr(assessment, name)
        # An end of a thousand resamples has a standard error of about a tenth of the width.
        assert (estimate.low, estimate.high) == pytest.approx((low, high), abs=_width(estimate) / 5)


def test_the_interval_of_the_accuracy_is_about_the_normal_one() -> None:
    logits, classes = _noisy(2000, 3)
    accuracy = assess(logits, classes, ABC).accuracy
    error = math.sqrt(accuracy.value * (1 - accuracy.value) / 2000)
    assert _width(accuracy) == pytest.approx(2 * 1.96 * error, rel=0.1)


def test_more_rows_give_narrower_intervals() -> None:
    few, many = (assess(*_noisy(rows, 3), ABC) for rows in (100, 10_000))
    for name in ("accuracy", "macro_f1", "matthews"):
        # A hundred times the rows: a tenth of the width.
        ratio = _width(getattr(few, name)) / _width(getattr(many, name))
        assert 6 < ratio < 16


def test_the_same_seed_gives_the_same_intervals_and_another_does_not() -> None:
    logits, classes = _noisy(200, 3)
    one, same, other = (assess(logits, classes, ABC, seed=seed) for seed in (0, 0, 1))
    assert one == same
    assert one.macro_f1 != other.macro_f1
    assert one.macro_f1.value == other.macro_f1.value


def test_the_interval_holds_the_figure_even_if_resamples_lose_most_labels() -> None:
    logits, classes = _noisy(4000, 1000, right=0.6)
    macro_f1 = assess(logits, classes, [str(index) for index in range(1000)]).macro_f1
    assert macro_f1.low < macro_f1.value <= macro_f1.high


def test_without_a_mistake_there_is_nothing_to_resample() -> None:
    assessment = assess(_answers([0, 1, 2, 0], 3), torch.tensor([0, 1, 2, 0]), ABC)
    assert assessment.accuracy == assessment.macro_f1 == Estimate(1.0, 1.0, 1.0)
    assert assessment.confusions == ()


def test_many_labels_show_their_most_frequent_confusions_instead_of_a_matrix() -> None:
    labels = MATRIX_LABELS + 10
    names = [f"label {index}" for index in range(labels)]
    # Label i is taken for its neighbour i + 1 times, and right once.
    true = [index for index in range(labels) for _ in range(index + 2)]
    predicted = [
        (index + 1) % labels if time else index
        for index in range(labels)
        for time in range(index + 2)
    ]
    assessment = assess(_answers(predicted, labels), torch.tensor(true), names)
    assert assessment.matrix is None
    assert len(assessment.confusions) == CONFUSIONS
    first = assessment.confusions[0]
    assert (first.true, first.predicted, first.count) == ("label 29", "label 0", 30)
    counts = [confusion.count for confusion in assessment.confusions]
    assert counts == sorted(counts, reverse=True)
    small = assess(_noisy(50, MATRIX_LABELS)[0], _noisy(50, MATRIX_LABELS)[1], names[:20])
    assert small.matrix is not None
    assert sum(map(sum, small.matrix)) == 50


def test_an_assessment_is_json() -> None:
    logits, classes = _noisy(50, 3)
    content = json.loads(json.dumps(asdict(assess(logits.half(), classes, ABC)), allow_nan=False))
    assert content["rows"] == 50
    assert content["accuracy"].keys() == {"value", "low", "high"}
    assert len(content["scaled"]["bins"]) == 15


@pytest.mark.parametrize(
    ("logits", "classes", "temperature", "fault"),
    [
        (torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64), 1.0, "expected"),
        (torch.zeros(2, 2), torch.tensor([0, 1]), 1.0, "3 labels"),
        (torch.zeros(2, 3), torch.tensor([0]), 1.0, "expected"),
        (torch.zeros(2, 3), torch.tensor([0, 3]), 1.0, "classes outside"),
        (torch.zeros(2, 3), torch.tensor([0, -1]), 1.0, "classes outside"),
        (torch.full((1, 3), float("nan")), torch.tensor([0]), 1.0, "not finite"),
        (torch.zeros(1, 3), torch.tensor([0]), 0.0, "temperature"),
        (torch.zeros(1, 3), torch.tensor([0]), float("nan"), "temperature"),
    ],
)
def test_invalid_input_is_refused(
    logits: Tensor, classes: Tensor, temperature: float, fault: str
) -> None:
    with pytest.raises(ValueError, match=fault):
        assess(logits, classes, ABC, temperature=temperature)
