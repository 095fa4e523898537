"""From predicted and true classes to figures: the metric that judges a task, and a full assessment.

Nothing here imports torch when it is loaded, so that commands which only list tasks start quickly.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, TypeAlias, assert_never

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

RESAMPLES = 1000
# Ends of the 95 % interval.
TAILS = (0.025, 0.975)
BINS = 15
MATRIX_LABELS = 20
CONFUSIONS = 20
COVERAGES = (1.0, 0.9, 0.8, 0.5)

# How many counts of resamples are held in memory at once.
_CHUNK_COUNTS = 2**20

_Array: TypeAlias = NDArray[Any]


@dataclass(frozen=True, slots=True)
class Metrics:
    """Shares from 0 to 1. macro_f1 is the plain mean of the labels' F1.

    matthews: the correlation of predictions and truth, from -1 to 1; 0.0 where it is undefined.
    """

    accuracy: float
    macro_f1: float
    matthews: float


@dataclass(frozen=True, slots=True)
class MultiLabelMetrics:
    """Figures where a text has a set of labels; shares from 0 to 1.

    micro_f1: of all decisions about a label and a text together. macro_f1: the plain mean of the
    labels' F1. exact_match: texts whose whole set is right, scikit-learn's subset accuracy.
    """

    micro_f1: float
    macro_f1: float
    exact_match: float


class Metric(StrEnum):
    """The figure that judges a task: epochs, settings and methods are compared by it."""

    # Of sets of labels: the share of texts whose whole set is right.
    ACCURACY = "accuracy"
    # The plain mean of both, which the ID-SPAM paper reports for MRPC and QQP.
    ACCURACY_F1 = "accuracy-f1"
    MATTHEWS = "matthews"
    MACRO_F1 = "macro-f1"
    # With one label and one answer a text, it is the accuracy.
    MICRO_F1 = "micro-f1"

    @classmethod
    def default(cls, *, multi_label: bool) -> "Metric":
        """What judges data without a metric of its own."""
        return cls.MICRO_F1 if multi_label else cls.ACCURACY

    def of(self, metrics: "AnyMetrics") -> float:
        """The figure; higher is better. `MATTHEWS` ranges from -1 to 1, the others from 0 to 1."""
        if isinstance(metrics, MultiLabelMetrics):
            return self._of_sets(metrics)
        match self:
            case Metric.ACCURACY | Metric.MICRO_F1:
                return metrics.accuracy
            case Metric.ACCURACY_F1:
                return (metrics.accuracy + metrics.macro_f1) / 2
            case Metric.MATTHEWS:
                return metrics.matthews
            case Metric.MACRO_F1:
                return metrics.macro_f1
            case _:
                assert_never(self)

    def _of_sets(self, metrics: MultiLabelMetrics) -> float:
        match self:
            case Metric.ACCURACY:
                return metrics.exact_match
            case Metric.ACCURACY_F1:
                return (metrics.exact_match + metrics.macro_f1) / 2
            case Metric.MATTHEWS:
                raise ValueError("sets of labels have no single correlation")
            case Metric.MACRO_F1:
                return metrics.macro_f1
            case Metric.MICRO_F1:
                return metrics.micro_f1
            case _:
                assert_never(self)


AnyMetrics: TypeAlias = Metrics | MultiLabelMetrics


def reported(metrics: AnyMetrics) -> dict[Metric, float]:
    """The figures of a table of results, each once: with one label a text, micro-F1 is accuracy."""
    several = isinstance(metrics, MultiLabelMetrics)
    left_out = {Metric.ACCURACY_F1, Metric.MATTHEWS} if several else {Metric.MICRO_F1}
    return {metric: metric.of(metrics) for metric in Metric if metric not in left_out}


def measure(predicted: "Tensor", true: "Tensor", *, labels: int) -> Metrics:
    """All figures of one set of predictions.

    macro_f1 is the plain mean of F1 over the labels that occur in `true` or `predicted`. matthews
    is Gorodkin's coefficient for any number of classes (2004); it is undefined, and 0.0 here, where
    `true` or `predicted` holds a single label.

    Args:
        predicted, true: int64 [rows], at least one row; classes from 0 to labels - 1.
    """
    # Rows of every label [labels], as Python integers: their products do not overflow.
    hits: list[int] = true[predicted == true].bincount(minlength=labels).tolist()
    predictions: list[int] = predicted.bincount(minlength=labels).tolist()
    supports: list[int] = true.bincount(minlength=labels).tolist()
    rows, right = len(true), sum(hits)
    f1 = [2 * h / (p + s) for h, p, s in zip(hits, predictions, supports, strict=True) if p + s]
    return Metrics(
        accuracy=right / rows,
        macro_f1=math.fsum(f1) / len(f1),
        matthews=_matthews(rows, right, predictions, supports),
    )


def _matthews(rows: int, right: int, predictions: list[int], supports: list[int]) -> float:
    """The correlation of the one-hot predictions with the one-hot truth."""
    predicted_spread = rows**2 - sum(count**2 for count in predictions)
    true_spread = rows**2 - sum(count**2 for count in supports)
    if not predicted_spread or not true_spread:
        return 0.0
    agreement = right * rows - sum(p * s for p, s in zip(predictions, supports, strict=True))
    return agreement / math.sqrt(predicted_spread * true_spread)


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure, and its 95 % percentile bootstrap interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class LabelFigures:
    """The figures of one label. support: rows that have it. predicted: rows predicted as it.

    precision is None if nothing was predicted as it, recall if no row has it, f1 if both.
    """

    label: str
    support: int
    predicted: int
    precision: float | None
    recall: float | None
    f1: float | None


@dataclass(frozen=True, slots=True)
class Confusion:
    """One kind of mistake: rows of label `true` that were predicted as `predicted`."""

    true: str
    predicted: str
    count: int


@dataclass(frozen=True, slots=True)
class Bin:
    """Rows whose top score is above `low` and at most `high`. score: their mean top score.

    score and accuracy are None without rows.
    """

    low: float
    high: float
    rows: int
    score: float | None
    accuracy: float | None


@dataclass(frozen=True, slots=True)
class Reliability:
    """How well scores at one temperature match reality; 0 is best for all three figures.

    expected_calibration_error: share, 0 to 1. brier: 0 to 2. negative_log_likelihood: nats.
    """

    temperature: float
    bins: tuple[Bin, ...]
    expected_calibration_error: float
    brier: float
    negative_log_likelihood: float


@dataclass(frozen=True, slots=True)
class Coverage:
    """The accuracy if only texts with a top score of at least `threshold` are answered.

    coverage: the share of texts to answer. rows: how many are answered, ties included.
    """

    coverage: float
    threshold: float
    rows: int
    accuracy: float


@dataclass(frozen=True, slots=True)
class Assessment:
    """Everything that a model card says about one split; `dataclasses.asdict` of it is JSON.

    labels: in the adapter's order. matrix: rows true, columns predicted; None above
    `MATRIX_LABELS` labels. confusions: the most frequent mistakes, at most `CONFUSIONS`.
    unscaled, scaled: at temperature 1 and at the adapter's. coverage: at the adapter's.
    """

    rows: int
    accuracy: Estimate
    macro_f1: Estimate
    matthews: Estimate
    labels: tuple[LabelFigures, ...]
    matrix: tuple[tuple[int, ...], ...] | None
    confusions: tuple[Confusion, ...]
    unscaled: Reliability
    scaled: Reliability
    coverage: tuple[Coverage, ...]


def assess(
    logits: "Tensor",
    classes: "Tensor",
    labels: Sequence[str],
    *,
    temperature: float = 1.0,
    seed: int = 0,
) -> Assessment:
    """Measure the predictions for one split, with scores that are a softmax of the logits.

    Args:
        logits: [rows, labels], any floating type and device, before the temperature.
        classes: int64 [rows], the true ones.
        temperature: the scores divide the logits by it.
        seed: of the bootstrap's resamples.

    Raises:
        ValueError: no rows, shapes that do not match, classes outside the labels, logits that are
            not finite, or a temperature that is not above 0.
    """
    logits, classes = logits.detach().double().cpu(), classes.cpu()
    _check(logits, classes, labels, temperature)
    predicted = logits.argmax(dim=1)
    true, answers = classes.numpy(), predicted.numpy()
    right = true == answers
    pairs, counts = np.unique(true * len(labels) + answers, return_counts=True)
    cells = np.stack(np.divmod(pairs, len(labels)))
    accuracy, macro_f1, matthews = _estimates(
        measure(predicted, classes, labels=len(labels)), cells, counts, seed=seed
    )
    mistakes = [
        Confusion(labels[one], labels[other], count)
        for one, other, count in zip(*cells.tolist(), counts.tolist(), strict=True)
        if one != other
    ]
    mistakes.sort(key=lambda mistake: -mistake.count)
    plain = _log_softmax(logits.numpy())
    tempered = _log_softmax(logits.numpy() / temperature)
    return Assessment(
        rows=len(true),
        accuracy=accuracy,
        macro_f1=macro_f1,
        matthews=matthews,
        labels=_label_figures(true, answers, labels),
        matrix=_matrix(cells, counts, len(labels)) if len(labels) <= MATRIX_LABELS else None,
        confusions=tuple(mistakes[:CONFUSIONS]),
        unscaled=_reliability(plain, true, right, temperature=1.0),
        scaled=_reliability(tempered, true, right, temperature=temperature),
        coverage=_coverage(np.exp(tempered).max(axis=1), right),
    )


def _check(logits: "Tensor", classes: "Tensor", labels: Sequence[str], temperature: float) -> None:
    if classes.dim() != 1 or logits.shape != (len(classes), len(labels)) or not len(classes):
        shapes = f"logits {list(logits.shape)}, classes {list(classes.shape)}"
        raise ValueError(f"{shapes}, {len(labels)} labels: expected [rows, labels] and [rows]")
    if int(classes.min()) < 0 or int(classes.max()) >= len(labels):
        raise ValueError(f"classes outside 0..{len(labels) - 1}")
    if not bool(logits.isfinite().all()):
        raise ValueError("logits that are not finite")
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature must be above 0, not {temperature}")


def _log_softmax(logits: _Array) -> _Array:
    shifted: _Array = logits - logits.max(axis=1, keepdims=True)
    logs: _Array = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return logs


def _matrix(cells: _Array, counts: _Array, labels: int) -> tuple[tuple[int, ...], ...]:
    matrix = np.zeros((labels, labels), dtype=np.int64)
    matrix[cells[0], cells[1]] = counts
    return tuple(map(tuple, matrix.tolist()))


def _estimates(measured: Metrics, cells: _Array, counts: _Array, *, seed: int) -> list[Estimate]:
    """Accuracy, macro-F1 and Matthews, each with its percentile bootstrap interval.

    Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13. The rows of a resample
    fall into the cells of the confusion matrix by a multinomial distribution, so cells are drawn
    instead of rows. If there are many labels of few rows each, resamples lose labels, and most of
    them can lie on one side of the figure; the interval is then widened to include it.

    Args:
        cells: int64 [2, cells], true and predicted label of the cells that are not empty.
        counts: int64 [cells].
    """
    rows, random = int(counts.sum()), np.random.default_rng(seed)
    labels, shares = int(cells.max()) + 1, counts / rows
    at_once = max(1, _CHUNK_COUNTS // (len(counts) + labels))
    drawn = [
        _resampled_metrics(
            random.multinomial(rows, shares, size=min(at_once, RESAMPLES - start)), cells, labels
        )
        for start in range(0, RESAMPLES, at_once)
    ]
    ends = np.quantile(np.concatenate(drawn, axis=1), TAILS, axis=1).T.tolist()
    values = (measured.accuracy, measured.macro_f1, measured.matthews)
    return [
        Estimate(value, min(low, value), max(high, value))
        for value, (low, high) in zip(values, ends, strict=True)
    ]


def _resampled_metrics(counts: _Array, cells: _Array, labels: int) -> _Array:
    """The figures of `measure` for many confusion matrices at once: float64 [3, matrices].

    Args:
        counts: int64 [matrices, cells].
    """

    def per_label(index: _Array, values: _Array) -> _Array:
        """Sums of values [matrices, cells] by label, float64 [matrices, labels]."""
        flat = np.arange(len(values))[:, None] * labels + index
        sums = np.bincount(flat.ravel(), values.ravel(), minlength=len(values) * labels)
        return sums.reshape(len(values), labels)

    right = cells[0] == cells[1]
    hits = per_label(cells[0, right], counts[:, right])
    support, predicted = (per_label(index, counts) for index in cells)
    rows, correct, occurs = counts.sum(axis=1), hits.sum(axis=1), support + predicted
    macro_f1 = (2 * hits / np.maximum(occurs, 1)).sum(axis=1) / (occurs > 0).sum(axis=1)
    agreement = correct * rows - (predicted * support).sum(axis=1)
    spreads = [np.square(rows) - np.square(margin).sum(axis=1) for margin in (predicted, support)]
    matthews = agreement / np.sqrt(np.maximum(spreads[0] * spreads[1], 1))
    return np.stack([correct / rows, macro_f1, matthews])


def resampled_metrics(
    predicted: "Tensor", true: "Tensor", *, labels: int, seed: int
) -> list[Metrics]:
    """The figures of `measure` on `RESAMPLES` resamples of the rows.

    The same seed and number of rows give the same resamples, so the differences of two methods are
    paired.

    Args:
        predicted, true: int64 [rows].
    """
    pairs, cell_of = np.unique((true * labels + predicted).numpy(), return_inverse=True)
    cells = np.stack(np.divmod(pairs, labels))
    drawn = []
    for rows in draw_rows(len(true), seed=seed):
        flat = np.arange(len(rows))[:, None] * len(pairs) + cell_of.ravel()[rows]
        counts = np.bincount(flat.ravel(), minlength=len(rows) * len(pairs))
        drawn.append(_resampled_metrics(counts.reshape(len(rows), -1), cells, labels))
    return [Metrics(*figures) for figures in np.concatenate(drawn, axis=1).T.tolist()]


def draw_rows(rows: int, *, seed: int) -> Iterator[_Array]:
    """Positions of the rows of `RESAMPLES` resamples, some at a time: int64 [resamples, rows]."""
    random, at_once = np.random.default_rng(seed), max(1, _CHUNK_COUNTS // rows)
    for start in range(0, RESAMPLES, at_once):
        yield random.integers(rows, size=(min(at_once, RESAMPLES - start), rows))


def _label_figures(
    true: _Array, answers: _Array, labels: Sequence[str]
) -> tuple[LabelFigures, ...]:
    columns = (
        np.bincount(classes, minlength=len(labels)).tolist()
        for classes in (true, answers, true[true == answers])
    )
    return tuple(
        LabelFigures(
            label,
            support=support,
            predicted=predicted,
            precision=hits / predicted if predicted else None,
            recall=hits / support if support else None,
            f1=2 * hits / (support + predicted) if support + predicted else None,
        )
        for label, support, predicted, hits in zip(labels, *columns, strict=True)
    )


def _reliability(logs: _Array, true: _Array, right: _Array, *, temperature: float) -> Reliability:
    """Bins of the top score, their calibration error, and proper scoring rules of all scores.

    The expected calibration error is the mean distance between score and accuracy, weighted by
    rows, over bins above `low`, up to `high`: Guo et al., On Calibration of Modern Neural Networks,
    2017. Brier (1950): the mean over rows of the squared distance between the scores and the
    one-hot truth, so twice the one-sided form for two labels.

    Args:
        logs: float64 [rows, labels], logarithms of the scores.
        right: bool [rows].
    """
    scores, rows = np.exp(logs), np.arange(len(true))
    top = scores.max(axis=1)
    distances = np.square(scores).sum(axis=1) - 2 * scores[rows, true] + 1
    return Reliability(
        temperature=temperature,
        bins=reliability_bins(top, right),
        expected_calibration_error=calibration_error(top, right),
        brier=max(0.0, float(distances.mean())),
        negative_log_likelihood=-float(logs[rows, true].mean()),
    )


def reliability_bins(scores: _Array, right: _Array) -> tuple[Bin, ...]:
    """What scores promise, and what became of it, in `BINS` bins.

    Args:
        scores: float64, any shape.
        right: bool of that shape, whether what a score is of is so.
    """
    counts, promised, hits = _binned(scores, right)
    return tuple(
        Bin(
            low=number / BINS,
            high=(number + 1) / BINS,
            rows=count,
            score=float(promised[number]) / count if count else None,
            accuracy=float(hits[number]) / count if count else None,
        )
        for number, count in enumerate(counts.tolist())
    )


def calibration_error(scores: _Array, right: _Array) -> float:
    """The expected calibration error of scores, 0 to 1; the arguments of `reliability_bins`."""
    _, promised, hits = _binned(scores, right)
    return float(np.abs(promised - hits).sum()) / scores.size


def _binned(scores: _Array, right: _Array) -> tuple[_Array, _Array, _Array]:
    """Of every bin: how many scores, their sum, and how many are right."""
    flat = scores.ravel()
    index = np.searchsorted(np.arange(1, BINS) / BINS, flat)
    promised = np.bincount(index, flat, minlength=BINS)
    hits = np.bincount(index, right.ravel(), minlength=BINS)
    return np.bincount(index, minlength=BINS), promised, hits


def _coverage(top: _Array, right: _Array) -> tuple[Coverage, ...]:
    """Accuracy among the most confident: El-Yaniv and Wiener (2010), Geifman and El-Yaniv (2017).

    Args:
        top: float64 [rows], each row's highest score.
        right: bool [rows].
    """
    ranked = np.sort(top)[::-1]
    coverages = []
    for coverage in COVERAGES:
        threshold = ranked[math.ceil(coverage * len(top)) - 1]
        answered = top >= threshold
        accuracy = float(right[answered].mean())
        coverages.append(Coverage(coverage, float(threshold), int(answered.sum()), accuracy))
    return tuple(coverages)
