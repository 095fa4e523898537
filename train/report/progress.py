"""What a run shows on stderr while it trains; stdout holds results only.

`BarProgress` draws on a terminal, `LineProgress` writes plain lines for logs; their base class,
`train.loop.progress.Progress`, shows nothing.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn
from rich.progress import Progress as RichProgress

from cli.progress import bar_console, duration
from train.loop.progress import EpochReport, Progress

LINE_INTERVAL = 10.0

Clock = Callable[[], float]


@dataclass(slots=True)
class Stage:
    """The state of one stage."""

    name: str
    texts: int
    later: int
    started: float
    done: int = 0
    steps: int = 0
    loss: float | None = None
    accuracy: float | None = None

    def advance(self, texts: int, loss: float | None, accuracy: float | None) -> None:
        self.done += texts
        self.steps += 1
        self.loss = self.loss if loss is None else loss
        self.accuracy = self.accuracy if accuracy is None else accuracy

    def describe(self, now: float) -> str:
        """`step 12, loss 0.4100, accuracy 0.8710, 310 texts/s, 0:42 left`, as far as known."""
        parts = [f"step {self.steps}"]
        if self.loss is not None:
            parts.append(f"loss {self.loss:.4f}")
        if self.accuracy is not None:
            parts.append(f"accuracy {self.accuracy:.4f}")
        elapsed = now - self.started
        if self.done and elapsed > 0:
            rate = self.done / elapsed
            left = max(self.texts - self.done, 0) + self.later
            parts += [f"{rate:,.0f} texts/s", f"{duration(left / rate)} left"]
        return ", ".join(parts)


def describe_epoch(report: EpochReport) -> str:
    """The line that remains after an epoch."""
    parts = [f"epoch {report.epoch}: loss {report.loss:.4f}"]
    if report.micro_f1 is not None:
        parts.append(f"validation micro-F1 {report.micro_f1:.4f}, macro-F1 {report.macro_f1:.4f}")
        parts.append(f"exact match {report.accuracy:.4f}")
    elif report.accuracy is not None:
        parts.append(f"validation accuracy {report.accuracy:.4f}, macro-F1 {report.macro_f1:.4f}")
    parts.append(f"{report.texts_per_second:,.0f} texts/s, {report.seconds:.1f} s")
    return ", ".join(parts)


class LineProgress(Progress):
    """Plain lines without control characters: one per epoch, and every ten seconds in a stage."""

    def __init__(self, stream: TextIO, *, clock: Clock = time.monotonic) -> None:
        self._stream = stream
        self._clock = clock
        self._stage: Stage | None = None
        self._last = 0.0

    def note(self, message: str) -> None:
        self._stream.write(message + "\n")
        self._stream.flush()

    def begin(self, stage: str, *, texts: int, later: int = 0) -> None:
        self._last = self._clock()
        self._stage = Stage(stage, texts, later, started=self._last)

    def advance(
        self, texts: int, *, loss: float | None = None, accuracy: float | None = None
    ) -> None:
        assert self._stage is not None, "advance follows begin"
        self._stage.advance(texts, loss, accuracy)
        now = self._clock()
        if now - self._last >= LINE_INTERVAL:
            self._last = now
            stage = self._stage
            self.note(f"{stage.name}: {stage.done:,}/{stage.texts:,}, {stage.describe(now)}")

    def epoch_done(self, report: EpochReport) -> None:
        self.note(describe_epoch(report))


class BarProgress(Progress):
    """A bar on a terminal; notes and epochs scroll above it."""

    def __init__(self, console: Console, *, clock: Clock = time.monotonic) -> None:
        self._clock = clock
        self._stage: Stage | None = None
        self._task: TaskID | None = None
        self._bars = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.completed:,.0f}/{task.total:,.0f} {task.fields[state]}"),
            console=console,
            transient=True,
        )

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def note(self, message: str) -> None:
        # Not wrapped: a command in it must stay one line, to be copied.
        self._bars.console.print(message, markup=False, highlight=False, soft_wrap=True)

    def begin(self, stage: str, *, texts: int, later: int = 0) -> None:
        self._remove()
        self._stage = Stage(stage, texts, later, started=self._clock())
        self._task = self._bars.add_task(stage, total=texts, state="")

    def advance(
        self, texts: int, *, loss: float | None = None, accuracy: float | None = None
    ) -> None:
        assert self._stage is not None, "advance follows begin"
        assert self._task is not None, "advance follows begin"
        self._stage.advance(texts, loss, accuracy)
        self._bars.update(self._task, advance=texts, state=self._stage.describe(self._clock()))

    def epoch_done(self, report: EpochReport) -> None:
        self._remove()
        self.note(describe_epoch(report))

    def _remove(self) -> None:
        if self._task is not None:
            self._bars.remove_task(self._task)
            self._task = None


def progress_for(stream: TextIO) -> BarProgress | LineProgress:
    """A bar if the stream is a terminal that can draw one, else lines."""
    console = bar_console(stream)
    return LineProgress(stream) if console is None else BarProgress(console)
