"""Versions of adapters on disk. HTTP workers import this module, so it must not import torch.

    <root>/<name>/<sha256>.safetensors    one revision; never changes
    <root>/<name>/current                 all published revisions, one a line, the current one first
    <root>/.locks/<name>                  the lock of this name's writers, in all processes

A revision is the sha256 of its bytes; a name is an alias. Publishing, rolling back and deleting are
each one atomic rename, after everything that it refers to was synced: a crash at any point leaves
the old state or the new one. Readers take no lock. The file system must be local, because the store
relies on `flock` and on atomic renames.
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


class PutResult(NamedTuple):
    """The result of a put. created: the name is new. changed: it was not current before."""

    revision: str
    created: bool
    changed: bool


@dataclass(frozen=True, slots=True)
class Revision:
    """One stored version. stored: when its file was written (UTC). size: in bytes."""

    revision: str
    stored: datetime
    size: int


class AdapterStore:
    """A folder of versioned adapter files.

    Every method but `names` raises InvalidName if a name breaks the rules, DamagedFile if a
    `current` file was damaged, and OSError if the disk fails.

    Args:
        root: created if missing. Files that an interrupted writer left there are removed.
    """

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root)
        self._locks = self.root / ".locks"
        self._locks.mkdir(parents=True, exist_ok=True)
        self._clean()

    def names(self) -> list[str]:
        """All adapters that have a current revision, sorted."""
        names = (entry.name for entry in os.scandir(self.root) if NAME.fullmatch(entry.name))
        return sorted(name for name in names if (self.root / name / _POINTER).is_file())

    def put(self, name: str, data: bytes, *, expected: str | None = None) -> PutResult:
        """Make `data` the current revision. Putting the current bytes again changes nothing.

        Args:
            expected: the revision that must be current; None accepts any.

        Raises:
            RevisionConflict: another revision, or none, is current.
        """
        with self._locked(name):
            history = self._history(name)
            _compare(name, expected, history)
            return self._publish(name, data, history)

    def create(self, name: str, data: bytes) -> PutResult:
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
        """All revisions that can be read: the current one first, then the most recently current.

        Raises:
            UnknownAdapter: there is no such adapter.
        """
        revisions = []
        for revision in self._known(name):
            try:
                status = self.path(name, revision).stat()
            except FileNotFoundError:
                continue
            revisions.append(
                Revision(revision, datetime.fromtimestamp(status.st_mtime, UTC), status.st_size)
            )
        return revisions

    def resolve(self, name: str, prefix: str | None = None) -> str:
        """The one revision that starts with `prefix`; without a prefix, the current one.

        Raises:
            UnknownAdapter: there is no such adapter.
            UnknownRevision: no revision starts with it, or several do.
        """
        history = self._known(name)
        if prefix is None:
            return history[0]
        matches = [revision for revision in history if prefix and revision.startswith(prefix)]
        if len(matches) != 1:
            raise UnknownRevision(name, prefix, history)
        return matches[0]

    def path(self, name: str, revision: str) -> Path:
        """The path of a revision's file, which need not exist."""
        return file_of(self.root, name, revision)

    def read(self, name: str, revision: str) -> bytes:
        """The bytes of a revision, verified by their hash.

        Raises:
            DamagedFile: the file is gone, or its bytes have changed.
        """
        try:
            data = self.path(name, revision).read_bytes()
        except FileNotFoundError:
            raise _gone(name, revision) from None
        actual = hashlib.sha256(data).hexdigest()
        if actual != revision:
            raise _changed(name, revision, actual)
        return data

    def rollback(self, name: str, revision: str | None = None) -> str:
        """Make an earlier revision current and return it. Two calls without a revision cancel out.

        Args:
            revision: the whole revision or a prefix; None is the previously current one.

        Raises:
            UnknownAdapter: there is no such adapter.
            UnknownRevision: there is no such revision, or no earlier one.
            DamagedFile: that revision cannot be read; nothing changes.
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
        """Delete a name and all its revisions, also if its `current` file is damaged.

        Raises:
            UnknownAdapter: there is no such adapter.
            RevisionConflict: `expected` is not the current revision.
        """
        with self._locked(name):
            try:
                _compare(name, expected, self._known(name))
            except DamagedFile:
                if expected is not None:
                    raise
            deleted = self.root / f"{_DELETED}{name}-{secrets.token_hex(8)}"
            _folder_of(self.root, name).rename(deleted)
            sync_folder(self.root)
        shutil.rmtree(deleted, ignore_errors=True)

    def _publish(self, name: str, data: bytes, history: list[str]) -> PutResult:
        revision = hashlib.sha256(data).hexdigest()
        folder, path = _folder_of(self.root, name), self.path(name, revision)
        if not folder.is_dir():
            folder.mkdir()
            sync_folder(self.root)
        # This also repairs a damaged file: the same bytes were just sent again.
        if not path.is_file() or path.read_bytes() != data:
            write_atomically(path, data)
        changed = history[:1] != [revision]
        if changed:
            self._point(name, revision, history)
        return PutResult(revision, created=not history, changed=changed)

    def _point(self, name: str, revision: str, history: list[str]) -> None:
        lines = [revision, *(other for other in history if other != revision)]
        text = "".join(f"{line}\n" for line in lines)
        write_atomically(_folder_of(self.root, name) / _POINTER, text.encode())

    def _known(self, name: str) -> list[str]:
        history = self._history(name)
        if not history:
            raise UnknownAdapter(name, self.names())
        return history

    def _history(self, name: str) -> list[str]:
        """Published revisions, the current one first; empty for an unknown name."""
        pointer = _folder_of(self.root, name) / _POINTER
        try:
            lines = pointer.read_bytes().decode("ascii", "replace").splitlines()
        except (FileNotFoundError, NotADirectoryError):
            return []
        if not lines or not all(_REVISION.fullmatch(line) for line in lines):
            raise DamagedFile(
                f"the file that lists the revisions of adapter {name!r} is damaged; "
                "delete the adapter to repair it"
            )
        return lines

    @contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        """One writer for each name, among the threads and processes of this machine."""
        _folder_of(self.root, name)
        descriptor = os.open(self._locks / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            # The lock file stays: if it were removed, two writers could lock two files of one name.
            os.close(descriptor)

    def _clean(self) -> None:
        for entry in list(os.scandir(self.root)):
            if entry.name.startswith(_DELETED):
                shutil.rmtree(entry.path, ignore_errors=True)
            elif NAME.fullmatch(entry.name) and entry.is_dir():
                with self._locked(entry.name):
                    for temporary in Path(entry.path).glob(".*.tmp"):
                        temporary.unlink(missing_ok=True)


def file_of(root: Path, name: str, revision: str) -> Path:
    """The path of a revision in the store at `root`, for readers that open no store.

    Raises:
        InvalidName: the name breaks the rules.
    """
    assert _REVISION.fullmatch(revision), "resolve the revision first"
    return _folder_of(root, name) / f"{revision}{_SUFFIX}"


def verified_file(root: Path, name: str, revision: str) -> Path:
    """The path of a revision whose bytes were hashed just now, in pieces.

    Raises:
        DamagedFile: the file is gone, or its bytes have changed.
        InvalidName: the name breaks the rules.
        OSError: it cannot be read.
    """
    path = file_of(root, name, revision)
    try:
        with path.open("rb") as file:
            actual = hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        raise _gone(name, revision) from None
    if actual != revision:
        raise _changed(name, revision, actual)
    return path


def _gone(name: str, revision: str) -> DamagedFile:
    return DamagedFile(f"the file of adapter {name!r}, revision {revision}, is gone")


def _changed(name: str, revision: str, actual: str) -> DamagedFile:
    return DamagedFile(f"the file of adapter {name!r}, revision {revision}, has sha256 {actual}")


def _folder_of(root: Path, name: str) -> Path:
    if not NAME.fullmatch(name):
        raise InvalidName(
            f"adapter name {name!r}: expected 1 to 64 of a-z 0-9 . _ -, first a letter or digit"
        )
    return root / name


def _compare(name: str, expected: str | None, history: list[str]) -> None:
    current = history[0] if history else None
    if expected is not None and expected != current:
        raise RevisionConflict(name, expected, current)
