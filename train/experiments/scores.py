"""Figures of several seeds made one, and cells that say why they have none. Knows no file."""

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from train.experiments.cells import Cell
from train.experiments.store import Outcome
from train.markdown import literal
from train.runs import RunReport

REASON_LENGTH = 50

# How cells ended, by their keys: those that have not are not there.
Outcomes: TypeAlias = Mapping[str, Outcome]


@dataclass(frozen=True, slots=True)
class Score:
    """A figure of several seeds.

    values: by seed, of those that have one. missing: why others have none, one for each.
    """

    values: Mapping[int, float]
    missing: tuple[str, ...] = ()

    @property
    def mean(self) -> float | None:
        """None where no seed has a value."""
        return statistics.fmean(self.values.values()) if self.values else None

    @property
    def deviation(self) -> float | None:
        """The sample's standard deviation; None for fewer than two values."""
        return statistics.stdev(self.values.values()) if len(self.values) > 1 else None

    @property
    def is_complete(self) -> bool:
        """Whether every seed has its value."""
        return bool(self.values) and not self.missing

    def percent(self) -> str:
        """`84.8 ± 0.3`, Markdown; where seeds are missing, how many there are, or why none is."""
        if self.mean is None:
            return _shortened(self.missing[0]) if self.missing else "not planned"
        text = f"{100 * self.mean:.1f}"
        if self.deviation is not None:
            text += f" ± {100 * self.deviation:.1f}"
        if self.missing:
            text += f" ({len(self.values)} of {len(self.values) + len(self.missing)} seeds)"
        return text


def score_of(
    cells: Iterable[Cell], outcomes: Outcomes, figure: Callable[[RunReport], float]
) -> Score:
    """One figure of the runs of some cells that differ in their seeds."""
    values, missing = {}, []
    for cell in cells:
        report = report_of(cell, outcomes)
        if isinstance(report, RunReport):
            values[cell.seed] = figure(report)
        else:
            missing.append(report)
    return Score(values, tuple(missing))


def report_of(cell: Cell, outcomes: Outcomes) -> RunReport | str:
    """A cell's report, or why there is none."""
    outcome = outcomes.get(cell.key)
    if outcome is None:
        return "not run yet"
    return outcome.report or f"failed: {outcome.failure}"


def reports_of(cells: Iterable[Cell], outcomes: Outcomes) -> list[RunReport]:
    """Of the finished ones of some cells."""
    found = (report_of(cell, outcomes) for cell in cells)
    return [report for report in found if isinstance(report, RunReport)]


def mean_of(scores: Sequence[Score]) -> Score:
    """The mean over tasks, seed by seed; without a value where any task lacks one."""
    lacking = sum(not score.is_complete for score in scores)
    if lacking:
        return Score({}, (f"{len(scores) - lacking} of {len(scores)} tasks",))
    seeds = set.intersection(*(set(score.values) for score in scores))
    return Score({seed: statistics.fmean(s.values[seed] for s in scores) for seed in sorted(seeds)})


def _shortened(reason: str) -> str:
    """A reason that fits into a table: the report has it in full."""
    kind, colon, rest = reason.partition(": ")
    if len(rest) > REASON_LENGTH:
        rest = rest[: REASON_LENGTH - 1].rstrip() + "…"
    return f"{kind}: {literal(rest)}" if colon else kind
