"""From predicted and true classes to figures, and which figure a task is judged by.

Knows no model. torch is only named here: reading a table of tasks does not import it.
"""

import math
from enum import StrEnum
from typing import TYPE_CHECKING, assert_never

from train.report.report import Metrics

if TYPE_CHECKING:
    from torch import Tensor
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

# --- merged from train.metrics


class Metric(StrEnum):
    """The one figure that a task is judged by: epochs, settings and methods are compared by it."""

    ACCURACY = "accuracy"
    # The plain mean of the two: as the ID-SPAM paper has MRPC and QQP.
    ACCURACY_F1 = "accuracy-f1"
    MATTHEWS = "matthews"
    MACRO_F1 = "macro-f1"

    def of(self, metrics: Metrics) -> float:
        """This figure; higher is better. matthews goes from -1 to 1, the others from 0 to 1."""
        match self:
            case Metric.ACCURACY:
                return metrics.accuracy
            case Metric.ACCURACY_F1:
                return (metrics.accuracy + metrics.macro_f1) / 2
            case Metric.MATTHEWS:
                return metrics.matthews
            case Metric.MACRO_F1:
                return metrics.macro_f1
            case _:
                assert_never(self)


def measure(predicted: "Tensor", true: "Tensor", *, labels: int) -> Metrics:
    """All figures of one set of answers.

    macro_f1 is the plain mean of F1 over the labels that occur among `true` or `predicted`;
    matthews is Gorodkin's coefficient for any number of classes (2004), 0.0 where all of `true` or
    all of `predicted` is one label and it is undefined.

    Args:
        predicted, true: int64 [rows], at least one row; classes from 0 to labels - 1.
    """
    # Rows of every label [labels], as Python's integers: their products do not overflow.
    hits: list[int] = true[predicted == true].bincount(minlength=labels).tolist()
    answered: list[int] = predicted.bincount(minlength=labels).tolist()
    given: list[int] = true.bincount(minlength=labels).tolist()
    rows, right = len(true), sum(hits)
    f1 = [2 * h / (a + g) for h, a, g in zip(hits, answered, given, strict=True) if a + g]
    return Metrics(
        accuracy=right / rows,
        macro_f1=math.fsum(f1) / len(f1),
        matthews=_matthews(rows, right, answered, given),
    )


def _matthews(rows: int, right: int, answered: list[int], given: list[int]) -> float:
    """The correlation of the one-hot answers with the one-hot truth."""
    spread_answered = rows**2 - sum(count**2 for count in answered)
    spread_given = rows**2 - sum(count**2 for count in given)
    if not spread_answered or not spread_given:
        return 0.0
    together = right * rows - sum(a * g for a, g in zip(answered, given, strict=True))
    return together / math.sqrt(spread_answered * spread_given)


# --- merged from train.assessment

RESAMPLES = 1000
# Ends of the 95 % interval.
TAILS = (0.025, 0.975)
BINS = 15
MATRIX_LABELS = 20
CONFUSIONS = 20
COVERAGES = (1.0, 0.9, 0.8, 0.5)

# Of resamples that are held at once.
_CHUNK_COUNTS = 2**20


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure of the rows, and the 95 % percentile bootstrap interval that holds it."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class LabelFigures:
    """One label. support: rows that have it. predicted: rows that were given it.

    precision: None where nothing was predicted; recall: where no row has the label; f1: where both.
    """

    label: str
    support: int
    predicted: int
    precision: float | None
    recall: float | None
    f1: float | None


@dataclass(frozen=True, slots=True)
class Confusion:
    """One kind of mistake: rows of label `true` that were given `predicted`."""

    true: str
    predicted: str
    count: int


@dataclass(frozen=True, slots=True)
class Bin:
    """Rows whose top score lies above `low`, up to `high`. score: its mean; None without rows."""

    low: float
    high: float
    rows: int
    score: float | None
    accuracy: float | None


@dataclass(frozen=True, slots=True)
class Reliability:
    """How far scores at one temperature can be taken at their word; 0 is best for all three.

    expected_calibration_error: share, 0 to 1. brier: 0 to 2. negative_log_likelihood: nats.
    """

    temperature: float
    bins: tuple[Bin, ...]
    expected_calibration_error: float
    brier: float
    negative_log_likelihood: float


