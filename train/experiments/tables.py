"""What is written about the outcomes of an experiment: scores, `results.csv`, `report.md`, stdout.

A score combines the figures of several seeds. A table cell without a figure says why.
"""

import csv
import io
import re
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from adapters.format.durable import write_atomically
from cli.tables import show_table
from train.config.settings import FitSettings
from train.data.task_data import TaskData
from train.experiments.cells import Cell, Findings, Outcomes, RunReport, TaskSplits
from train.experiments.differences import Difference, Spread, mean_spread
from train.metrics import Metric, reported
from train.report.markdown import fenced, literal, table
from train.report.report import machine, print_line, versions

MAJORITY = "majority-class"
# Every other method puts soft prompts into a frozen backbone.
NO_PROMPT = (MAJORITY, "head-only", "head-only-mean", "vectors", "lora", "fine-tuning")
REASON_LENGTH = 50

# Their model cards list Quora duplicates, SNLI, MultiNLI and SQuAD 2.0 among the training pairs.
_PRETRAINED_ON_TASKS = ("all-MiniLM", "all-mpnet")
_PRETRAINING_DATA = {
    "qqp": "Quora duplicates",
    "mnli": "MultiNLI pairs",
    "qnli": "SQuAD's questions and passages, of which QNLI is made",
}

# Scores of several seeds.


@dataclass(frozen=True, slots=True)
class Score:
    """A figure over several seeds.

    values: by seed, of those that have one. missing: for every other seed, why it has none.
    """

    values: Mapping[int, float]
    missing: tuple[str, ...] = ()

    @property
    def mean(self) -> float | None:
        """None if no seed has a value."""
        return statistics.fmean(self.values.values()) if self.values else None

    @property
    def deviation(self) -> float | None:
        """The sample standard deviation; None for fewer than two values."""
        return statistics.stdev(self.values.values()) if len(self.values) > 1 else None

    @property
    def is_complete(self) -> bool:
        """Whether every seed has a value."""
        return bool(self.values) and not self.missing

    def percent(self) -> str:
        """`84.8 ± 0.3`, Markdown; with a remark if seeds are missing, and the reason if all are."""
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
    """One figure of cells that differ only in their seeds."""
    values, missing = {}, []
    for cell in cells:
        outcome = outcomes.get(cell.key)
        if outcome is None:
            missing.append("not run yet")
        elif outcome.report is None:
            missing.append(f"failed: {outcome.failure}")
        else:
            values[cell.seed] = figure(outcome.report)
    return Score(values, tuple(missing))


def split_score(cells: Iterable[Cell], outcomes: Outcomes, metric: Metric, split: str) -> Score:
    """The score of cells on a split."""
    return score_of(cells, outcomes, lambda report: metric.of(report.metrics[split]))


def majority_score(
    groups: Iterable[Sequence[Cell]], outcomes: Outcomes, metric: Metric, split: str
) -> Score:
    """The score of the majority class; it depends on the rows alone, so any complete group has it.

    Args:
        groups: for every method, its cells of the task.
    """
    scores = [
        score_of(cells, outcomes, lambda report: metric.of(report.majority[split]))
        for cells in groups
    ]
    return next((score for score in scores if score.is_complete), scores[0])


def reports_of(cells: Iterable[Cell], outcomes: Outcomes) -> list[RunReport]:
    """The reports of those cells that have one."""
    ended = (outcomes.get(cell.key) for cell in cells)
    return [outcome.report for outcome in ended if outcome is not None and outcome.report]


def mean_of(scores: Sequence[Score]) -> Score:
    """The mean over tasks, seed by seed; without a value if a task is incomplete."""
    incomplete = sum(not score.is_complete for score in scores)
    if incomplete:
        return Score({}, (f"{len(scores) - incomplete} of {len(scores)} tasks",))
    seeds = set.intersection(*(set(score.values) for score in scores))
    return Score({seed: statistics.fmean(s.values[seed] for s in scores) for seed in sorted(seeds)})


def _shortened(reason: str) -> str:
    """A reason that fits into a table; the report has it in full."""
    kind, colon, rest = reason.partition(": ")
    if len(rest) > REASON_LENGTH:
        rest = rest[: REASON_LENGTH - 1].rstrip() + "…"
    return f"{kind}: {literal(rest)}" if colon else kind


def score_table(columns: Sequence[str], rows: Mapping[str, Sequence[Score]]) -> str:
    """Percent, with the mean over all columns if there are several; the best prompt is bold.

    Args:
        columns: their heads, Markdown.
        rows: by method, a score for every column.
    """
    several = len(columns) > 1
    scores = {method: [*row, *([mean_of(row)] if several else [])] for method, row in rows.items()}
    texts = {method: [score.percent() for score in row] for method, row in scores.items()}
    prompts = [method for method in rows if method not in NO_PROMPT]
    for column in range(len(columns) + several):
        shown = {method: _rounded(scores[method][column]) for method in prompts}
        best = max((value for value in shown.values() if value is not None), default=None)
        for method, value in shown.items():
            # Values that look the same in the table count as equal.
            if value is not None and value == best:
                texts[method][column] = f"**{texts[method][column]}**"
    head = ["method", *columns, *(["mean"] if several else [])]
    return table(head, [[method, *row] for method, row in texts.items()])


