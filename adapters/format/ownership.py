"""Which service may change a store: the one that holds the lock in its folder.

    <root>/.service.lock    held by a service from its start to its end
    <root>/.engine.lock     held by its process that changes the store; a new one waits for the old

The locks are `flock`s, so they end with their process however it ends. Each of many processes may
still open the store: `AdapterStore` itself needs none of these locks.
"""

import contextlib
import fcntl
import os
import time
from pathlib import Path
from typing import Literal

from adapters.errors import StoreInUse

_POLL_SECONDS = 0.05


class StoreLock:
    """A claim on a store's folder, for as long as it is held by this process.

    Args:
        root: the store's folder, which must exist.
    """

    def __init__(self, root: Path, kind: Literal["service", "engine"]) -> None:
        self._root = root
        self._path = root / f".{kind}.lock"
        self._descriptor = -1

    def acquire(self, *, wait_seconds: float = 0.0) -> None:
        """
        Raises:
            StoreInUse: another process has held it all this time.
            OSError: the folder is gone or cannot be written.
        """
        until = time.monotonic() + wait_seconds
        while not self._try():
            if time.monotonic() >= until:
                holder = self._holder()
                raise StoreInUse(f"another service{holder} uses the folder {self._root}")
            time.sleep(_POLL_SECONDS)

    def is_held(self) -> bool:
        """Whether the lock is still in the folder: not if the folder was removed or replaced."""
        if self._descriptor < 0:
            return False
        try:
            return os.path.samestat(os.fstat(self._descriptor), os.stat(self._path))
        except OSError:
            return False

    def release(self) -> None:
        """Releasing twice is harmless. The file stays, since another process may wait for it."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _try(self) -> bool:
        # Not for writing: a file system with such a file cannot be made read-only.
        descriptor = os.open(self._path, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return False
        # For people alone. A full disk is no reason to refuse.
        with contextlib.suppress(OSError):
            self._path.write_text(f"{os.getpid()}\n")
        self.release()
        self._descriptor = descriptor
        return True

    def _holder(self) -> str:
        try:
            return f" (process {int(self._path.read_text())})"
        except (OSError, ValueError):
            return ""
