"""A folder as an object store: on one machine, or on a network file system that all replicas mount.

An object is created by `link`, which fails where its name exists: a crash or a reader in between
finds the whole object or none. The file system must have hard links, and must show every machine
what another one has just written (NFS: mount with `lookupcache=none,noac`).
"""

import contextlib
import errno
import os
import re
import secrets
from collections.abc import Sequence
from pathlib import Path

from adapters.format.durable import sync_folder, write_atomically
from adapters.shared.listed import Listed

_UNFINISHED = ".unfinished"
# As `write_atomically` names it.
_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{16}\.tmp")


class Folder:
    """Every method may raise OSError.

    Args:
        root: created if its parent exists, but never again: a folder that goes away later may be a
            file system that is not mounted.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        root.mkdir(exist_ok=True)
        (root / _UNFINISHED).mkdir(exist_ok=True)

    def create(self, key: str, content: bytes) -> bool:
        path = self._path(key)
        # Cheap, and the usual case of a writer who comes second.
        if path.exists():
            return False
        temporary = self._root / _UNFINISHED / secrets.token_hex(16)
        try:
            with temporary.open("xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            self._make_parent(path)
            try:
                os.link(temporary, path)
            except FileExistsError:
                return False
            sync_folder(path.parent)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
        return True

    def put(self, key: str, content: bytes) -> None:
        path = self._path(key)
        self._make_parent(path)
        write_atomically(path, content)

    def get(self, keys: Sequence[str], size: int) -> list[bytes | None]:
        return [self._read(key) for key in keys]

    def stat(self, key: str) -> Listed | None:
        try:
            status = self._path(key).stat()
        except FileNotFoundError:
            self._check_root()
            return None
        return Listed(key, status.st_size, status.st_mtime)

    def delete(self, key: str) -> None:
        self._path(key).unlink(missing_ok=True)
        self._check_root()

    def remove_unfinished(self, before: float) -> None:
        # Those of `create`, and those of `write_atomically`.
        written = (path for path in self._root.glob("*/.*.tmp") if _TEMPORARY.fullmatch(path.name))
        for path in (*self._root.glob(f"{_UNFINISHED}/*"), *written):
            # It may be gone by now, be in use, or be none of ours.
            with contextlib.suppress(OSError):
                if path.stat().st_mtime < before:
                    path.unlink()

    def _read(self, key: str) -> bytes | None:
        try:
            return self._path(key).read_bytes()
        except FileNotFoundError:
            self._check_root()
            return None

    def _path(self, key: str) -> Path:
        return self._root / key

    def _make_parent(self, path: Path) -> None:
        if not path.parent.is_dir():
            self._check_root()
            path.parent.mkdir(exist_ok=True)
            sync_folder(self._root)

    def _check_root(self) -> None:
        if not (self._root / _UNFINISHED).is_dir():
            raise FileNotFoundError(errno.ENOENT, "the folder does not exist")

    def list(self, prefix: str) -> list[Listed]:
        listed = []
        try:
            with os.scandir(self._path(prefix)) as entries:
                for entry in entries:
                    # Not those of `write_atomically`.
                    if entry.name.startswith("."):
                        continue
                    with contextlib.suppress(FileNotFoundError):
                        status = entry.stat()
                        key = f"{prefix.rstrip('/')}/{entry.name}"
                        listed.append(Listed(key, status.st_size, status.st_mtime))
        except FileNotFoundError:
            self._check_root()
        return listed
