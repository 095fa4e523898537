"""What an experiment shows on stderr while its cells run.

`LiveDisplay` draws on a terminal, `LineDisplay` writes plain lines for logs; their base class
shows nothing.
"""

import time
from dataclasses import dataclass
from typing import Self, TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from cli.progress import bar_console, duration
from train.experiments.cells import Cell, Outcome
from train.loop.progress import EpochReport
from train.report.progress import Clock


class Display:
    """What an experiment reports to, from one thread; this one shows nothing.

    `started` is the first call for a cell. A context manager, for displays that draw.
    """

    def note(self, message: str) -> None:
        """A line of news."""

    def begin(self, *, cells: int, finished: int, costs: dict[Cell, float]) -> None:
        """Cells are about to run; resets all counts.

        Args:
            cells: all of the experiment's; `finished` of them need no run.
            costs: of those that do, in any unit: the remaining time is estimated from them.
        """

    def started(self, cell: Cell, device: str) -> None:
        """A cell runs now, on this device."""

    def progressed(self, cell: Cell, stage: str, share: float) -> None:
        """A running cell has finished this share of a stage, 0 to 1."""

    def epoch_done(self, cell: Cell, report: EpochReport) -> None:
        """A running cell has trained and measured an epoch."""

    def ended(self, outcome: Outcome) -> None:
        """A cell has finished or failed."""

    def tick(self) -> None:
        """Time has passed."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass


class _Counts:
    """How many cells have ended, and how long the others will take."""

    def __init__(self, cells: int, finished: int, costs: dict[Cell, float], now: float) -> None:
        self._cells, self._finished, self._failed = cells, finished, 0
        self._costs = costs
        self._total = self._left = sum(costs.values())
        self._started = now

    def ended(self, outcome: Outcome) -> None:
        self._left -= self._costs.get(outcome.cell, 0.0)
        if outcome.failure is None:
            self._finished += 1
        else:
            self._failed += 1

    def describe(self, now: float) -> str:
        """`12/90 cells, 1 failed, about 0:42:10 left`."""
        parts = [f"{self._finished}/{self._cells} cells"]
        if self._failed:
            parts.append(f"{self._failed} failed")
        done = self._total - self._left
        if done > 0 and self._left > 0:
            parts.append(f"about {duration((now - self._started) * self._left / done)} left")
        return ", ".join(parts)


class LineDisplay(Display):
    """Plain lines without control characters: one when a cell starts and one when it ends."""

    def __init__(self, stream: TextIO, *, clock: Clock = time.monotonic) -> None:
        self._stream = stream
        self._clock = clock
        self._counts = _Counts(0, 0, {}, 0.0)

    def note(self, message: str) -> None:
        self._stream.write(message + "\n")
        self._stream.flush()

    def begin(self, *, cells: int, finished: int, costs: dict[Cell, float]) -> None:
        self._counts = _Counts(cells, finished, costs, self._clock())
        self.note(self._counts.describe(self._clock()))

    def started(self, cell: Cell, device: str) -> None:
        self.note(f"{cell.title}: started on {device}")

    def ended(self, outcome: Outcome) -> None:
        self._counts.ended(outcome)
        self.note(f"{_ending(outcome)} ({self._counts.describe(self._clock())})")


@dataclass(slots=True)
class _RunningCell:
    """One line of a live display."""

    device: str
    stage: str = "loading"
    share: float = 0.0
    score: str = ""


class LiveDisplay(Display):
    """A line for every running cell below the counts; ended cells and notes scroll above."""

    def __init__(self, console: Console, *, clock: Clock = time.monotonic) -> None:
        self._clock = clock
        self._counts = _Counts(0, 0, {}, 0.0)
        self._running: dict[Cell, _RunningCell] = {}
        # Drawn by `tick`, in the thread that changes the lines.
        self._live = Live(console=console, auto_refresh=False, transient=True)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def note(self, message: str) -> None:
        # Not wrapped: a command in it must stay one line, to be copied.
        self._live.console.print(message, markup=False, highlight=False, soft_wrap=True)

    def begin(self, *, cells: int, finished: int, costs: dict[Cell, float]) -> None:
        self._counts = _Counts(cells, finished, costs, self._clock())
        self._running.clear()
        self.tick()

    def started(self, cell: Cell, device: str) -> None:
        self._running[cell] = _RunningCell(device)

    def progressed(self, cell: Cell, stage: str, share: float) -> None:
        self._running[cell].stage, self._running[cell].share = stage, share

    def epoch_done(self, cell: Cell, report: EpochReport) -> None:
        self._running[cell].score = _score(report)

    def ended(self, outcome: Outcome) -> None:
        self._counts.ended(outcome)
        self._running.pop(outcome.cell, None)
        self.note(_ending(outcome))

    def tick(self) -> None:
        table = Table(box=None, show_header=False, pad_edge=False)
        for cell, line in self._running.items():
            texts = (cell.title, line.device, line.stage, f"{line.share:.0%}", line.score)
            table.add_row(*(Text(text) for text in texts))
        counts = Text(self._counts.describe(self._clock()), style="bold")
        self._live.update(Group(counts, table), refresh=True)


def _ending(outcome: Outcome) -> str:
    title = outcome.cell.title
    if outcome.report is None:
        return f"{title}: failed: {outcome.failure}"
    best = outcome.report.epochs[outcome.report.best_epoch - 1]
    score = f"{shown}, " if (shown := _score(best)) else ""
    return f"{title}: {score}best epoch {best.epoch}, {duration(outcome.report.seconds)}"


def _score(epoch: EpochReport) -> str:
    """What an epoch is judged by, on the selection rows; empty without such rows."""
    if epoch.score is None:
        return ""
    name = "accuracy" if epoch.micro_f1 is None else "micro-F1"
    return f"selection {name} {epoch.score:.4f}"


def display_for(stream: TextIO) -> LiveDisplay | LineDisplay:
    """Live if the stream is a terminal that can draw, else lines."""
    console = bar_console(stream)
    return LineDisplay(stream) if console is None else LiveDisplay(console)
