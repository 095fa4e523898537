"""What an experiment shows while its cells run, on stderr. Knows no process.

`LiveDisplay` draws on a terminal, `LineDisplay` writes plain lines for logs, `SilentDisplay`
nothing.
"""

import time
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self, TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from cli.progress import duration
from train.experiments.cells import Cell, Outcome
from train.loop.progress import EpochReport
from train.report.progress import Clock


class Display(Protocol):
    """How an experiment tells what it does, from one thread; a cell's `started` comes first."""

    def note(self, message: str) -> None:
        """One line of news."""

    def begin(self, *, cells: int, finished: int, costs: dict[Cell, float]) -> None:
        """Cells are about to run; starts and ends what was counted before.

        Args:
            cells: all of the experiment's; of these `finished` need no run.
            costs: of those that do, in any unit: time left is told by them.
        """

    def started(self, cell: Cell, place: str) -> None:
        """A cell runs now, on this device."""

    def moved(self, cell: Cell, stage: str, share: float) -> None:
        """A running cell is at this share of a stage."""

    def epoch_done(self, cell: Cell, report: EpochReport) -> None:
        """A running cell has measured an epoch."""

    def ended(self, outcome: Outcome) -> None:
        """A cell is over, one way or the other."""

    def tick(self) -> None:
        """Time has passed."""


@dataclass(slots=True)
class _Line:
    """What is known of a running cell."""

    place: str
    stage: str = "loading"
    share: float = 0.0
    accuracy: float | None = None


class _Tally:
    """Cells and time, counted."""

    def __init__(self, cells: int, finished: int, costs: dict[Cell, float], now: float) -> None:
        self._cells, self._finished, self._failed = cells, finished, 0
        self._costs = costs
        self._all = self._left = sum(costs.values())
        self._started = now

    def ended(self, outcome: Outcome) -> None:
        self._left -= self._costs.get(outcome.cell, 0.0)
        if outcome.failure is None:
            self._finished += 1
        else:
            self._failed += 1

    def describe(self, now: float) -> str:
        """`12/90 cells, 1 failed, 0:42:10 left`."""
        parts = [f"{self._finished}/{self._cells} cells"]
        if self._failed:
            parts.append(f"{self._failed} failed")
        done = self._all - self._left
        if done > 0 and self._left > 0:
            parts.append(f"about {duration((now - self._started) * self._left / done)} left")
        return ", ".join(parts)


class SilentDisplay:
    """Shows nothing."""

    def note(self, message: str) -> None:
        pass

    def begin(self, *, cells: int, finished: int, costs: dict[Cell, float]) -> None:
        pass

    def started(self, cell: Cell, place: str) -> None:
        pass

    def moved(self, cell: Cell, stage: str, share: float) -> None:
        pass

    def epoch_done(self, cell: Cell, report: EpochReport) -> None:
        pass

    def ended(self, outcome: Outcome) -> None:
        pass

    def tick(self) -> None:
        pass

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        pass


class LineDisplay(SilentDisplay):
    """Plain lines without control characters: one when a cell starts and one when it is over."""

    def __init__(self, stream: TextIO, *, clock: Clock = time.monotonic) -> None:
        self._stream = stream
        self._clock = clock
        self._tally = _Tally(0, 0, {}, 0.0)

    def note(self, message: str) -> None:
        self._stream.write(message + "\n")
        self._stream.flush()

    def begin(self, *, cells: int, finished: int, costs: dict[Cell, float]) -> None:
        self._tally = _Tally(cells, finished, costs, self._clock())
        self.note(self._tally.describe(self._clock()))

    def started(self, cell: Cell, place: str) -> None:
        self.note(f"{cell.title}: started on {place}")

    def ended(self, outcome: Outcome) -> None:
        self._tally.ended(outcome)
        self.note(f"{_ending(outcome)} ({self._tally.describe(self._clock())})")


class LiveDisplay(SilentDisplay):
    """A line for every running cell below the count; ended cells and notes scroll above."""

    def __init__(self, console: Console, *, clock: Clock = time.monotonic) -> None:
        self._clock = clock
        self._tally = _Tally(0, 0, {}, 0.0)
        self._lines: dict[Cell, _Line] = {}
        # Drawn by `tick`, in the thread that changes the lines.
        self._live = Live(console=console, auto_refresh=False, transient=True)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._live.stop()

    def note(self, message: str) -> None:
        self._live.console.print(message, markup=False, highlight=False)

    def begin(self, *, cells: int, finished: int, costs: dict[Cell, float]) -> None:
        self._tally = _Tally(cells, finished, costs, self._clock())
        self._lines.clear()
        self.tick()

    def started(self, cell: Cell, place: str) -> None:
        self._lines[cell] = _Line(place)

    def moved(self, cell: Cell, stage: str, share: float) -> None:
        self._lines[cell].stage, self._lines[cell].share = stage, share

    def epoch_done(self, cell: Cell, report: EpochReport) -> None:
        self._lines[cell].accuracy = report.accuracy

    def ended(self, outcome: Outcome) -> None:
        self._tally.ended(outcome)
        self._lines.pop(outcome.cell, None)
        self.note(_ending(outcome))

    def tick(self) -> None:
        table = Table(box=None, show_header=False, pad_edge=False)
        for cell, line in self._lines.items():
            score = "" if line.accuracy is None else f"selection accuracy {line.accuracy:.4f}"
            cells = (cell.title, line.place, line.stage, f"{line.share:.0%}", score)
            table.add_row(*(Text(text) for text in cells))
        count = Text(self._tally.describe(self._clock()), style="bold")
        self._live.update(Group(count, table), refresh=True)


def _ending(outcome: Outcome) -> str:
    title = outcome.cell.title
    if outcome.report is None:
        return f"{title}: failed: {outcome.failure}"
    best = outcome.report.epochs[outcome.report.best_epoch - 1]
    score = "" if best.accuracy is None else f"selection accuracy {best.accuracy:.4f}, "
    return f"{title}: {score}best epoch {best.epoch}, {duration(outcome.report.seconds)}"


def display_for(stream: TextIO) -> LiveDisplay | LineDisplay:
    """Live where the stream is a terminal that can draw, else lines."""
    console = Console(file=stream)
    if console.is_terminal and not console.is_dumb_terminal:
        return LiveDisplay(console)
    return LineDisplay(stream)
