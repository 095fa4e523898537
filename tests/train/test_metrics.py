"""Metrics: computed by hand, by their definitions, and where they are undefined."""

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from train.metrics import Metric, Metrics, measure

ROOT = Path(__file__).resolve().parents[2]

# float64 sums in another order.
SAME = 1e-12


def _measure(predicted: list[int], true: list[int], labels: int) -> Metrics:
    return measure(torch.tensor(predicted), torch.tensor(true), labels=labels)


def test_two_classes_by_hand() -> None:
    # Class 1: 3 true positives, 1 false negative, 2 false positives; class 0: 4 true positives.
    metrics = _measure([1, 1, 1, 0, 1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 0, 0, 0, 0, 0, 0], 2)
    assert metrics.accuracy == 0.7
    assert metrics.macro_f1 == pytest.approx((6 / 9 + 8 / 11) / 2, abs=SAME)
    assert metrics.matthews == pytest.approx((3 * 4 - 2 * 1) / math.sqrt(5 * 4 * 6 * 5), abs=SAME)


def test_three_classes_by_hand() -> None:
    metrics = _measure([0, 0, 1, 1, 2, 0], [0, 0, 1, 2, 2, 1], 3)
    assert metrics.accuracy == pytest.approx(4 / 6, abs=SAME)
    assert metrics.macro_f1 == pytest.approx((4 / 5 + 1 / 2 + 2 / 3) / 3, abs=SAME)
    # 4 right of 6; answered 3, 2, 1 times, true 2, 2, 2 times.
    assert metrics.matthews == pytest.approx((4 * 6 - 12) / math.sqrt((36 - 14) * (36 - 12)))


def test_a_label_that_never_occurs_does_not_count_in_the_mean() -> None:
    assert _measure([0, 3], [0, 3], 5).macro_f1 == 1.0
    assert _measure([0, 4], [0, 3], 5).macro_f1 == pytest.approx(1 / 3, abs=SAME)


@pytest.mark.parametrize(
    ("predicted", "true"), [([1, 1, 1], [0, 1, 2]), ([0, 1, 2], [1, 1, 1]), ([2, 2], [2, 2])]
)
def test_matthews_of_one_single_label_is_zero(predicted: list[int], true: list[int]) -> None:
    assert _measure(predicted, true, 3).matthews == 0.0


def test_matthews_reaches_both_its_ends() -> None:
    assert _measure([0, 1, 2, 2], [0, 1, 2, 2], 3).matthews == 1.0
    assert _measure([1, 0, 0], [0, 1, 1], 2).matthews == -1.0


def test_many_rows_do_not_overflow() -> None:
    true = torch.arange(200_000) % 2  # The product of both spreads is 4e20, past int64.
    assert measure(true, true, labels=2) == Metrics(1.0, 1.0, 1.0)
    assert measure(1 - true, true, labels=2) == Metrics(0.0, 0.0, -1.0)


_CLASSES = st.integers(2, 5).flatmap(
    lambda labels: st.tuples(
        st.just(labels),
        st.lists(
            st.tuples(st.integers(0, labels - 1), st.integers(0, labels - 1)),
            min_size=1,
            max_size=40,
        ),
    )
)


@pytest.mark.slow
@given(_CLASSES)
@settings(max_examples=200, deadline=None)
def test_metrics_match_their_definitions(case: tuple[int, list[tuple[int, int]]]) -> None:
    labels, rows = case
    predicted, true = (np.array(column) for column in zip(*rows, strict=True))
    metrics = _measure(predicted.tolist(), true.tolist(), labels)
    assert metrics.accuracy == pytest.approx(np.mean(predicted == true), abs=SAME)
    f1 = []
    for label in sorted({*predicted.tolist(), *true.tolist()}):
        hits = np.sum((predicted == label) & (true == label))
        precision = hits / max(np.sum(predicted == label), 1)
        recall = hits / max(np.sum(true == label), 1)
        f1.append(2 * precision * recall / (precision + recall) if hits else 0.0)
    assert metrics.macro_f1 == pytest.approx(np.mean(f1), abs=SAME)
    # Gorodkin: the covariance of the one-hot matrices, over the geometric mean of their own.
    one_hot = np.eye(labels)
    x, y = (one_hot[classes] - one_hot[classes].mean(axis=0) for classes in (predicted, true))
    spread = math.sqrt(float((x * x).sum()) * float((y * y).sum()))
    expected = float((x * y).sum()) / spread if spread > SAME else 0.0
    assert metrics.matthews == pytest.approx(expected, abs=1e-9)
    assert -1 <= metrics.matthews <= 1


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=1, max_size=40))
@settings(max_examples=100, deadline=None)
def test_matthews_of_two_classes_is_the_binary_formula(rows: list[tuple[int, int]]) -> None:
    tp, fp, fn, tn = (rows.count(cell) for cell in ((1, 1), (1, 0), (0, 1), (0, 0)))
    product = (tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)
    expected = (tp * tn - fp * fn) / math.sqrt(product) if product else 0.0
    predicted, true = (list(column) for column in zip(*rows, strict=True))
    assert _measure(predicted, true, 2).matthews == pytest.approx(expected, abs=SAME)


def test_every_metric_picks_its_figure() -> None:
    metrics = Metrics(accuracy=0.75, macro_f1=0.5, matthews=-0.25)
    figures = {str(metric): metric.of(metrics) for metric in Metric}
    assert figures == {
        "accuracy": 0.75,
        "accuracy-f1": 0.625,
        "matthews": -0.25,
        "macro-f1": 0.5,
        "micro-f1": 0.75,
    }


def test_tables_of_metrics_and_tasks_do_not_import_torch() -> None:
    script = "import sys, train.metrics, train.data.task_data; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, timeout=60)
