"""From predicted and true sets of labels to figures: where a text may have several, or none.

Nothing here imports torch when it is loaded.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from train.metrics import (
    RESAMPLES,
    TAILS,
    Estimate,
    LabelFigures,
    MultiLabelMetrics,
    Reliability,
    calibration_error,
    draw_rows,
    reliability_bins,
)

if TYPE_CHECKING:
    from torch import Tensor

# How many numbers of a block of resamples are held in memory at once.
_CHUNK_NUMBERS = 2**21

_Array: TypeAlias = NDArray[Any]


def measure_sets(predicted: "Tensor", true: "Tensor") -> MultiLabelMetrics:
    """All figures of predicted sets of labels.

    macro_f1 is the plain mean over the labels that occur in `true` or `predicted`. F1 is 0.0 where
    nothing occurs in either, as in scikit-learn; exact_match then tells that all is right.

    Args:
        predicted, true: bool [rows, labels], at least one row.
    """
    hits: list[int] = (predicted & true).sum(dim=0).tolist()
    predictions: list[int] = predicted.sum(dim=0).tolist()
    supports: list[int] = true.sum(dim=0).tolist()
    f1 = [2 * h / (p + s) for h, p, s in zip(hits, predictions, supports, strict=True) if p + s]
    occurrences = sum(predictions) + sum(supports)
    return MultiLabelMetrics(
        micro_f1=2 * sum(hits) / occurrences if occurrences else 0.0,
        macro_f1=math.fsum(f1) / len(f1) if f1 else 0.0,
        exact_match=int((predicted == true).all(dim=1).sum()) / len(true),
    )


@dataclass(frozen=True, slots=True)
class MultiLabelAssessment:
    """Everything that a model card says about one split; `dataclasses.asdict` of it is JSON.

    labels, thresholds: in the adapter's order. sizes: (labels of a text, texts that have so many,
    texts that were given so many), 0 among them. unscaled, scaled: of all decisions about a label
    and a text, at temperature 1 and at the adapter's.
    """

    rows: int
    micro_f1: Estimate
    macro_f1: Estimate
    exact_match: Estimate
    labels: tuple[LabelFigures, ...]
    thresholds: tuple[float, ...]
    sizes: tuple[tuple[int, int, int], ...]
    unscaled: Reliability
    scaled: Reliability


def assess_sets(
    logits: "Tensor",
    classes: "Tensor",
    labels: Sequence[str],
    *,
    thresholds: Sequence[float],
    temperature: float = 1.0,
    predicted: "Tensor | None" = None,
    seed: int = 0,
) -> MultiLabelAssessment:
    """Measure the predictions for one split, with scores that are a sigmoid of the logits.

    Args:
        logits: [rows, labels], any floating type and device, before the temperature.
        classes: [rows, labels], 1 for the true labels.
        thresholds: [labels]; a label is predicted if its score reaches its threshold.
        temperature: the scores divide the logits by it.
        predicted: bool [rows, labels], where the answers are known; by default from the logits.
        seed: of the bootstrap's resamples.

    Raises:
        ValueError: no rows, shapes that do not match, or logits that are not finite.
    """
    logits, true = logits.detach().double().cpu(), classes.cpu() > 0
    if logits.shape != true.shape or logits.shape[1:] != (len(labels),) or not len(true):
        shapes = f"logits {list(logits.shape)}, classes {list(classes.shape)}"
        raise ValueError(f"{shapes}, {len(labels)} labels: expected [rows, labels] twice")
    if not bool(logits.isfinite().all()):
        raise ValueError("logits that are not finite")
    if predicted is None:
        predicted = reached(logits, thresholds, temperature)
    has, given = true.numpy(), predicted.numpy()
    estimates = _estimates(measure_sets(predicted, true), has, given, seed=seed)
    most = int(max(has.sum(axis=1).max(), given.sum(axis=1).max()))
    counts = [np.bincount(sets.sum(axis=1), minlength=most + 1).tolist() for sets in (has, given)]
    return MultiLabelAssessment(
        rows=len(has),
        micro_f1=estimates[0],
        macro_f1=estimates[1],
        exact_match=estimates[2],
        labels=label_figures(predicted, true, labels),
        thresholds=tuple(thresholds),
        sizes=tuple(zip(range(most + 1), *counts, strict=True)),
        unscaled=_reliability(logits.numpy(), has, temperature=1.0),
        scaled=_reliability(logits.numpy(), has, temperature=temperature),
    )


def reached(logits: "Tensor", thresholds: Sequence[float], temperature: float) -> "Tensor":
    """Which labels are predicted, as the service decides it: bool [rows, labels].

    The scores are float32 and the comparison is exact.
    """
    import torch

    from adapters.packed.head import scores

    limits = torch.tensor(thresholds, dtype=torch.float64, device=logits.device)
    return scores(logits, "sigmoid", temperature).double() >= limits


def _estimates(
    measured: MultiLabelMetrics, has: _Array, given: _Array, *, seed: int
) -> list[Estimate]:
    """micro-F1, macro-F1 and exact match, each with its percentile bootstrap interval over texts.

    As `train.metrics` does it for one label a text: Efron and Tibshirani, 1993, chapter 13, and the
    interval is widened to include the figure.
    """
    rows, labels = has.shape
    random = np.random.default_rng(seed)
    features = _features(has, given)
    at_once = max(1, _CHUNK_NUMBERS // (rows + 2 * labels + 1))
    figures = []
    for start in range(0, RESAMPLES, at_once):
        size = min(at_once, RESAMPLES - start)
        drawn = random.multinomial(rows, np.full(rows, 1 / rows), size=size).astype(np.float32)
        figures.append(_figures_of(drawn, features))
    ends = np.quantile(np.concatenate(figures, axis=1), TAILS, axis=1).T.tolist()
    values = (measured.micro_f1, measured.macro_f1, measured.exact_match)
    return [
        Estimate(value, min(low, value), max(high, value))
        for value, (low, high) in zip(values, ends, strict=True)
    ]


def resampled_set_metrics(
    predicted: "Tensor", true: "Tensor", *, seed: int
) -> list[MultiLabelMetrics]:
    """The figures of `measure_sets` on the resamples of `train.metrics.resampled_metrics`.

    Args:
        predicted, true: bool [rows, labels].
    """
    features, figures = _features(true.numpy(), predicted.numpy()), []
    for rows in draw_rows(len(true), seed=seed):
        flat = np.arange(len(rows))[:, None] * len(true) + rows
        drawn = np.bincount(flat.ravel(), minlength=rows.size).reshape(rows.shape)
        figures.append(_figures_of(drawn.astype(np.float32), features))
    return [MultiLabelMetrics(*each) for each in np.concatenate(figures, axis=1).T.tolist()]


def _features(has: _Array, given: _Array) -> _Array:
    """Of every row its hits of each label, their occurrences in both, and whether all is right:
    float32 [rows, 2 * labels + 1]."""
    return np.concatenate(
        [has & given, has.astype(np.int8) + given, (has == given).all(axis=1)[:, None]], axis=1
    ).astype(np.float32)


def _figures_of(drawn: _Array, features: _Array) -> _Array:
    """micro-F1, macro-F1 and exact match of resamples, float64 [3, resamples].

    Args:
        drawn: float32 [resamples, rows], how often each row was drawn.
    """
    sums, labels = (drawn @ features).astype(np.float64), features.shape[1] // 2
    hits, occurs = sums[:, :labels], sums[:, labels:-1]
    f1 = (2 * hits / np.maximum(occurs, 1)).sum(axis=1)
    macro = f1 / np.maximum((occurs > 0).sum(axis=1), 1)
    micro = 2 * hits.sum(axis=1) / np.maximum(occurs.sum(axis=1), 1)
    return np.stack([micro, macro, sums[:, -1] / len(features)])


def label_figures(
    predicted: "Tensor", true: "Tensor", labels: Sequence[str]
) -> tuple[LabelFigures, ...]:
    """Every label's figures. predicted, true: bool [rows, labels]."""
    columns = (sets.sum(dim=0).tolist() for sets in (true, predicted, true & predicted))
    return tuple(
        LabelFigures(
            label,
            support=support,
            predicted=given,
            precision=hits / given if given else None,
            recall=hits / support if support else None,
            f1=2 * hits / (support + given) if support + given else None,
        )
        for label, support, given, hits in zip(labels, *columns, strict=True)
    )


def _reliability(logits: _Array, has: _Array, *, temperature: float) -> Reliability:
    """How well the scores of all decisions match reality; in a bin, `accuracy` is the share of its
    decisions whose text has the label.

    brier: the mean squared distance, 0 to 1. negative_log_likelihood: nats a decision.
    """
    scaled = (logits / temperature).ravel()
    true = has.ravel()
    scores = 1 / (1 + np.exp(-scaled))
    # softplus(-z) for a label that the text has, softplus(z) for another.
    losses = np.logaddexp(0.0, np.where(true, -scaled, scaled))
    return Reliability(
        temperature=temperature,
        bins=reliability_bins(scores, true),
        expected_calibration_error=calibration_error(scores, true),
        brier=float(np.square(scores - true).mean()),
        negative_log_likelihood=float(losses.mean()),
    )
