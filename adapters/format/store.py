"""Versions of adapters on disk. HTTP workers import this module, so it must not import torch.

    <root>/<name>/<sha256>.safetensors    one revision; never changes
    <root>/<name>/<sha256>.md             its model card, if it has one
    <root>/<name>/current                 all published revisions, one a line, the current one first
    <root>/<name>/traffic                 how the name's texts are divided between two of them, if
                                          they are; the store does not read it
    <root>/<name>/events                  who did what to its revisions, when; the store does not
                                          read it
    <root>/.locks/<name>                  the lock of this name's writers, in all processes
    <root>/.uploads/                      files that are being received (`adapters.format.uploads`)
    <root>/.images/                       adapters as a device wants them (`service.engine.images`);
                                          the store does not read it

A revision is the sha256 of its bytes; a name is an alias. Publishing, rolling back and deleting are
each one atomic rename, after everything that it refers to was synced: a crash at any point leaves
the old state or the new one, and files to which nothing refers, which `collect` removes. Readers
take no lock. The file system must have `flock` and atomic renames among all who use it: a local
one, or NFS 4 without `local_lock`.
"""

import contextlib
import fcntl
import functools
import hashlib
import logging
import os
import re
import secrets
import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Concatenate, NamedTuple, ParamSpec, TypeVar

from adapters.errors import (
    CurrentRevision,
    DamagedFile,
    InvalidName,
    RevisionConflict,
    StoreError,
    UnknownAdapter,
    UnknownRevision,
)
from adapters.faults import fault_point
from adapters.format.durable import sync_folder, write_atomically
from adapters.format.failures import store_failures
from adapters.format.uploads import (
    ReceivedFile,
    collect_uploads,
    received,
    received_path,
    sync_received,
)

logger = logging.getLogger(__name__)

NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")

# With less free space, a store counts as full: not even a small adapter fits.
LEAST_FREE_BYTES = 256 * 1024

_POINTER = "current"
_TRAFFIC = "traffic"
_EVENTS = "events"
_SUFFIX = ".safetensors"
_CARD_SUFFIX = ".md"
_REVISION = re.compile(r"[0-9a-f]{64}")
_DELETED = ".deleted-"
# At a time, of two files.
_COMPARED_BYTES = 2**20

P = ParamSpec("P")
T = TypeVar("T")


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


def _reporting(
    doing: str,
) -> Callable[
    [Callable[Concatenate["AdapterStore", P], T]], Callable[Concatenate["AdapterStore", P], T]
]:
    """A method whose OSErrors are raised as StoreFailed; `doing` says what it does."""

    def decorate(
        method: Callable[Concatenate["AdapterStore", P], T],
    ) -> Callable[Concatenate["AdapterStore", P], T]:
        @functools.wraps(method)
        def reporting(self: "AdapterStore", /, *args: P.args, **kwargs: P.kwargs) -> T:
            with store_failures(self.root, doing):
                return method(self, *args, **kwargs)

        return reporting

    return decorate


