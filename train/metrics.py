"""From predicted and true classes to figures, and which figure a task is judged by.

Knows no model. torch is only named here: reading a table of tasks does not import it.
"""

import math
from enum import StrEnum
from typing import TYPE_CHECKING, assert_never

from train.report import Metrics

if TYPE_CHECKING:
    from torch import Tensor


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
