"""Atomic writes: after a crash a file is old or new, never half. Without torch, as the store is.

The fault points are in front of every system call that changes something.
"""

import os
import secrets
from pathlib import Path

from adapters.faults import fault_point


def write_atomically(path: Path, data: bytes) -> None:
    """Write and sync a temporary file, rename it, and sync the folder."""
    temporary = path.parent / f".{path.name}.{secrets.token_hex(8)}.tmp"
    fault_point("file.create")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            fault_point("file.write")
            file.write(data)
            file.flush()
            fault_point("file.sync")
            os.fsync(file.fileno())
            # Not by `open`, whose mode depends on the process's umask.
            os.fchmod(file.fileno(), 0o644)
        fault_point("file.rename")
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames in a folder survive a power failure."""
    fault_point("folder.sync")
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
