"""Figures and thresholds of sets of labels: hand-computed cases, and properties."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from train.metrics import Metric, MultiLabelMetrics, reported
from train.objective import OBJECTIVES
from train.report.baselines import majority
from train.set_metrics import assess_sets, measure_sets, reached
from train.thresholds import MOST_LOGIT, SUPPORT, choose_thresholds

SETS = OBJECTIVES["sigmoid"]


def _sets(*rows: str) -> Tensor:
    """Rows like "ab", of the labels a, b and c."""
    return torch.tensor([[label in row for label in "abc"] for row in rows])


def test_the_figures_of_a_small_case() -> None:
    true = _sets("ab", "a", "", "c")
    predicted = _sets("a", "ab", "", "b")
    metrics = measure_sets(predicted, true)
    # Hits: 2 of a. Given: 2 a, 2 b. There are: 2 a, 1 b, 1 c.
    assert metrics.micro_f1 == pytest.approx(2 * 2 / (4 + 4))
    assert metrics.macro_f1 == pytest.approx((1.0 + 0.0 + 0.0) / 3)
    assert metrics.exact_match == 0.25


def test_a_label_that_occurs_nowhere_does_not_count() -> None:
    metrics = measure_sets(_sets("a", ""), _sets("a", "a"))
    assert metrics.macro_f1 == metrics.micro_f1 == pytest.approx(2 / 3)


def test_without_any_label_f1_is_undefined_and_zero() -> None:
    assert measure_sets(_sets("", ""), _sets("", "")) == MultiLabelMetrics(0.0, 0.0, 1.0)


def test_with_one_label_and_one_answer_micro_f1_is_accuracy() -> None:
    random = torch.Generator().manual_seed(0)
    one, other = (torch.randint(5, (200,), generator=random) for _ in range(2))
    as_sets = [torch.nn.functional.one_hot(classes, 5).bool() for classes in (one, other)]
    metrics = measure_sets(*as_sets)
    expected = OBJECTIVES["softmax"].measure(one, other, labels=5)
    for metric in (Metric.MICRO_F1, Metric.MACRO_F1, Metric.ACCURACY):
        assert metric.of(metrics) == pytest.approx(metric.of(expected))


def test_every_metric_picks_its_figure() -> None:
    metrics = MultiLabelMetrics(micro_f1=0.5, macro_f1=0.25, exact_match=0.75)
    assert {str(name): value for name, value in reported(metrics).items()} == {
        "accuracy": 0.75,
        "macro-f1": 0.25,
        "micro-f1": 0.5,
    }
    with pytest.raises(ValueError, match="no single correlation"):
        Metric.MATTHEWS.of(metrics)


def test_a_score_that_is_its_threshold_is_given() -> None:
    logits = torch.tensor([[0.0, 0.0, -1e-3]])
    assert reached(logits, (0.5, 0.5000001, 0.5), 1.0).tolist() == [[True, False, False]]
    # A temperature moves scores towards a half.
    assert reached(torch.tensor([[-2.0]]), (0.2,), 1.0).tolist() == [[False]]
    assert reached(torch.tensor([[-2.0]]), (0.2,), 2.0).tolist() == [[True]]


def test_the_loss_is_the_likelihood_of_every_decision() -> None:
    logits, true = torch.tensor([[0.3, -1.2], [2.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    scores = logits.sigmoid()
    expected = -sum(
        math.log(float(scores[row, label] if true[row, label] else 1 - scores[row, label]))
        for row in range(2)
        for label in range(2)
    )
    assert float(SETS.loss(logits, true)) == pytest.approx(expected, rel=1e-6)
    assert int(SETS.hits(logits, true)) == 1


def test_a_head_starts_from_the_frequencies() -> None:
    true = torch.tensor([[1.0, 0.0, 1.0]] * 3 + [[0.0, 0.0, 1.0]])
    bias = torch.zeros(3)
    SETS.start(bias, true)
    assert bias.sigmoid().tolist() == pytest.approx([3.5 / 5, 0.5 / 5, 4.5 / 5])


def test_the_constant_answer_is_the_best_set_of_the_training_rows() -> None:
    train = _sets("ab", "ab", "a", "b", "abc").float()
    (metrics,) = majority(SETS, train, {"test": _sets("ab", "c").float()}, labels=3).values()
    # Always a and b: two of three labels are found, and two of four given are right.
    assert isinstance(metrics, MultiLabelMetrics)
    assert metrics.micro_f1 == pytest.approx(2 * 2 / (4 + 3))
    assert metrics.macro_f1 == pytest.approx(4 / 9)
    assert metrics.exact_match == 0.5


def _scored(rows: int, labels: int, *, seed: int, shift: float) -> tuple[Tensor, Tensor]:
    """Logits that know the truth but are too low by `shift`."""
    random = torch.Generator().manual_seed(seed)
    true = (torch.rand(rows, labels, generator=random) < 0.3).float()
    return 2 * true - 1 + torch.randn(rows, labels, generator=random) - shift, true


def test_thresholds_mend_scores_that_are_too_low() -> None:
    logits, true = _scored(400, 4, seed=1, shift=2.0)
    thresholds = choose_thresholds(logits, true)
    assert all(threshold < 0.35 for threshold in thresholds)
    fresh, fresh_true = _scored(4000, 4, seed=2, shift=2.0)

    def micro(chosen: tuple[float, ...] | None) -> float:
        metrics = SETS.measure(SETS.predict(fresh, thresholds=chosen), fresh_true, labels=4)
        return Metric.MICRO_F1.of(metrics)

    assert micro(thresholds) > micro(None) + 0.2


def test_a_label_with_few_texts_gets_the_threshold_of_all_together() -> None:
    logits, true = _scored(400, 5, seed=3, shift=1.0)
    # The best cut of one text is far off; none at all has no cut.
    true[:, 3:] = 0
    true[0, 3], logits[0, 3] = 1, 9.0
    *usual, rare, never = choose_thresholds(logits, true)
    together = never
    assert 0.1 < together < 0.5
    assert math.log(rare / (1 - rare)) == pytest.approx(
        (1 * MOST_LOGIT + SUPPORT * math.log(together / (1 - together))) / (1 + SUPPORT), abs=2e-3
    )
    assert max(usual) - min(usual) < 0.2


@given(
    st.integers(1, 40),
    st.integers(1, 4),
    st.integers(0, 1000),
    st.floats(-3, 3),
    st.sampled_from((1.0, 0.5)),
)
@settings(max_examples=150, deadline=None)
def test_thresholds_are_valid_and_never_worse_on_their_own_rows(
    rows: int, labels: int, seed: int, shift: float, grid: float
) -> None:
    logits, true = _scored(rows, labels, seed=seed, shift=shift)
    logits = (logits / grid).round() * grid  # equal logits are common
    thresholds = choose_thresholds(logits, true)
    assert len(thresholds) == labels
    assert all(0.0179 < threshold < 0.9821 for threshold in thresholds)
    before, after = (
        Metric.MICRO_F1.of(
            SETS.measure(SETS.predict(logits, thresholds=chosen), true, labels=labels)
        )
        for chosen in (None, thresholds)
    )
    assert after >= before


def test_rows_without_any_label_leave_the_thresholds_at_a_half() -> None:
    logits, _ = _scored(20, 3, seed=1, shift=0.0)
    assert choose_thresholds(logits, torch.zeros(20, 3)) == (0.5, 0.5, 0.5)


def test_an_assessment_has_every_figure() -> None:
    logits = torch.tensor([[2.0, 1.0, -3.0], [2.0, -1.0, -3.0], [-2.0, -2.0, -2.0]])
    true = _sets("a", "ab", "")
    result = assess_sets(logits, true.float(), "abc", thresholds=(0.5, 0.7, 0.5), seed=1)
    assert result.rows == 3
    assert result.exact_match.value == pytest.approx(1 / 3)
    assert result.micro_f1.value == pytest.approx(2 * 2 / (3 + 3))
    assert result.micro_f1.low <= result.micro_f1.value <= result.micro_f1.high
    a, b, c = result.labels
    assert (a.support, a.predicted, a.precision, a.recall, a.f1) == (2, 2, 1.0, 1.0, 1.0)
    assert (b.support, b.predicted, b.precision, b.recall, b.f1) == (1, 1, 0.0, 0.0, 0.0)
    assert (c.support, c.predicted, c.precision, c.recall, c.f1) == (0, 0, None, None, None)
    assert result.sizes == ((0, 1, 1), (1, 1, 1), (2, 1, 1))
    assert sum(part.rows for part in result.scaled.bins) == 9
    scores = logits.double().sigmoid()
    assert result.unscaled.brier == pytest.approx(float((scores - true.double()).square().mean()))
    assert result.unscaled.negative_log_likelihood == pytest.approx(
        float(SETS.loss(logits.double(), true.double())) / 9
    )
    assert result == assess_sets(logits, true.float(), "abc", thresholds=(0.5, 0.7, 0.5), seed=1)


def test_intervals_cover_the_figures_of_resamples() -> None:
    logits, true = _scored(300, 3, seed=5, shift=0.5)
    result = assess_sets(logits, true, "abc", thresholds=(0.5,) * 3)
    predicted, random = logits >= 0, torch.Generator().manual_seed(1)
    drawn = []
    for _ in range(400):
        chosen = torch.randint(300, (300,), generator=random)
        drawn.append(measure_sets(predicted[chosen], true[chosen] > 0))
    for name in ("micro_f1", "macro_f1", "exact_match"):
        values = torch.tensor([getattr(metrics, name) for metrics in drawn])
        ends = values.quantile(torch.tensor([0.025, 0.975]))
        estimate = getattr(result, name)
        assert [estimate.low, estimate.high] == pytest.approx(ends.tolist(), abs=0.015)


@pytest.mark.parametrize(
    "logits", [torch.zeros(2, 2), torch.zeros(0, 3), torch.full((2, 3), torch.nan)]
)
def test_unusable_logits_are_refused(logits: Tensor) -> None:
    true = torch.zeros(len(logits), 3)
    with pytest.raises(ValueError, match=r"logits"):
        assess_sets(logits, true, "abc", thresholds=(0.5,) * 3)
