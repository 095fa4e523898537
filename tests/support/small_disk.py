"""A file system of a few megabytes, which a test can fill, make read-only and remove."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


def _mount(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(["mount", *arguments], capture_output=True, text=True)


@contextmanager
def small_disk(folder: Path, *, megabytes: int = 3) -> Iterator[Path]:
    """A tmpfs of this size, mounted on a new folder; skips the test where it cannot be mounted."""
    if os.geteuid() != 0:
        pytest.skip("cannot mount a tmpfs here: this needs root")
    folder.mkdir()
    done = _mount("-t", "tmpfs", "-o", f"size={megabytes}M", "tmpfs", str(folder))
    if done.returncode != 0:
        pytest.skip(f"cannot mount a tmpfs here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def make_read_only(folder: Path) -> None:
    _mount("-o", "remount,ro", str(folder)).check_returncode()


def make_writable(folder: Path) -> None:
    _mount("-o", "remount,rw", str(folder)).check_returncode()


def fill(folder: Path) -> Path:
    """A file that takes all free space; without it there is space again."""
    path = folder / "filler"
    with path.open("wb") as file:
        try:
            while True:
                file.write(b"\0" * 65536)
                file.flush()
        except OSError:
            pass
    return path
