"""All figures of an experiment as one file, a row for every figure. Knows no table of a report."""

import csv
import io
from collections.abc import Iterator, Sequence
from pathlib import Path

from adapters.durable import write_atomically
from train.experiments.cells import Cell
from train.experiments.scores import Outcomes
from train.metrics import Metric
from train.runs import RunReport

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
