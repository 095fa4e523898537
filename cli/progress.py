"""What progress displays share."""

from typing import TextIO

from rich.console import Console


def duration(seconds: float) -> str:
    """`0:42`, `12:05`, `3:07:00`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def bar_console(stream: TextIO) -> Console | None:
    """A console for a progress bar; None if the stream is not a terminal that can draw one."""
    console = Console(file=stream)
    return console if console.is_terminal and not console.is_dumb_terminal else None