class AdapterStore:
    """A folder of versioned adapter files.

    Every method but `names` raises InvalidName if a name breaks the rules, DamagedFile if a
    `current` file was damaged, and all raise StoreFailed (StoreFull without space) if the disk
    fails. A failed change leaves nothing behind.

    Args:
        root: created if missing.
        kept: how many revisions of a name are kept when another one is published; None: all.

    Raises:
        OSError: the folder cannot be created.
    """

    def __init__(self, root: Path | str, *, kept: int | None = None) -> None:
        self.root = Path(root)
        self._kept = kept
        self._locks = self.root / ".locks"
        self._locks.mkdir(parents=True, exist_ok=True)

    @_reporting("list its adapters")
    def names(self) -> list[str]:
        """All adapters that have a current revision, or of which that cannot be told, sorted."""
        names = (entry.name for entry in os.scandir(self.root) if NAME.fullmatch(entry.name))
        return sorted(name for name in names if _may_exist(self.root / name / _POINTER))

    @_reporting("publish")
    def put(
        self,
        name: str,
        content: bytes | ReceivedFile,
        *,
        expected: str | None = None,
        spare: Collection[str] = (),
    ) -> PutResult:
        """Make a file the current revision. Putting the current one again changes nothing.

        Args:
            content: bytes, or a file that was received beside this store; it is moved.
            expected: the revision that must be current; None accepts any.
            spare: revisions that are kept whatever their number.

        Raises:
            RevisionConflict: another revision, or none, is current.
        """
        with self._received(content) as file, self._locked(name):
            history = self._history(name)
            _compare(name, expected, history)
            return self._publish(name, file, history, spare)

    @_reporting("publish")
    def create(self, name: str, content: bytes | ReceivedFile) -> PutResult:
        """As `put`, for a name that must be new.

        Raises:
            RevisionConflict: the name has a current revision.
        """
        with self._received(content) as file, self._locked(name):
            history = self._history(name)
            if history:
                raise RevisionConflict(name, "no revision", history[0])
            return self._publish(name, file, history, ())

    @_reporting("publish")
    def stage(
        self,
        name: str,
        content: bytes | ReceivedFile,
        *,
        expected: str,
        spare: Collection[str] = (),
    ) -> PutResult:
        """Store a file as the last revision of a name that exists; the current one stays.

        Args:
            expected, spare: as of `put`.

        Raises:
            UnknownAdapter: there is no such adapter.
            RevisionConflict: another revision is current.
        """
        with self._received(content) as file, self._locked(name):
            history = self._known(name)
            _compare(name, expected, history)
            return self._publish(name, file, history, spare, current=False)

    @_reporting("be read")
    def traffic(self, name: str) -> bytes | None:
        """What `set_traffic` wrote last; None if it never has, or the name is unknown."""
        try:
            return (_folder_of(self.root, name) / _TRAFFIC).read_bytes()
        except FileNotFoundError:
            return None

    @_reporting("divide traffic")
    def set_traffic(self, name: str, content: bytes, *, expected: str) -> None:
        """Keep this beside the name's revisions.

        Raises:
            UnknownAdapter: there is no such adapter.
            RevisionConflict: `expected` is not the current revision.
        """
        with self._locked(name):
            _compare(name, expected, self._known(name))
            write_atomically(_folder_of(self.root, name) / _TRAFFIC, content)

    @_reporting("be read")
    def events(self, name: str) -> bytes | None:
        """What `set_events` wrote last; None if it never has, or the name is unknown."""
        try:
            return (_folder_of(self.root, name) / _EVENTS).read_bytes()
        except FileNotFoundError:
            return None

    @_reporting("be written")
    def set_events(self, name: str, content: bytes) -> None:
        """Keep this beside the name's revisions.

        Raises:
            UnknownAdapter: there is no such adapter.
        """
        with self._locked(name):
            self._known(name)
            write_atomically(_folder_of(self.root, name) / _EVENTS, content)

    @_reporting("be read")
    def card(self, name: str, revision: str) -> bytes | None:
        """The model card of a revision, given whole; None: it has none."""
        try:
            return _card_of(self.path(name, revision)).read_bytes()
        except FileNotFoundError:
            return None

    @_reporting("keep a model card")
    def set_card(self, name: str, revision: str, content: bytes) -> None:
        """Keep a model card beside a revision, given whole; it goes with the revision.

        Raises:
            UnknownAdapter, UnknownRevision: there is none.
        """
        with self._locked(name):
            history = self._known(name)
            if revision not in history:
                raise UnknownRevision(name, revision, history)
            write_atomically(_card_of(self.path(name, revision)), content)

    @_reporting("be read")
    def history(self, name: str) -> list[str]:
        """All published revisions, the current one first; none for an unknown name."""
        return self._history(name)

    @_reporting("be read")
    def current(self, name: str) -> str:
        """The current revision.

        Raises:
            UnknownAdapter: there is no such adapter.
        """
        return self._known(name)[0]

    @_reporting("be read")
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

    @_reporting("be read")
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

    @_reporting("be read")
    def signature(self, name: str, revision: str) -> str | None:
        """Changes when a revision's file does: its size and time. None if there is no file."""
        try:
            status = self.path(name, revision).stat()
        except FileNotFoundError:
            return None
        return f"{status.st_size:x}-{status.st_mtime_ns:x}"

    @_reporting("be read")
    def read(self, name: str, revision: str) -> bytes:
        """The bytes of a revision, verified by their hash.

        Raises:
            DamagedFile: the file is gone, or its bytes have changed.
        """
        return verified_bytes(self.root, name, revision)

    @_reporting("roll back")
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
                raise UnknownRevision(name, None, history)
            verified_file(self.root, name, target)
            self._point(name, [target, *(other for other in history if other != target)])
            return target

    @_reporting("delete")
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
            fault_point("name.rename")
            _folder_of(self.root, name).rename(deleted)
            sync_folder(self.root)
        fault_point("name.remove")
        shutil.rmtree(deleted, ignore_errors=True)

    @_reporting("delete a revision")
    def delete_revision(self, name: str, revision: str, *, expected: str | None = None) -> None:
        """Delete one revision, given whole. The current one cannot be deleted.

        Raises:
            UnknownAdapter: there is no such adapter.
            UnknownRevision: there is no such revision.
            CurrentRevision: it is the current one.
            RevisionConflict: `expected` is not the current revision.
        """
        with self._locked(name):
            history = self._known(name)
            _compare(name, expected, history)
            if revision == history[0]:
                raise CurrentRevision(name, revision)
            if revision not in history:
                raise UnknownRevision(name, revision, history)
            self._point(name, [other for other in history if other != revision])
            self._remove_unlisted(name, [revision])

    def trouble(self) -> str | None:
        """Why nothing can be published now, as far as the system tells without writing; or None."""
        try:
            status = os.statvfs(self.root)
        except OSError as error:
            gone = isinstance(error, FileNotFoundError)
            return "its folder is gone" if gone else error.strerror or str(error)
        if status.f_flag & os.ST_RDONLY:
            return "its file system is read-only"
        if not os.access(self.root, os.W_OK | os.X_OK):
            return "its folder cannot be written"
        # Some file systems do not tell their size.
        if status.f_blocks and status.f_bavail * status.f_frsize < LEAST_FREE_BYTES:
            return "its file system is full"
        return None

    @_reporting("be cleaned")
    def collect(self) -> int:
        """Remove what interrupted writers left; returns how many files and folders that were.

        Running writers, in any process, are not disturbed. A name that cannot be looked into is
        left as it is: the others have nothing to do with it.
        """
        collected = collect_uploads(self.root)
        for entry in list(os.scandir(self.root)):
            try:
                if entry.name.startswith(_DELETED):
                    shutil.rmtree(entry.path, ignore_errors=True)
                    collected += 1
                elif NAME.fullmatch(entry.name) and entry.is_dir():
                    with self._locked(entry.name):
                        collected += self._collect_in(entry.name)
            except OSError as error:
                logger.warning("%s cannot be cleaned: %s", entry.path, error.strerror or error)
        for entry in list(os.scandir(self._locks)):
            if NAME.fullmatch(entry.name) and not (self.root / entry.name).exists():
                with self._locked(entry.name):
                    collected += 1
        return collected

    def _publish(
        self,
        name: str,
        file: ReceivedFile,
        history: list[str],
        spare: Collection[str],
        *,
        current: bool = True,
    ) -> PutResult:
        revision = file.revision
        folder, path = _folder_of(self.root, name), self.path(name, revision)
        source = received_path(self.root, file.name)
        is_new = not folder.is_dir()
        try:
            if is_new:
                fault_point("name.create")
                folder.mkdir()
                sync_folder(self.root)
            # This also repairs a damaged file: the same bytes were just sent again.
            if not _is_copy(path, source):
                sync_received(self.root, file.name)
                fault_point("revision.rename")
                os.replace(source, path)
                sync_folder(folder)
            changed = current and history[:1] != [revision]
            if changed or revision not in history:
                listed, dropped = self._limited(revision, history, spare, current=current)
                self._point(name, listed)
                self._remove_unlisted(name, dropped)
        except BaseException:
            with contextlib.suppress(OSError, StoreError):
                # It may be listed although the change failed: syncing comes after the rename.
                if revision not in self._history(name):
                    _remove(path)
                if is_new:
                    folder.rmdir()
            raise
        return PutResult(revision, created=not history, changed=changed)

    def _limited(
        self, revision: str, history: list[str], spare: Collection[str], *, current: bool
    ) -> tuple[list[str], list[str]]:
        """The revisions that stay listed once this one is the first or the last, and those that
        go."""
        listed = [other for other in history if other != revision]
        if current:
            listed.insert(0, revision)
        # Beside a staged revision, the current one stays at least.
        kept = self._kept if current or self._kept is None else max(1, self._kept - 1)
        beyond = [] if kept is None else listed[kept:]
        dropped = [other for other in beyond if other not in spare]
        stay = [other for other in listed if other not in dropped]
        return stay if current else [*stay, revision], dropped

    def _point(self, name: str, revisions: list[str]) -> None:
        text = "".join(f"{line}\n" for line in revisions)
        write_atomically(_folder_of(self.root, name) / _POINTER, text.encode())

    def _remove_unlisted(self, name: str, revisions: list[str]) -> None:
        for revision in revisions:
            fault_point("revision.remove")
            _remove(self.path(name, revision))
            _remove(_card_of(self.path(name, revision)))

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
            if not self.root.is_dir():
                raise
            return []
        if not lines or not all(_REVISION.fullmatch(line) for line in lines):
            raise DamagedFile(
                f"the file that lists the revisions of adapter {name!r} is damaged; "
                "delete the adapter to repair it"
            )
        return lines

    @contextmanager
    def _received(self, content: bytes | ReceivedFile) -> Iterator[ReceivedFile]:
        if isinstance(content, ReceivedFile):
            yield content
            return
        with received(self.root, content) as upload:
            yield upload.file

    @contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        """One writer for each name, among all threads and processes.

        The lock's file goes with the name.
        """
        folder, path = _folder_of(self.root, name), self._locks / name
        while True:
            try:
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            except FileNotFoundError:
                # The store was removed and is back, without its locks. Without its root this fails.
                self._locks.mkdir(exist_ok=True)
                continue
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                # Not if it was removed meanwhile: another writer may lock another file here.
                if os.fstat(descriptor).st_nlink:
                    try:
                        yield
                    finally:
                        if not folder.exists():
                            fault_point("lock.remove")
                            _remove(path)
                    return
            finally:
                os.close(descriptor)

    def _collect_in(self, name: str) -> int:
        """Remove the temporary files and unlisted revisions of one name, which is locked."""
        folder, collected = _folder_of(self.root, name), 0
        for temporary in folder.glob(".*.tmp"):
            collected += _remove(temporary)
        try:
            history = self._history(name)
        except DamagedFile:
            # Which revisions were published cannot be told any more: all may be needed.
            return collected
        for card in folder.glob(f"*{_CARD_SUFFIX}"):
            if _REVISION.fullmatch(card.stem) and card.stem not in history:
                collected += _remove(card)
        files = {path.name.removesuffix(_SUFFIX): path for path in folder.glob(f"*{_SUFFIX}")}
        unlisted = [files[item] for item in files if _REVISION.fullmatch(item)]
        unlisted = [path for path in unlisted if path.name.removesuffix(_SUFFIX) not in history]
        if not history and len(unlisted) > 1:
            # A first upload that was interrupted leaves one file: here a list was lost.
            logger.warning("adapter %s has revisions, but no list of them: they are kept", name)
            return collected
        collected += sum(map(_remove, unlisted))
        if not history:
            with contextlib.suppress(OSError):
                folder.rmdir()
                collected += 1
        return collected


