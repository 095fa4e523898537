"""How far a file is, on a terminal's stderr; elsewhere nothing. Knows no service."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn


class Showing(Protocol):
    def advance(self, texts: int, position: int) -> None:
        """So many texts were answered; the last of them ends at this byte of the source."""


class Nothing:
    def advance(self, texts: int, position: int) -> None:
        pass


class Bar:
    """Texts, texts a second, and the time left by the bytes that are left."""

    def __init__(self, progress: Progress, name: str, total: int | None) -> None:
        self._progress = progress
        self._total = total
        self._began = time.monotonic()
        self._texts = 0
        self._task = progress.add_task(name, total=total, state="")

    def advance(self, texts: int, position: int) -> None:
        self._texts += texts
        self._progress.update(self._task, completed=position, state=self.describe(position))

    def describe(self, position: int) -> str:
        """`7,312 texts, 612 texts/s, 0:04 left`."""
        elapsed = max(time.monotonic() - self._began, 1e-6)
        parts = [f"{self._texts:,} texts, {self._texts / elapsed:,.0f} texts/s"]
        if self._total and position:
            parts.append(f"{duration(elapsed * max(self._total - position, 0) / position)} left")
        return ", ".join(parts)

    def summary(self) -> str:
        """The line that stays."""
        elapsed = max(time.monotonic() - self._began, 1e-6)
        rate = self._texts / elapsed
        return f"{self._texts:,} texts in {duration(elapsed)}, {rate:,.0f} texts/s"


@contextmanager
def showing(stream: TextIO, name: str, total: int | None) -> Iterator[Showing]:
    """A bar where the stream is a terminal that can draw one."""
    console = Console(file=stream)
    if not console.is_terminal or console.is_dumb_terminal:
        yield Nothing()
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[state]}", markup=False),
    )
    with Progress(*columns, console=console, transient=True, refresh_per_second=5) as progress:
        bar = Bar(progress, name, total)
        yield bar
    console.print(bar.summary(), markup=False, highlight=False)


def duration(seconds: float) -> str:
    """`0:42`, `12:05`, `3:07:00`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
