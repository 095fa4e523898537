"""Versions of adapters on disk. Knows no tensors and no backbone: bytes, names and hashes.

    <root>/<name>/<sha256>.safetensors    one revision, never changed once it is there
    <root>/<name>/current                 all published revisions, one a line, the current first
    <root>/.locks/<name>                  what writers of this name lock, also between processes

A revision is the sha256 of its bytes, a name an alias. Publishing, rolling back, deleting are each
one atomic rename, after everything that it refers to was synced: a crash at any instruction leaves
the old or the new state. Readers take no lock. The file system must be a local one: `flock` and
atomic renames are relied on.
"""

import fcntl
import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from adapters.errors import (
    DamagedFile,
    InvalidName,
    RevisionConflict,
    UnknownAdapter,
    UnknownRevision,
)
from adapters.format.durable import sync_folder, write_atomically

NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")

_POINTER = "current"
_SUFFIX = ".safetensors"
_REVISION = re.compile(r"[0-9a-f]{64}")
_DELETED = ".deleted-"


class Published(NamedTuple):
    """What a put did. created: the name is new. changed: another revision is current now."""

    revision: str
    created: bool
    changed: bool


@dataclass(frozen=True, slots=True)
class Revision:
    """One stored version. stored: when its file was written, in UTC. size: bytes."""

    revision: str
    stored: datetime
    size: int