def difference_cell(spread: Spread | str, reference: Spread | str) -> str:
    """`+3.1 (1.2 to 5.0)` in points, bold if it is larger than chance; else why there is none."""
    for each in (spread, reference):
        if isinstance(each, str):
            return each
    assert not isinstance(spread, str)
    assert not isinstance(reference, str)
    difference = spread.minus(reference)
    low, high = (f"{100 * end:.1f}" for end in (difference.low, difference.high))
    text = f"{100 * difference.value:+.1f} ({low} to {high})"
    return f"**{text}**" if difference.is_real else text


def mean_difference_cell(pairs: Sequence[tuple[Spread | str, Spread | str]]) -> str:
    """The same for the mean over tasks; `2 of 3 tasks` if a method has no score on some."""
    known = [
        (one, other)
        for one, other in pairs
        if not isinstance(one, str) and not isinstance(other, str)
    ]
    if len(known) < len(pairs):
        return f"{len(known)} of {len(pairs)} tasks"
    return difference_cell(
        mean_spread([one for one, _ in known]), mean_spread([other for _, other in known])
    )


def _rounded(score: Score) -> float | None:
    return None if score.mean is None else round(100 * score.mean, 1)


def controls_first(methods: Sequence[str]) -> list[str]:
    """Methods with a head alone come first, next to the majority class."""
    return sorted(methods, key=lambda method: not method.startswith("head-only"))


# results.csv

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
    written: set[tuple[object, ...]] = set()
    for cell in cells:
        outcome = outcomes.get(cell.key)
        if outcome is None or outcome.report is None:
            continue
        for row in _rows(cell, outcome.report, device=outcome.device):
            if row[:6] not in written:
                written.add(row[:6])
                writer.writerow(row)
    write_atomically(path, text.getvalue().encode())


def _rows(cell: Cell, report: RunReport, *, device: str) -> Iterator[tuple[object, ...]]:
    """The rows of a run, then those of the majority class, which costs nothing."""
    costs = (
        report.trainable_parameters,
        report.seconds_per_epoch,
        report.peak_memory,
        report.best_epoch,
        report.learning_rate,
        device,
    )
    free = (0, *[""] * (len(costs) - 1))
    for method, by_split, rest in (
        (cell.method, report.metrics, costs),
        (MAJORITY, report.majority, free),
    ):
        for split, metrics in by_split.items():
            for metric, figure in reported(metrics).items():
                names = (cell.task, method, cell.variant, cell.seed, split, metric.value)
                yield (*names, figure, *rest)


# differences.csv


@dataclass(frozen=True, slots=True)
class PairOfMethods:
    """How much higher `method` scores than `other`."""

    task: str
    split: str
    method: str
    other: str
    difference: Difference


def write_differences(path: Path, pairs: Iterable[PairOfMethods]) -> None:
    """A row for every pair of methods; shares, with the ends of the 95 % interval."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        ("task", "split", "method", "other", "difference", "low", "high", "larger_than_chance")
    )
    for pair in pairs:
        difference = pair.difference
        figures = (f"{each:.6f}" for each in (difference.value, difference.low, difference.high))
        names = (pair.task, pair.split, pair.method, pair.other)
        writer.writerow((*names, *figures, "yes" if difference.is_real else "no"))
    write_atomically(path, text.getvalue().encode())


# report.md


def write_report(
    output: Path,
    title: str,
    sections: Iterable[str],
    *,
    cells: Sequence[Cell],
    outcomes: Outcomes,
    data: Mapping[str, TaskData],
    splits: Mapping[str, TaskSplits],
    conditions: str,
    closing: str = "",
) -> None:
    """Write `results.csv` and `report.md` from the outcomes so far.

    Args:
        sections: the tables of this kind of experiment, Markdown.
        conditions: the section that says how it was measured.
        closing: the last section, Markdown.
    """
    write_results(output / "results.csv", cells, outcomes)
    text = page(
        f"# {title}",
        progress_line(cells, outcomes),
        *sections,
        failed_section(cells, outcomes),
        data_section(data, splits),
        conditions,
        closing,
    )
    write_atomically(output / "report.md", text.encode())


def page(*parts: str) -> str:
    """Blocks with one blank line between them; empty ones are left out."""
    return "\n\n".join(part.strip() for part in parts if part.strip()) + "\n"


def image(output: Path, name: str, text: str) -> str:
    """A plot in the report's folder; nothing if it does not exist yet."""
    return f"![{text}]({name})" if (output / name).exists() else ""


