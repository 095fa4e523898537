"""Figures of several seeds made one, and cells that say why they have none. Knows no file."""

import csv
import io
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from adapters.format.durable import write_atomically
from train.experiments.cells import Cell, Outcome, RunReport
from train.metrics import Metric
from train.report.markdown import literal, table

# --- merged from train.experiments.scores

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


# --- merged from train.experiments.score_table

# Everything else puts soft prompts into a frozen backbone.
NO_PROMPT = ("majority-class", "head-only", "head-only-mean", "lora", "fine-tuning")


def score_table(columns: Sequence[str], rows: Mapping[str, Sequence[Score]]) -> str:
    """Percent, with the mean over all columns where there are several.

    Args:
        columns: their heads, Markdown.
        rows: by method, a score for every column.
    """
    several = len(columns) > 1
    scores = {
        name: [*found, *([mean_of(found)] if several else [])] for name, found in rows.items()
    }
    contenders = [name for name in rows if name not in NO_PROMPT]
    texts = {name: [score.percent() for score in found] for name, found in scores.items()}
    for column in range(len(columns) + several):
        best = _best([scores[name][column] for name in contenders])
        for name in contenders:
            if best is not None and _shown(scores[name][column]) == best:
                texts[name][column] = f"**{texts[name][column]}**"
    head = ["method", *columns, *(["mean"] if several else [])]
    return table(head, [[name, *found] for name, found in texts.items()])


def controls_first(methods: Sequence[str]) -> list[str]:
    """What has no adapter at all stands on top, beside the majority class."""
    return sorted(methods, key=lambda method: not method.startswith("head-only"))


def _best(scores: Sequence[Score]) -> float | None:
    """Of equal figures all are the best: what is not shown is no difference."""
    return max((shown for score in scores if (shown := _shown(score)) is not None), default=None)


def _shown(score: Score) -> float | None:
    return None if score.mean is None else round(100 * score.mean, 1)


# --- merged from train.experiments.results_csv

MAJORITY = "majority-class"

COLUMNS = (
    "task",
    "method",
    "variant",
    "seed",
    "split",
    "metric",
    "value",
    "trainable_parameters",
    "seconds_per_epoch",
    "peak_memory",
    "best_epoch",
    "learning_rate",
    "device",
)


def write_results(path: Path, cells: Sequence[Cell], outcomes: Outcomes) -> None:
    """Every figure of every split of the finished cells; shares, seconds, bytes.

    The majority class has rows of its own, once for a task, variant and seed.
    """
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    seen: set[tuple[object, ...]] = set()
    for cell in cells:
        outcome = outcomes.get(cell.key)
        if outcome is None or outcome.report is None:
            continue
        writer.writerows(_rows(cell, outcome.report, device=outcome.device))
        for row in _majority_rows(cell, outcome.report):
            if row[:6] not in seen:
                seen.add(row[:6])
                writer.writerow(row)
    write_atomically(path, text.getvalue().encode())


def _rows(cell: Cell, report: RunReport, *, device: str) -> Iterator[tuple[object, ...]]:
    for split, metrics in report.metrics.items():
        for metric in Metric:
            yield (
                cell.task,
                cell.method,
                cell.variant,
                cell.seed,
                split,
                metric.value,
                metric.of(metrics),
                report.trainable_parameters,
                report.seconds_per_epoch,
                report.peak_memory,
                report.best_epoch,
                report.learning_rate,
                device,
            )


def _majority_rows(cell: Cell, report: RunReport) -> Iterator[tuple[object, ...]]:
    nothing = [""] * (len(COLUMNS) - 8)
    for split, metrics in report.majority.items():
        for metric in Metric:
            named = (cell.task, MAJORITY, cell.variant, cell.seed, split, metric.value)
            yield (*named, metric.of(metrics), 0, *nothing)