class AdapterStore:
    """A folder of versioned adapter files.

    Every method but `names` raises InvalidName for a name that is none, DamagedFile where a pointer
    is not what this class wrote, and OSError where the disk fails.

    Args:
        root: created if missing. What an interrupted writer left there is removed.
    """

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root)
        self._locks = self.root / ".locks"
        self._locks.mkdir(parents=True, exist_ok=True)
        self._clean()

    def names(self) -> list[str]:
        """All adapters that have a current revision, sorted."""
        found = (item.name for item in os.scandir(self.root) if NAME.fullmatch(item.name))
        return sorted(name for name in found if (self.root / name / _POINTER).is_file())

    def put(self, name: str, data: bytes, *, expected: str | None = None) -> Published:
        """Make `data` the current revision. Putting the current bytes again changes nothing.

        Args:
            expected: the revision that must be current, or None to take whatever is.

        Raises:
            RevisionConflict: another revision, or none, is current.
        """
        with self._locked(name):
            history = self._history(name)
            _compare(name, expected, history)
            return self._publish(name, data, history)

    def create(self, name: str, data: bytes) -> Published:
        """As `put`, for a name that must be new.

        Raises:
            RevisionConflict: the name has a current revision.
        """
        with self._locked(name):
            history = self._history(name)
            if history:
                raise RevisionConflict(name, "no revision", history[0])
            return self._publish(name, data, history)

    def current(self, name: str) -> str:
        """The current revision.

        Raises:
            UnknownAdapter: there is no such adapter.
        """
        return self._known(name)[0]

    def revisions(self, name: str) -> list[Revision]:
        """What can be read or rolled back to: the current one, then by when they last were current.

        Raises:
            UnknownAdapter: there is no such adapter.
        """
        found = []
        for revision in self._known(name):
            try:
                status = self.path(name, revision).stat()
            except FileNotFoundError:
                continue
            found.append(
                Revision(revision, datetime.fromtimestamp(status.st_mtime, UTC), status.st_size)
            )
        return found

    def resolve(self, name: str, prefix: str | None = None) -> str:
        """The one revision that starts with `prefix`; the current one without.

        Raises:
            UnknownAdapter: there is no such adapter.
            UnknownRevision: none or several revisions start so.
        """
        history = self._known(name)
        if prefix is None:
            return history[0]
        matches = [item for item in history if prefix and item.startswith(prefix)]
        if len(matches) != 1:
            raise UnknownRevision(name, prefix, history)
        return matches[0]

    def path(self, name: str, revision: str) -> Path:
        """Where a revision's file is, if it exists."""
        return file_of(self.root, name, revision)

    def read(self, name: str, revision: str) -> bytes:
        """The bytes of a revision, hashed again.

        Raises:
            DamagedFile: the file is gone, or its bytes are not the ones that were stored.
        """
        try:
            data = self.path(name, revision).read_bytes()
        except FileNotFoundError:
            raise DamagedFile(
                f"the file of adapter {name!r}, revision {revision}, is gone"
            ) from None
        actual = hashlib.sha256(data).hexdigest()
        if actual != revision:
            raise DamagedFile(
                f"the file of adapter {name!r}, revision {revision}, has sha256 {actual}"
            )
        return data

    def rollback(self, name: str, revision: str | None = None) -> str:
        """Make an earlier revision current and return it. Twice without naming one undoes itself.

        Args:
            revision: a full one or a prefix; None is the one that was current before.

        Raises:
            UnknownAdapter: there is no such adapter.
            UnknownRevision: no such revision, or none before the current one.
            DamagedFile: that revision cannot be read; the current one stays.
        """
        with self._locked(name):
            history = self._known(name)
            if revision is not None:
                target = self.resolve(name, revision)
            elif len(history) > 1:
                target = history[1]
            else:
                raise UnknownRevision(name, "before the current one", history)
            self.read(name, target)
            self._point(name, target, history)
            return target

    def delete(self, name: str, *, expected: str | None = None) -> None:
        """Forget a name and all its revisions, also one whose pointer is damaged.

        Raises:
            UnknownAdapter: there is no such adapter.
            RevisionConflict: another revision than `expected` is current.
        """
        with self._locked(name):
            try:
                _compare(name, expected, self._known(name))
            except DamagedFile:
                if expected is not None:
                    raise
            gone = self.root / f"{_DELETED}{name}-{secrets.token_hex(8)}"
            self._folder(name).rename(gone)
            sync_folder(self.root)
        shutil.rmtree(gone, ignore_errors=True)

    def _publish(self, name: str, data: bytes, history: list[str]) -> Published:
        revision = hashlib.sha256(data).hexdigest()
        folder, path = self._folder(name), self.path(name, revision)
        if not folder.is_dir():
            folder.mkdir()
            sync_folder(self.root)
        # Also mends a file that rotted: the same bytes were just sent again.
        if not path.is_file() or path.read_bytes() != data:
            write_atomically(path, data)
        changed = history[:1] != [revision]
        if changed:
            self._point(name, revision, history)
        return Published(revision, created=not history, changed=changed)

    def _point(self, name: str, revision: str, history: list[str]) -> None:
        following = [revision, *(item for item in history if item != revision)]
        write_atomically(
            self._folder(name) / _POINTER, "".join(f"{item}\n" for item in following).encode()
        )

    def _known(self, name: str) -> list[str]:
        history = self._history(name)
        if not history:
            raise UnknownAdapter(name, self.names())
        return history

    def _history(self, name: str) -> list[str]:
        """Published revisions, the current one first; empty for an unknown name."""
        pointer = self._folder(name) / _POINTER
        try:
            lines = pointer.read_bytes().decode("ascii", "replace").splitlines()
        except (FileNotFoundError, NotADirectoryError):
            return []
        if not lines or not all(_REVISION.fullmatch(line) for line in lines):
            raise DamagedFile(
                f"the pointer of adapter {name!r} does not hold revisions; "
                "deleting the name mends it"
            )
        return lines

    def _folder(self, name: str) -> Path:
        return _folder_of(self.root, name)

    @contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        """One writer a name, among the threads and processes of this machine."""
        self._folder(name)
        descriptor = os.open(self._locks / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            # Lock files stay: removing one would let two writers lock two files of the same name.
            os.close(descriptor)

    def _clean(self) -> None:
        for item in list(os.scandir(self.root)):
            if item.name.startswith(_DELETED):
                shutil.rmtree(item.path, ignore_errors=True)
            elif NAME.fullmatch(item.name) and item.is_dir():
                with self._locked(item.name):
                    for temporary in Path(item.path).glob(".*.tmp"):
                        temporary.unlink(missing_ok=True)


def file_of(root: Path, name: str, revision: str) -> Path:
    """Where the store of this root keeps a revision, for readers that open no store.

    Raises:
        InvalidName: no adapter can have this name.
    """
    assert _REVISION.fullmatch(revision), "revisions are resolved first"
    return _folder_of(root, name) / f"{revision}{_SUFFIX}"


def _folder_of(root: Path, name: str) -> Path:
    if not NAME.fullmatch(name):
        raise InvalidName(
            f"adapter name {name!r}: expected 1 to 64 of a-z 0-9 . _ -, a letter or digit first"
        )
    return root / name


def _compare(name: str, expected: str | None, history: list[str]) -> None:
    current = history[0] if history else None
    if expected is not None and expected != current:
        raise RevisionConflict(name, expected, current)
