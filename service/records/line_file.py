"""A file of lines that several processes append to, rotated by size and by age.

Every append holds a `flock`, so lines of different processes never mix, and the order in the file
is the order in which they were written. A rotated file gets the time of its rotation as a suffix.
"""

import fcntl
import json
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from time import time
from typing import Any

import orjson

_DAY_SECONDS = 86400.0
_APART_SECONDS = 60.0
# Lines begin with their time.
_TIME = re.compile(rb'\{"time":"([^"]{19,32})"')


class LineFile:
    """Open only while it appends: so it can be moved away, and its disk made read-only.

    Args:
        path: its folder is created when needed, but not the one above it. A new file can be read
            by its owner alone.
        max_bytes: a line that would make the file larger goes to a new file.
        kept: rotated files that stay, the newest; older ones stay, too, as long as all of them
            are no larger than so many files of `max_bytes`.
        days: the file is rotated after a day, and rotated files are removed once they are this
            old. None: age does not matter.
    """

    def __init__(self, path: Path, *, max_bytes: int, kept: int, days: int | None = None) -> None:
        self.path = path
        self._max_bytes = max_bytes
        self._kept = kept
        self._days = days

    def at(self, path: Path) -> "LineFile":
        """Another file with the same bounds."""
        return LineFile(path, max_bytes=self._max_bytes, kept=self._kept, days=self._days)

    def append(self, lines: bytes, *, sync: bool) -> None:
        """Append whole lines, all of them or none.

        Args:
            sync: return when they are on the disk.

        Raises:
            OSError: they could not be written.
        """
        self.path.parent.mkdir(exist_ok=True)
        descriptor = self._opened()
        try:
            size = os.fstat(descriptor).st_size
            if size and (size + len(lines) > self._max_bytes or not self._is_of_today(descriptor)):
                self._rotate()
                rotated, descriptor = descriptor, self._opened()
                os.close(rotated)
                # What cannot be removed must not keep lines from being written.
                with suppress(OSError):
                    self._remove()
                size = os.fstat(descriptor).st_size
            self._write(descriptor, lines, size, sync=sync)
        finally:
            os.close(descriptor)

    def expire(self) -> None:
        """Do what `append` would do for age: without it, nothing that is idle grows too old.

        Raises:
            OSError: the file or its folder cannot be used.
        """
        if self.path.exists():
            descriptor = self._opened()
            try:
                if os.fstat(descriptor).st_size and not self._is_of_today(descriptor):
                    self._rotate()
            finally:
                os.close(descriptor)
        self._remove()

    def _remove(self) -> None:
        """Remove rotated files beyond their number and size, or their age."""
        rotated = []
        for path in self.path.parent.glob(f"{self.path.name}.2*Z"):
            with suppress(FileNotFoundError):
                status = path.stat()
                modified = status.st_mtime
                if modified > time():
                    # The clock ran ahead. From now on it is as old as if it were of now.
                    os.utime(path)
                    modified = time()
                rotated.append((modified, path, status.st_size))
        number = total = 0
        for modified, path, size in sorted(rotated, reverse=True):
            number, total = number + 1, total + size
            is_beyond = number > self._kept and total > self._kept * self._max_bytes
            if is_beyond or (self._days and time() - modified > self._days * _DAY_SECONDS):
                path.unlink(missing_ok=True)

    def _opened(self) -> int:
        """The file, locked."""
        while True:
            flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
            descriptor = os.open(self.path, flags, 0o600)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            # Another process may have rotated it before the lock was free.
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), os.stat(self.path)):
                    return descriptor
            os.close(descriptor)

    def _write(self, descriptor: int, lines: bytes, size: int, *, sync: bool) -> None:
        # A power failure may have cut the last line.
        if size and os.pread(descriptor, 1, size - 1) != b"\n":
            lines = b"\n" + lines
        try:
            left = memoryview(lines)
            while left:
                left = left[os.write(descriptor, left) :]
            if sync:
                os.fsync(descriptor)
        except OSError:
            with suppress(OSError):
                os.ftruncate(descriptor, size)
            raise

    def _rotate(self) -> None:
        now = datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%fZ")
        self.path.rename(self.path.with_name(f"{self.path.name}.{now}"))

    def _is_of_today(self, descriptor: int) -> bool:
        """Whether the file's first line is less than a day old, if that matters.

        A time to come is that of a clock that ran ahead, and says nothing. Writers beside each
        other, and a clock that is set, may be some seconds apart.
        """
        if self._days is None:
            return True
        match = _TIME.match(os.pread(descriptor, 64, 0))
        try:
            first = datetime.fromisoformat(match[1].decode()).timestamp() if match else 0.0
        except (ValueError, OverflowError):
            first = 0.0
        return -_APART_SECONDS <= time() - first < _DAY_SECONDS


def json_line(record: Mapping[str, Any]) -> bytes:
    """A record as a line of JSON, whatever its values are: a lone surrogate is written as `?`."""
    try:
        return orjson.dumps(record, default=str, option=orjson.OPT_APPEND_NEWLINE)
    except TypeError:
        text = json.dumps(record, default=str, ensure_ascii=False, separators=(",", ":"))
        return f"{text}\n".encode("utf-8", "replace")


def now() -> str:
    """The time as records have it: UTC, to the millisecond."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")
