"""What the reports of all experiments have in common: data, conditions, failures. Markdown."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

from train.config.settings import FitSettings
from train.data.task_data import TaskData
from train.experiments.cells import Cell, Rows
from train.experiments.pool import Places
from train.experiments.tables import Outcomes
from train.report.markdown import fenced, literal
from train.report.report import machine, versions

# Their model cards list Quora duplicates, SNLI, MultiNLI and SQuAD 2.0 among the training pairs.
_SEEN_BY = ("all-MiniLM", "all-mpnet")
_SEEN = {
    "qqp": "Quora duplicates",
    "mnli": "MultiNLI pairs",
    "qnli": "SQuAD's questions and passages, of which QNLI is made",
}


def page(*parts: str) -> str:
    """Blocks, one blank line between them; empty ones are left out."""
    return "\n\n".join(part.strip() for part in parts if part.strip()) + "\n"


def image(output: Path, name: str, text: str) -> str:
    """A plot of the report's folder; nothing while it is not there."""
    return f"![{text}]({name})" if (output / name).exists() else ""


def shown(name: str) -> str:
    """A task's name as Markdown: a file's or folder's may hold anything."""
    return name if re.fullmatch("[A-Za-z0-9._-]+", name) else literal(name)


def span(numbers: Sequence[int]) -> str:
    """`4,610`, or `4,610 to 33,229`: heads differ with the number of labels."""
    ends = sorted({min(numbers), max(numbers)}) if numbers else []
    return " to ".join(f"{number:,}" for number in ends)


def reported(rows: Rows) -> list[str]:
    """The splits that nothing was chosen by; the first one stands for the task."""
    return [name for name in rows.sets if name not in ("train", "selection")]


def progress_line(cells: Sequence[Cell], outcomes: Outcomes) -> str:
    """How much of the experiment the report holds; nothing where that is all."""
    found = [outcomes[cell.key] for cell in cells if cell.key in outcomes]
    failed = sum(outcome.failure is not None for outcome in found)
    if len(found) == len(cells) and not failed:
        return ""
    waiting = len(cells) - len(found)
    return (
        f"**Not complete:** of {len(cells)} runs {len(found) - failed} are finished, {failed} "
        f"failed, {waiting} are not run yet."
    )


def data_section(data: Mapping[str, TaskData], rows: Mapping[str, Rows]) -> str:
    """A line for every task: its rows, what it lacks, what it is judged by."""
    lines = []
    for name, task in data.items():
        counts = ", ".join(f"{key} {len(found):,}" for key, found in rows[name].sets.items())
        notes = "".join(f"; {note}" for note in task.notes)
        digest = task.train.sha256[:12]
        lines.append(
            f"{shown(name)} ({rows[name].metric}): {counts}{notes}; sha256 of train {digest}…"
        )
    return "## Data\n\n" + _items(lines)


def failed_section(cells: Sequence[Cell], outcomes: Outcomes) -> str:
    """Every failure in full."""
    found = [outcomes[cell.key] for cell in cells if cell.key in outcomes]
    lines = [
        f"{literal(outcome.cell.title)}: {literal(outcome.failure)}"
        for outcome in found
        if outcome.failure is not None
    ]
    if not lines:
        return ""
    return "## Failed\n\nTried again at the next start.\n\n" + _items(lines)


def conditions_section(
    settings: FitSettings,
    *,
    backbone: str,
    fingerprint: str,
    tasks: Iterable[str],
    places: Places,
    outcomes: Outcomes,
) -> str:
    """Where, with what and how it was measured."""
    devices = sorted({outcome.device for outcome in outcomes.values() if outcome.report})
    found = ", ".join(f"{name} {number}" for name, number in versions().items())
    lines = [
        f"backbone: {literal(backbone)}, frozen (fingerprint {fingerprint[:12]}…)",
        f"machine: {machine()}",
        f"runs computed on: {', '.join(devices) or 'nothing yet'}",
        f"runs at once: {places.jobs}; they share the machine, so that seconds compare within this "
        "report only",
        f"versions: {found}",
        f"written: {datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
    ]
    lines += _warnings(backbone, tasks)
    command = "" if settings.command is None else fenced(settings.command, "sh")
    return page("## Conditions", command, _items(lines)).rstrip()


def _items(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _warnings(backbone: str, tasks: Iterable[str]) -> Iterator[str]:
    if not any(name in backbone for name in _SEEN_BY):
        return
    for task in tasks:
        if (seen := _SEEN.get(task)) is not None:
            yield f"{task}: not clean, {backbone} was pre-trained on {seen}"
