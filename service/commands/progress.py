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
def progress_bar(
    stream: TextIO, name: str, total: int | None, *, begun: int = 0
) -> Iterator[Advance]:
    """Draws a bar if the stream is a terminal that can draw one, and leaves a line when it ends.

    Args:
        total: bytes of the file, if known: the time left is computed from it.
        begun: bytes of it that were done before.
    """
    console = bar_console(stream)
    if console is None:
        yield lambda _texts, _position: None
        return
    began, answered = time.monotonic(), 0

    def advance(texts: int, position: int) -> None:
        nonlocal answered
        answered += texts
        state = _state(answered, time.monotonic() - began, total, position, begun)
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


@contextmanager
def progress_lines(
    stream: TextIO, name: str, total: int | None, *, begun: int = 0, seconds: float = 30.0
) -> Iterator[Advance]:
    """As `progress_bar`; a stream that is no terminal gets a line every so many seconds."""
    if bar_console(stream) is not None:
        with progress_bar(stream, name, total, begun=begun) as advance:
            yield advance
        return
    began = told = time.monotonic()
    answered = 0

    def advance_lines(texts: int, position: int) -> None:
        nonlocal answered, told
        answered += texts
        now = time.monotonic()
        if now - told >= seconds:
            told = now
            state = _state(answered, now - began, total, position, begun)
            stream.write(f"{name}: {state}\n")
            stream.flush()

    yield advance_lines


def _state(texts: int, elapsed: float, total: int | None, position: int, begun: int) -> str:
    state = f"{texts:,} texts, {texts / max(elapsed, 1e-6):,.0f} texts/s"
    if total and position > begun:
        state += f", {duration(elapsed * max(total - position, 0) / (position - begun))} left"
    return state
