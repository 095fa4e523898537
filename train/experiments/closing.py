"""What stands on stdout when an experiment is over: the main part of its report."""

from rich.console import Console
from rich.table import Table
from rich.text import Text

from train.experiments.cells import Cell, RunReport
from train.experiments.session import Findings
from train.experiments.tables import Score, score_of
from train.metrics import Metric


def print_findings(findings: Findings, console: Console) -> None:
    """Methods and variants down, tasks across: mean and deviation of the seeds, percent."""
    tasks = list(dict.fromkeys(cell.task for cell in findings.cells))
    names = list(dict.fromkeys((cell.method, cell.variant) for cell in findings.cells))
    shown = Table(title="mean over seeds, percent", title_justify="left", title_style="")
    shown.add_column("")
    for task in tasks:
        shown.add_column(Text(f"{task} ({findings.metrics[task]})"), justify="right")
    for method, variant in names:
        texts = [
            _text(
                findings,
                [cell for cell in findings.cells if _names(cell) == (task, method, variant)],
                findings.metrics[task],
            )
            for task in tasks
        ]
        shown.add_row(Text(f"{method} {variant}".strip()), *texts)
    console.print(shown)
    for outcome in findings.failed:
        _line(console, f"failed: {outcome.cell.title}: {outcome.failure}")
    if findings.failed:
        _line(console, "the same command tries them again")
    _line(console, f"written: {findings.output / 'report.md'}")


def _names(cell: Cell) -> tuple[str, str, str]:
    return cell.task, cell.method, cell.variant


def _text(findings: Findings, cells: list[Cell], metric: Metric) -> str:
    def figure(report: RunReport) -> float:
        # The first split is the task's own.
        split = next(name for name in report.metrics if name != "selection")
        return metric.of(report.metrics[split])

    score: Score = score_of(cells, findings.outcomes, figure)
    if score.mean is None:
        return "failed" if score.missing else ""
    deviation = "" if score.deviation is None else f" ± {100 * score.deviation:.1f}"
    return f"{100 * score.mean:.1f}{deviation}"


def _line(console: Console, text: str) -> None:
    """One line however long it is: paths are there to be copied."""
    console.print(text, soft_wrap=True, markup=False, highlight=False)
