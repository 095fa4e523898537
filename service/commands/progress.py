"""How far a file has been answered, as a bar on a terminal's stderr."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO, TypeAlias

from rich.progress import BarColumn, Progress, TextColumn

from cli.progress import bar_console, duration

# Called with the number of newly answered texts, and the byte of the file where the last one ends.
Advance: TypeAlias = Callable[[int, int], None]


@contextmanager
def progress_bar(stream: TextIO, name: str, total: int | None) -> Iterator[Advance]:
    """Draws a bar if the stream is a terminal that can draw one, and leaves a line when it ends.

    Args:
        total: bytes of the file, if known: the time left is computed from it.
    """
    console = bar_console(stream)
    if console is None:
        yield lambda _texts, _position: None
        return
    began, answered = time.monotonic(), 0

    def advance(texts: int, position: int) -> None:
        nonlocal answered
        answered += texts
        elapsed = max(time.monotonic() - began, 1e-6)
        state = f"{answered:,} texts, {answered / elapsed:,.0f} texts/s"
        if total and position:
            state += f", {duration(elapsed * max(total - position, 0) / position)} left"
        progress.update(task, completed=position, state=state)

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[state]}", markup=False),
    )
    with Progress(*columns, console=console, transient=True, refresh_per_second=5) as progress:
        task = progress.add_task(name, total=total, state="")
        yield advance
    elapsed = max(time.monotonic() - began, 1e-6)
    summary = f"{answered:,} texts in {duration(elapsed)}, {answered / elapsed:,.0f} texts/s"
    console.print(summary, markup=False, highlight=False)
