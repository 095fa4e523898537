"""Files on their way into a store: written to its disk piece by piece, and hashed on the way.

    <root>/.uploads/<random>.part

The writer holds a `flock` on its file until the store has taken it, and the catalog holds another
one while it publishes the file. A lock ends with its process, so a file without one is abandoned;
`collect_uploads` removes it.
"""

import contextlib
import fcntl
import hashlib
import os
import re
import secrets
import threading
from asyncio import CancelledError
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Self

from adapters.errors import StoreFull
from adapters.faults import fault_point
from adapters.format.failures import store_failures

_FOLDER = ".uploads"
_NAME = re.compile(r"[0-9a-f]{32}\.part")


class ReceivedFile(NamedTuple):
    """A whole file beside a store. name: in the folder of uploads. revision: its sha256."""

    name: str
    revision: str
    size: int


class Upload:
    """One file that is being received. Use it in a `with` block: what the store has not taken by
    its end is removed.

    Every method may block on the disk, and raises StoreFailed if the disk does. A thread may still
    write while another one closes the file: its request was cancelled.

    Args:
        root: the store's folder.
        announced: how many bytes will come, if that is known.

    Raises:
        StoreFull: fewer bytes are free than announced.
    """

    def __init__(self, root: Path, *, announced: int = 0) -> None:
        self._root = root
        self._hash = hashlib.sha256()
        self._finished = False
        self._lock = threading.Lock()
        self.size = 0
        with store_failures(root, "receive the file"):
            free = free_bytes(root)
            if announced > free:
                raise StoreFull(
                    f"the adapter store has {free} bytes free, the upload has {announced}"
                )
            folder = root / _FOLDER
            folder.mkdir(exist_ok=True)
            collect_uploads(root)
            self._path, self._descriptor = _created(folder)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        # A change that nobody waits for any more may have begun, and then needs the file.
        self.close(keep=self._finished and error is CancelledError)

    def write(self, data: bytes | bytearray | memoryview) -> None:
        with self._lock, store_failures(self._root, "receive the file"):
            left = memoryview(data)
            while left:
                fault_point("upload.write")
                left = left[os.write(self._descriptor, left) :]
            self._hash.update(data)
            self.size += len(data)

    @property
    def file(self) -> ReceivedFile:
        """What was received, once it is finished."""
        return ReceivedFile(self._path.name, self._hash.hexdigest(), self.size)

    def finish(self) -> ReceivedFile:
        """The file is whole now. Whoever keeps it syncs it first: see `sync_received`."""
        with self._lock, store_failures(self._root, "receive the file"):
            os.fchmod(self._descriptor, 0o644)
            # Shared from now on, so that `held` can lock it as well.
            fcntl.flock(self._descriptor, fcntl.LOCK_SH)
        self._finished = True
        return self.file

    def close(self, *, keep: bool = False) -> None:
        """Remove the file unless the store has taken it. Closing twice is harmless.

        Args:
            keep: leave it to the change that publishes it, or to `collect_uploads`.
        """
        with self._lock:
            # Another file may get its number: from now on nothing is written to it.
            descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            if not keep:
                _remove(self._path)
            os.close(descriptor)


def received(root: Path, data: bytes) -> Upload:
    """A whole file as an upload; raises as `Upload`."""
    upload = Upload(root, announced=len(data))
    try:
        upload.write(data)
        upload.finish()
    except BaseException:
        upload.close()
        raise
    return upload


def received_path(root: Path, name: str) -> Path:
    """The path of a received file.

    Raises:
        ValueError: no upload has such a name.
    """
    if not _NAME.fullmatch(name):
        raise ValueError(f"not the name of an upload: {name[:80]!r}")
    return root / _FOLDER / name


def sync_received(root: Path, name: str) -> None:
    """Make the bytes of a received file survive a power failure.

    Raises:
        OSError: the disk fails, or the file is gone.
    """
    descriptor = os.open(received_path(root, name), os.O_RDONLY | os.O_CLOEXEC)
    try:
        fault_point("upload.sync")
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def held(root: Path, name: str) -> Iterator[None]:
    """Keep a received file for a change, also if its writer ends meanwhile; then remove it.

    Raises:
        FileNotFoundError: it is gone.
    """
    path = received_path(root, name)
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        yield
    finally:
        _remove(path)
        os.close(descriptor)


def _remove(path: Path) -> None:
    fault_point("upload.remove")
    # On a disk that fails now, the next upload or start removes it.
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)


def collect_uploads(root: Path) -> int:
    """Remove the files whose writers are gone; returns how many there were.

    Raises:
        OSError: the folder cannot be read.
    """
    collected = 0
    try:
        entries = list(os.scandir(root / _FOLDER))
    except FileNotFoundError:
        return 0
    for entry in entries:
        with contextlib.suppress(FileNotFoundError):
            descriptor = os.open(entry.path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.unlink(entry.path)
                collected += 1
            except BlockingIOError:
                pass
            finally:
                os.close(descriptor)
    return collected


def free_bytes(root: Path) -> int:
    """What an unprivileged process may still write there.

    Raises:
        OSError: the folder is gone.
    """
    status = os.statvfs(root)
    return status.f_bavail * status.f_frsize


def _created(folder: Path) -> tuple[Path, int]:
    while True:
        path = folder / f"{secrets.token_hex(16)}.part"
        fault_point("upload.create")
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        descriptor = os.open(path, flags, 0o600)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        # Before the lock was taken, another process may have found the file abandoned.
        if os.fstat(descriptor).st_nlink:
            return path, descriptor
        os.close(descriptor)