def task_heading(name: str, metric: Metric | None = None) -> str:
    """A task's name as Markdown, because the name of a file or folder may hold anything."""
    shown = name if re.fullmatch("[A-Za-z0-9._-]+", name) else literal(name)
    return shown if metric is None else f"{shown} ({metric})"


def number_range(numbers: Sequence[int]) -> str:
    """`4,610`, or `4,610 to 33,229`: the size of a head depends on the number of labels."""
    ends = sorted({min(numbers), max(numbers)}) if numbers else []
    return " to ".join(f"{number:,}" for number in ends)


def progress_line(cells: Sequence[Cell], outcomes: Outcomes) -> str:
    """How much of the experiment the report contains; empty if it is everything."""
    ended = [outcomes[cell.key] for cell in cells if cell.key in outcomes]
    failed = sum(outcome.failure is not None for outcome in ended)
    if len(ended) == len(cells) and not failed:
        return ""
    return (
        f"**Not complete:** of {len(cells)} runs {len(ended) - failed} are finished, {failed} "
        f"failed, {len(cells) - len(ended)} are not run yet."
    )


def data_section(data: Mapping[str, TaskData], splits: Mapping[str, TaskSplits]) -> str:
    """A line for every task: its rows, what it lacks, and the metric that judges it."""
    lines = []
    for name, task in data.items():
        counts = ", ".join(f"{key} {len(rows):,}" for key, rows in splits[name].splits.items())
        notes = "".join(f"; {note}" for note in task.notes)
        digest = task.train.sha256[:12]
        heading = task_heading(name, splits[name].metric)
        lines.append(f"{heading}: {counts}{notes}; sha256 of train {digest}…")
    return "## Data\n\n" + _items(lines)


def failed_section(cells: Sequence[Cell], outcomes: Outcomes) -> str:
    """Every failure in full."""
    lines = [
        f"{literal(cell.title)}: {literal(outcome.failure)}"
        for cell in cells
        if (outcome := outcomes.get(cell.key)) is not None and outcome.failure is not None
    ]
    if not lines:
        return ""
    return "## Failed\n\nThe next start tries these runs again.\n\n" + _items(lines)


def conditions_section(
    settings: FitSettings,
    *,
    backbone: str,
    fingerprint: str,
    tasks: Iterable[str],
    jobs: int,
    outcomes: Outcomes,
) -> str:
    """Where, with what and how it was measured."""
    devices = sorted({outcome.device for outcome in outcomes.values() if outcome.report})
    packages = ", ".join(f"{name} {number}" for name, number in versions().items())
    lines = [
        f"backbone: {literal(backbone)}, frozen (fingerprint {fingerprint[:12]}…)",
        f"machine: {machine()}",
        f"runs computed on: {', '.join(devices) or 'nothing yet'}",
        f"runs at once: {jobs}; they share the machine, so compare seconds within this report only",
        f"versions: {packages}",
        f"written: {datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
    ]
    if any(name in backbone for name in _PRETRAINED_ON_TASKS):
        lines += [
            f"{task}: not clean, {backbone} was pre-trained on {_PRETRAINING_DATA[task]}"
            for task in tasks
            if task in _PRETRAINING_DATA
        ]
    command = "" if settings.command is None else fenced(settings.command, "sh")
    return page("## Conditions", command, _items(lines)).rstrip()


def _items(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


# stdout


def print_findings(findings: Findings, console: Console) -> None:
    """Methods and variants down, tasks across: mean and deviation over the seeds, percent."""
    groups: dict[tuple[str, str], dict[str, list[Cell]]] = {}
    for cell in findings.cells:
        by_task = groups.setdefault((cell.method, cell.variant), {})
        by_task.setdefault(cell.task, []).append(cell)
    tasks = list(dict.fromkeys(cell.task for cell in findings.cells))
    shown = Table(title="mean over seeds, percent", title_justify="left", title_style="")
    shown.add_column("")
    for task in tasks:
        shown.add_column(Text(f"{task} ({findings.metrics[task]})"), justify="right")
    for (method, variant), by_task in groups.items():
        texts = (_score_text(findings, task, by_task.get(task, [])) for task in tasks)
        shown.add_row(Text(f"{method} {variant}".strip()), *texts)
    show_table(console, shown)
    for outcome in findings.failed:
        print_line(console, f"failed: {outcome.cell.title}: {outcome.failure}")
    if findings.failed:
        print_line(console, "the same command tries them again")
    if findings.advice:
        print_line(console, findings.advice)
    print_line(console, f"written: {findings.output / 'report.md'}")


def _score_text(findings: Findings, task: str, cells: Sequence[Cell]) -> str:
    def figure(report: RunReport) -> float:
        # The first reported split is the task's own.
        split = next(name for name in report.metrics if name != "selection")
        return findings.metrics[task].of(report.metrics[split])

    score = score_of(cells, findings.outcomes, figure)
    if score.mean is None:
        return "failed" if score.missing else ""
    deviation = "" if score.deviation is None else f" ± {100 * score.deviation:.1f}"
    return f"{100 * score.mean:.1f}{deviation}"