@dataclass(frozen=True, slots=True)
class Coverage:
    """What answering only sure texts gives: those with a top score of at least `threshold`.

    coverage: the share asked for. rows: that are answered, ties included. accuracy: among them.
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
    logits: Tensor,
    classes: Tensor,
    labels: Sequence[str],
    *,
    temperature: float = 1.0,
    seed: int = 0,
) -> Assessment:
    """Measure the answers to one split, for scores that are a softmax.

    Args:
        logits: [rows, labels], any floating type and device, before the temperature.
        classes: int64 [rows], the true ones.
        temperature: what scores divide the logits by.
        seed: of the bootstrap's resamples.

    Raises:
        ValueError: no rows, shapes that do not fit each other, classes that are none of the labels,
            logits that are not finite, or a temperature that is not above 0.
    """
    logits, classes = logits.detach().double().cpu(), classes.cpu()
    _check(logits, classes, labels, temperature)
    predicted = logits.argmax(dim=1)
    right = predicted == classes
    cells, counts = torch.stack([classes, predicted]).unique(dim=1, return_counts=True)
    measured = measure(predicted, classes, labels=len(labels))
    accuracy, macro_f1, matthews = _estimates(measured, cells, counts, seed=seed)
    mistakes = [
        Confusion(labels[true], labels[given], count)
        for (true, given), count in zip(cells.T.tolist(), counts.tolist(), strict=True)
        if true != given
    ]
    mistakes.sort(key=lambda mistake: -mistake.count)
    matrix = torch.zeros(len(labels), len(labels), dtype=torch.int64)
    matrix[cells[0], cells[1]] = counts
    return Assessment(
        rows=len(classes),
        accuracy=accuracy,
        macro_f1=macro_f1,
        matthews=matthews,
        labels=_labels(classes, predicted, labels),
        matrix=tuple(map(tuple, matrix.tolist())) if len(labels) <= MATRIX_LABELS else None,
        confusions=tuple(mistakes[:CONFUSIONS]),
        unscaled=_reliability(logits, classes, right, temperature=1.0),
        scaled=_reliability(logits, classes, right, temperature=temperature),
        coverage=_coverage((logits / temperature).softmax(dim=1).amax(dim=1), right),
    )


def _check(logits: Tensor, classes: Tensor, labels: Sequence[str], temperature: float) -> None:
    if classes.dim() != 1 or logits.shape != (len(classes), len(labels)) or not len(classes):
        shapes = f"logits {list(logits.shape)}, classes {list(classes.shape)}"
        raise ValueError(f"{shapes}, {len(labels)} labels: expected [rows, labels] and [rows]")
    if int(classes.min()) < 0 or int(classes.max()) >= len(labels):
        raise ValueError(f"classes outside 0..{len(labels) - 1}")
    if not bool(logits.isfinite().all()):
        raise ValueError("logits that are not finite")
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature must be above 0, not {temperature}")


def _estimates(measured: Metrics, cells: Tensor, counts: Tensor, *, seed: int) -> list[Estimate]:
    """Accuracy, macro-F1 and Matthews, each with its percentile bootstrap interval.

    Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13. Rows drawn with
    replacement fall into the confusion's cells by a multinomial law, so cells are drawn instead of
    rows: the same distribution. With many labels of few rows, resamples lose labels and most of
    them can lie on one side of the figure; the interval is then widened to hold it.

    Args:
        cells: int64 [2, cells], true and predicted label of those that hold rows.
        counts: int64 [cells].
    """
    rows, random = int(counts.sum()), np.random.default_rng(seed)
    labels, shares = int(cells.max()) + 1, (counts.double() / rows).numpy()
    at_once = max(1, _CHUNK_COUNTS // (len(counts) + labels))
    drawn = []
    for start in range(0, RESAMPLES, at_once):
        sample = random.multinomial(rows, shares, size=min(at_once, RESAMPLES - start))
        drawn.append(_metrics(torch.from_numpy(sample).double(), cells, labels=labels))
    ends = torch.cat(drawn, dim=1).quantile(torch.tensor(TAILS).double(), dim=1).T.tolist()
    values = (measured.accuracy, measured.macro_f1, measured.matthews)
    return [
        Estimate(value, min(low, value), max(high, value))
        for value, (low, high) in zip(values, ends, strict=True)
    ]


def _metrics(counts: Tensor, cells: Tensor, *, labels: int) -> Tensor:
    """What `measure` measures, of many confusions at once: float64 [3, confusions].

    Args:
        counts: float64 [confusions, cells].
    """
    empty = torch.zeros(len(counts), labels, dtype=torch.float64)
    right = cells[0] == cells[1]
    hits = empty.index_add(1, cells[0, right], counts[:, right])
    support, given = (empty.index_add(1, index, counts) for index in cells)
    rows, correct, occurs = counts.sum(dim=1), hits.sum(dim=1), support + given
    macro_f1 = (2 * hits / occurs.clamp_min(1)).sum(dim=1) / (occurs > 0).sum(dim=1)
    agreement = correct * rows - (given * support).sum(dim=1)
    spread = rows.square() - torch.stack([given, support]).square().sum(dim=2)  # [2, confusions]
    matthews = agreement / spread.prod(dim=0).clamp_min(1).sqrt()
    return torch.stack([correct / rows, macro_f1, matthews])


def _labels(classes: Tensor, predicted: Tensor, names: Sequence[str]) -> tuple[LabelFigures, ...]:
    columns = (
        torch.bincount(index, minlength=len(names)).tolist()
        for index in (classes, predicted, classes[classes == predicted])
    )
    return tuple(
        LabelFigures(
            label,
            support=support,
            predicted=given,
            precision=hits / given if given else None,
            recall=hits / support if support else None,
            f1=2 * hits / (support + given) if support + given else None,
        )
        for label, support, given, hits in zip(names, *columns, strict=True)
    )


def _reliability(
    logits: Tensor, classes: Tensor, right: Tensor, *, temperature: float
) -> Reliability:
    """Bins of the top score, and what is made of them and of all scores.

    Bins above `low`, up to `high`, and their expected calibration error, the mean distance between
    score and accuracy weighted by rows: Guo et al., On Calibration of Modern Neural Networks, 2017.
    Brier (1950): the mean over rows of the squared distance between scores and the true label's
    one-hot vector, so twice the one-sided form for two labels. right: bool [rows].
    """
    logs = (logits / temperature).log_softmax(dim=1)
    scores, true = logs.exp(), classes[:, None]
    top = scores.amax(dim=1)
    distances = scores.square().sum(dim=1) - 2 * scores.gather(1, true)[:, 0] + 1
    index = torch.bucketize(top, torch.arange(1, BINS).double() / BINS)
    rows = torch.bincount(index, minlength=BINS).tolist()
    score, hits = (
        torch.bincount(index, weights=weights, minlength=BINS) for weights in (top, right.double())
    )
    return Reliability(
        temperature=temperature,
        bins=tuple(
            Bin(
                low=number / BINS,
                high=(number + 1) / BINS,
                rows=count,
                score=float(score[number]) / count if count else None,
                accuracy=float(hits[number]) / count if count else None,
            )
            for number, count in enumerate(rows)
        ),
        expected_calibration_error=float((score - hits).abs().sum()) / len(classes),
        brier=max(0.0, float(distances.mean())),
        negative_log_likelihood=-float(logs.gather(1, true).mean()),
    )


def _coverage(top: Tensor, right: Tensor) -> tuple[Coverage, ...]:
    """Accuracy among the most confident: El-Yaniv and Wiener (2010), Geifman and El-Yaniv (2017).

    Args:
        top: float64 [rows], each row's highest score.
        right: bool [rows].
    """
    ranked = top.sort(descending=True).values
    found = []
    for coverage in COVERAGES:
        threshold = ranked[math.ceil(coverage * len(top)) - 1]
        answered = top >= threshold
        accuracy = float(right[answered].double().mean())
        found.append(Coverage(coverage, float(threshold), int(answered.sum()), accuracy))
    return tuple(found)
