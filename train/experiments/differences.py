"""Which differences between methods are larger than chance: a paired bootstrap over reported rows.

The rows of a split are drawn again and again, the same ones for all methods (Efron and Tibshirani,
An Introduction to the Bootstrap, 1993, chapter 13; Berg-Kirkpatrick, Burkett and Klein, An
Empirical Investigation of Statistical Significance in NLP, 2012). Of a method with several seeds,
seeds are drawn as well: another seed would have given other answers.
"""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from train.data.dataset import Dataset
from train.experiments.answers import unpacked
from train.experiments.cells import Cell, Outcomes, TaskSplits
from train.loop.encoded_splits import classes_of
from train.metrics import RESAMPLES, TAILS, Metric, resampled_metrics
from train.set_metrics import resampled_set_metrics

_Array: TypeAlias = NDArray[Any]


@dataclass(frozen=True, slots=True)
class Difference:
    """How much higher one score is than another, and the 95 % interval; shares."""

    value: float
    low: float
    high: float

    @property
    def is_real(self) -> bool:
        """Whether it is larger than chance: zero is outside the interval."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True, slots=True)
class Spread:
    """A method's score on one split, or its mean over several: the figure and its resamples.

    drawn: float64 [RESAMPLES].
    """

    value: float
    drawn: _Array

    def minus(self, other: "Spread | float") -> Difference:
        """The difference to another method's score, or to a fixed one."""
        taken = other if isinstance(other, float) else other.value
        drawn = self.drawn - (other if isinstance(other, float) else other.drawn)
        value = self.value - taken
        low, high = np.quantile(drawn, TAILS).tolist()
        return Difference(value, min(low, value), max(high, value))


class Spreads:
    """The scores of an experiment's methods; each run's answers are resampled once.

    Args:
        splits: by task.
    """

    def __init__(self, splits: Mapping[str, TaskSplits]) -> None:
        self._splits = splits
        self._of_run: dict[tuple[str, str], _Array] = {}

    def of(self, cells: Sequence[Cell], outcomes: Outcomes, split: str) -> Spread | str:
        """The score of cells that differ in their seeds alone; or the reason why there is none."""
        values, drawn = [], []
        for cell in cells:
            outcome = outcomes.get(cell.key)
            if outcome is None:
                return "not run yet"
            if outcome.report is None:
                return "failed"
            if split not in outcome.report.answers:
                return "no answers kept"
            metric = self._splits[cell.task].metric
            values.append(metric.of(outcome.report.metrics[split]))
            drawn.append(self._resampled(cell, outcome.report.answers[split], split))
        method = zlib.crc32(cells[0].method.encode())
        seeds = np.random.default_rng([_seed_of(cells[0].task, split), method])
        picked = seeds.integers(len(drawn), size=(len(drawn), RESAMPLES))
        by_seed = np.stack(drawn)
        return Spread(float(np.mean(values)), by_seed[picked, np.arange(RESAMPLES)].mean(axis=0))

    def _resampled(self, cell: Cell, answers: str, split: str) -> _Array:
        if (known := self._of_run.get((cell.key, split))) is not None:
            return known
        task = self._splits[cell.task]
        drawn = _resample(
            answers,
            task.splits[split],
            task.splits["train"].labels,
            task.metric,
            seed=_seed_of(cell.task, split),
        )
        self._of_run[cell.key, split] = drawn
        return drawn


def mean_spread(spreads: Sequence[Spread]) -> Spread:
    """The mean over tasks, whose rows are drawn independently."""
    return Spread(
        float(np.mean([spread.value for spread in spreads])),
        np.mean([spread.drawn for spread in spreads], axis=0),
    )


def _resample(
    answers: str, data: Dataset, labels: tuple[str, ...], metric: Metric, *, seed: int
) -> _Array:
    """The figure on every resample: float64 [RESAMPLES]."""
    true = classes_of(data, labels)
    predicted = unpacked(answers, labels=len(labels), several=data.multi_label)
    if data.multi_label:
        return np.array(
            [metric.of(each) for each in resampled_set_metrics(predicted, true > 0, seed=seed)]
        )
    figures = resampled_metrics(predicted, true, labels=len(labels), seed=seed)
    return np.array([metric.of(each) for each in figures])


def _seed_of(task: str, split: str) -> int:
    """The same for all methods, so that they get the same rows."""
    return zlib.crc32(f"{task} {split}".encode())
