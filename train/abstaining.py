"""When an adapter should abstain: coverage against accuracy, and the threshold of a precision.

An adapter that gives one label a text abstains from a text whose best score is below a threshold.
Both are measured on validation rows, on the scores as they are served.

A threshold for a target precision is a promise about other texts, so it is chosen by tests. Of a
threshold above which e of n rows are wrong, the hypothesis "a share of 1 - precision or more is
wrong" is rejected if so few errors would be rare under it: the exact binomial test, which is the
lower bound of Clopper and Pearson (1934). Trying thresholds until one passes would be optimistic,
the more so the fewer rows there are. So they are tried in a fixed order, from high to low, and the
first one that fails ends it; such a sequence errs no more often than one test. It is begun at
several places (all rows, the better half, the best quarter, ...), which share the allowed error
among them: Learn then Test, Angelopoulos et al. 2021, section 4, fixed sequences with several
starts.

Nothing here imports torch when it is loaded.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

# A threshold that is chosen for a precision reaches it with this probability.
CONFIDENCE = 0.95
# Shares of the rows at which the stored curve is measured.
CURVE = tuple(step / 20 for step in range(20, 0, -1))
# Thresholds have so many digits, rounded down: all figures are those of the rounded ones.
DIGITS = 6
# Thresholds that a precision is tried at.
_STEPS = 200

_Array = NDArray[Any]


@dataclass(frozen=True, slots=True)
class Answered:
    """What is left if texts whose best score is below `threshold` are not answered.

    rows: how many there are. answered: how many of them get an answer. accuracy: the share of these
    answers that is right; None if there are none.
    """

    threshold: float
    rows: int
    answered: int
    accuracy: float | None

    @property
    def coverage(self) -> float:
        """The share of the rows that is answered."""
        return self.answered / self.rows


class Judged:
    """The best score of each row, and whether its label is right.

    Args:
        scores: float32 [rows, labels] as they are served, at least one row.
        true: int64 [rows].
    """

    def __init__(self, scores: "Tensor", true: "Tensor") -> None:
        best = scores.cpu().max(dim=-1)
        order = best.values.argsort(descending=True, stable=True)
        self._scores: _Array = best.values[order].double().numpy()
        self._wrong: _Array = (best.indices != true.cpu())[order].numpy()
        # By how many of the best rows are answered, from none to all.
        self._errors: _Array = np.concatenate([[0], self._wrong.cumsum()])

    @classmethod
    def of_logits(cls, logits: "Tensor", true: "Tensor", *, temperature: float) -> Self:
        """logits: float [rows, labels], before the temperature."""
        from adapters.packed.head import scores

        return cls(scores(logits.cpu(), "softmax", temperature), true)

    @property
    def rows(self) -> int:
        return len(self._scores)

    def answered(self, threshold: float) -> Answered:
        """What a threshold leaves."""
        count = self._above(threshold)
        accuracy = 1 - float(self._errors[count]) / count if count else None
        return Answered(threshold, self.rows, count, accuracy)

    def curve(self) -> tuple[Answered, ...]:
        """The thresholds that answer about the shares of `CURVE`, all rows first."""
        return tuple(self.answered(threshold) for threshold in self._thresholds(CURVE)[::-1])

    def threshold(self, precision: float) -> float | None:
        """The lowest threshold whose answers reach a precision with `CONFIDENCE`.

        0 if all texts may be answered; None if no threshold passes.

        Args:
            precision: the share of answers that are right, between 0 and 1.
        """
        thresholds = self._thresholds([step / _STEPS for step in range(1, _STEPS)], everything=True)
        counts = [self._above(threshold) for threshold in thresholds]
        starts = [count for count in _halvings(self.rows) if count >= least_rows(precision)]
        if not starts:
            return None
        limit = (1 - CONFIDENCE) / len(starts)
        logs = np.concatenate([[0.0], np.log(np.arange(1, self.rows + 1)).cumsum()])
        passed = [
            _chance(int(self._errors[count]), count, 1 - precision, logs) <= limit
            for count in counts
        ]
        lowest = None
        for start in starts:
            at = next(index for index, count in enumerate(counts) if count >= start)
            while at < len(counts) and passed[at]:
                lowest = at if lowest is None else max(lowest, at)
                at += 1
        return None if lowest is None else thresholds[lowest]

    def highest_precision(self) -> float | None:
        """The highest precision, in whole percent, that some threshold reaches; None below 1 %."""
        for percent in range(99, 0, -1):
            if self.threshold(percent / 100) is not None:
                return percent / 100
        return None

    def _above(self, threshold: float) -> int:
        """How many rows have at least this score."""
        return int(np.searchsorted(-self._scores, -threshold, side="right"))

    def _thresholds(self, shares: Sequence[float], *, everything: bool = False) -> list[float]:
        """Distinct thresholds that answer about these shares of the rows, the highest first.

        Args:
            everything: end with 0, that answers texts whatever their scores are.
        """
        scale = 10**DIGITS
        places = {math.ceil(share * self.rows) - 1 for share in shares}
        found = {math.floor(self._scores[place] * scale) / scale for place in places}
        return sorted(found | ({0.0} if everything else set()), reverse=True)


def least_rows(precision: float) -> int:
    """With fewer rows no threshold passes, even if all answers are right."""
    return math.ceil(math.log(1 - CONFIDENCE) / math.log(precision))


def _halvings(rows: int) -> list[int]:
    halves = []
    while rows:
        halves.append(rows)
        rows //= 2
    return halves


def _chance(errors: int, count: int, rate: float, logs: _Array) -> float:
    """The probability of at most so many errors among `count` rows, if each is one with `rate`.

    1 where there are as many as the rate lets expect: that is no evidence.

    Args:
        logs: the logarithms of the factorials of 0 to at least `count`.
    """
    if errors >= count * rate:
        return 1.0
    some = np.arange(errors + 1)
    chances = logs[count] - logs[some] - logs[count - some]
    chances += some * math.log(rate) + (count - some) * math.log1p(-rate)
    return min(1.0, float(np.exp(chances).sum()))
