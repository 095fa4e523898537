"""`python -m service COMMAND` as it is typed: real processes, with or without a terminal."""

import os
import pty
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from termios import tcsetwinsize
from typing import Any

from tests.support.service_process import TREE


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "service", *words]


def environment(**more: str) -> dict[str, str]:
    """This process's, without the variables of the service and of its clients."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("ID")}
    return kept | {"TERM": "xterm-256color"} | more


def typed(
    *words: str, stdin: str | None = None, folder: Path = TREE, **more: str
) -> "subprocess.CompletedProcess[str]":
    """Run a command to its end. more: environment variables."""
    return subprocess.run(
        command(*words),
        cwd=folder,
        env=environment(PYTHONPATH=str(TREE), **more),
        input=stdin,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def refused(*words: str, **options: Any) -> str:
    """The one line with which a command fails."""
    done = typed(*words, **options)
    assert done.returncode == 2, done.stdout
    assert done.stderr.startswith("service: ")
    assert done.stderr.count("\n") == 1
    return done.stderr


@contextmanager
def terminal(rows: int, columns: int) -> Iterator[tuple[int, bytearray]]:
    """A terminal: the descriptor for a process, and what the process has drawn so far.

    The block starts the process; when it ends, everything has been drawn.
    """
    screen, end = pty.openpty()
    tcsetwinsize(end, (rows, columns))
    drawn = bytearray()

    def read() -> None:
        while True:
            try:
                drawn.extend(os.read(screen, 65536))
            except OSError:
                return

    reader = threading.Thread(target=read)
    reader.start()
    try:
        yield end, drawn
    finally:
        os.close(end)
        reader.join(10)
        os.close(screen)