def _may_exist(path: Path) -> bool:
    """Whether there is such a file, or nobody lets us see. What it is shows when it is read."""
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True
    return True


def file_of(root: Path, name: str, revision: str) -> Path:
    """The path of a revision in the store at `root`, for readers that open no store.

    Raises:
        InvalidName: the name breaks the rules.
    """
    assert _REVISION.fullmatch(revision), "resolve the revision first"
    return _folder_of(root, name) / f"{revision}{_SUFFIX}"


def _card_of(path: Path) -> Path:
    """Where the model card of a revision is that has this path."""
    return path.with_name(path.name.removesuffix(_SUFFIX) + _CARD_SUFFIX)


def verified_bytes(root: Path, name: str, revision: str) -> bytes:
    """The bytes of a revision, which have its hash; raises as `verified_file`."""
    with store_failures(root, "be read"):
        try:
            data = file_of(root, name, revision).read_bytes()
        except FileNotFoundError:
            raise _gone(root, name, revision) from None
    actual = hashlib.sha256(data).hexdigest()
    if actual != revision:
        raise _changed(name, revision, actual)
    return data


def verified_file(root: Path, name: str, revision: str) -> Path:
    """The path of a revision whose bytes were hashed just now, in pieces.

    Raises:
        DamagedFile: the file is gone, or its bytes have changed.
        InvalidName: the name breaks the rules.
        StoreFailed: it cannot be read.
    """
    path = file_of(root, name, revision)
    with store_failures(root, "be read"):
        try:
            actual = _hash_of(path)
        except FileNotFoundError:
            raise _gone(root, name, revision) from None
    if actual != revision:
        raise _changed(name, revision, actual)
    return path


def _is_copy(path: Path, source: Path) -> bool:
    """Whether a file is there and has the same bytes. To hash it would take longer."""
    try:
        file = path.open("rb", buffering=0)
    except FileNotFoundError:
        return False
    with file, source.open("rb", buffering=0) as other:
        while piece := other.read(_COMPARED_BYTES):
            if file.read(_COMPARED_BYTES) != piece:
                return False
        return not file.read(1)


def _hash_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _remove(path: Path) -> bool:
    """Remove a file to which nothing refers; where that fails, `collect` tries again."""
    with contextlib.suppress(OSError):
        path.unlink()
        return True
    return False


def _gone(root: Path, name: str, revision: str) -> Exception:
    """A file that is gone is damage, unless the whole store is gone."""
    if not root.is_dir():
        return FileNotFoundError()
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
