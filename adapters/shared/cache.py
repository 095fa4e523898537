"""A replica's files: a bounded cache of the shared objects, in the layout of `AdapterStore`.

    <root>/<name>/<sha256>.safetensors    a revision that was needed here; verified when it came
    <root>/.fetching/                     files on their way here; removed at the next start

Which names and revisions there are comes from the log (`follow`), not from the folder.
"""

import contextlib
import hashlib
import logging
import os
import secrets
import shutil
import threading
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from adapters.errors import DamagedFile, StoreError, UnknownRevision
from adapters.format.failures import store_failures
from adapters.format.store import NAME, AdapterStore, PutResult, Revision
from adapters.format.uploads import ReceivedFile, collect_uploads, received_path
from adapters.shared.objects import ObjectStore, card_key, object_key
from adapters.shared.records import NameRecord

logger = logging.getLogger(__name__)

_SUFFIX = ".safetensors"
# An object that does not have its hash is read once more: it may have been cut on its way.
_TRIES = 2


class CachedStore(AdapterStore):
    """Reads like an `AdapterStore`, and fetches what is missing. Only the log changes it.

    Safe to use from many threads of one process, which alone may fetch and evict.

    Args:
        root: the replica's own folder; files in it from an earlier start are used again.
        store: where objects are fetched from.
        max_bytes: files beyond this are removed, those first that were not used for longest.

    Raises:
        OSError: the folder cannot be created or read.
    """

    def __init__(self, root: Path | str, store: ObjectStore, *, max_bytes: int) -> None:
        super().__init__(root)
        self.objects = store
        self._max_bytes = max_bytes
        self._records: dict[str, NameRecord] = {}
        self._changed = threading.Condition()
        # Name and revision to size, the least recently used first; and what must not go now.
        self._files: OrderedDict[tuple[str, str], int] = OrderedDict()
        self._held: dict[tuple[str, str], int] = {}
        self._fetching: set[tuple[str, str]] = set()
        # Whose bytes this process has hashed, and the file's time since.
        self._verified: dict[tuple[str, str], int] = {}
        self._temporary = self.root / ".fetching"
        shutil.rmtree(self._temporary, ignore_errors=True)
        self._temporary.mkdir()
        self._scan()

    # --- what the log says ---

    def follow(self, records: Mapping[str, NameRecord]) -> None:
        """Take over the state of all names."""
        with self._changed:
            self._records = dict(records)

    def apply(self, name: str, record: NameRecord | None) -> None:
        """Take over the state of one name; None: it was deleted."""
        with self._changed:
            if record is None:
                self._records.pop(name, None)
            else:
                self._records[name] = record

    def record(self, name: str) -> NameRecord | None:
        """The state of a name."""
        return self._records.get(name)

    def names(self) -> list[str]:
        return sorted(self._records)

    def revisions(self, name: str) -> list[Revision]:
        self._known(name)
        record = self._records[name]
        return [Revision(each.revision, each.stored, each.size) for each in record.revisions]

    def _history(self, name: str) -> list[str]:
        self.path(name, "0" * 64)  # Refuses a name that breaks the rules.
        record = self._records.get(name)
        return [] if record is None else [each.revision for each in record.revisions]

    # --- model cards, which are read seldom and not kept here ---

    def card(self, name: str, revision: str) -> bytes | None:
        return self.objects.get(self._card_key(name, revision))

    def set_card(self, name: str, revision: str, content: bytes) -> None:
        self.objects.put(self._card_key(name, revision), content)

    def _card_key(self, name: str, revision: str) -> str:
        history = self._known(name)
        # A change may come between these two.
        record = self._records.get(name)
        for item in record.revisions if record is not None else ():
            if item.revision == revision:
                return card_key(name, revision, item.stored)
        raise UnknownRevision(name, revision, history)

    # --- files ---

    def signature(self, name: str, revision: str) -> str | None:
        """That of an object, which never changes, whether or not its file is here."""
        self.path(name, revision)  # Refuses a name that breaks the rules.
        return "shared"

    def read(self, name: str, revision: str) -> bytes:
        with self.fetched(name, revision):
            return super().read(name, revision)

    def fetch(self, name: str, revision: str) -> Path:
        """The file of a revision, verified; it is fetched if it is not here.

        It may be evicted at any time: use `fetched` to keep it.

        Raises:
            DamagedFile: the object is gone, or does not have its hash, twice.
            StoreFailed: the shared store, or the disk here, fails.
        """
        with self.fetched(name, revision) as path:
            return path

    @contextlib.contextmanager
    def fetched(self, name: str, revision: str, *, size: int | None = None) -> Iterator[Path]:
        """As `fetch`, and the file stays until the block ends.

        Args:
            size: in bytes, where the log does not say it yet.
        """
        key = (name, revision)
        with self._changed:
            self._held[key] = self._held.get(key, 0) + 1
            while key in self._fetching:
                self._changed.wait()
            self._fetching.add(key)
        try:
            try:
                with store_failures(self.root, "cache"):
                    path = self._whole(name, revision, size or self._size_of(name, revision))
            finally:
                with self._changed:
                    self._fetching.discard(key)
                    self._changed.notify_all()
            yield path
        finally:
            with self._changed:
                self._held[key] -= 1
                if not self._held[key]:
                    del self._held[key]
                self._evict()

    def adopt(self, name: str, file: ReceivedFile) -> Path:
        """Keep a received file, hashed on its way, where `fetch` would put it."""
        key = (name, file.revision)
        with store_failures(self.root, "cache"), self._changed:
            path = self.path(name, file.revision)
            path.parent.mkdir(exist_ok=True)
            with contextlib.suppress(FileExistsError):
                os.link(received_path(self.root, file.name), path)
                self._added(key, path)
        return path

    @property
    def cached_bytes(self) -> int:
        """The size of all files."""
        with self._changed:
            return sum(self._files.values())

    def collect(self) -> int:
        """Remove what interrupted writers left here."""
        with store_failures(self.root, "be cleaned"):
            unfinished = list(self.root.glob(".*.tmp"))
            for path in unfinished:
                path.unlink(missing_ok=True)
            return len(unfinished) + collect_uploads(self.root)

    # --- what only the log does ---

    def put(
        self,
        name: str,
        content: bytes | ReceivedFile,
        *,
        expected: str | None = None,
        spare: Collection[str] = (),
    ) -> PutResult:
        raise _refusal()

    def create(self, name: str, content: bytes | ReceivedFile) -> PutResult:
        raise _refusal()

    def rollback(self, name: str, revision: str | None = None) -> str:
        raise _refusal()

    def delete(self, name: str, *, expected: str | None = None) -> None:
        raise _refusal()

    def delete_revision(self, name: str, revision: str, *, expected: str | None = None) -> None:
        raise _refusal()

    def _whole(self, name: str, revision: str, size: int) -> Path:
        """A verified file, from here or from the store."""
        key, path = (name, revision), self.path(name, revision)
        if self._is_verified(key, path):
            with self._changed:
                self._files.move_to_end(key)
            return path
        data = self.objects.get(object_key(revision), size=size)
        for turn in range(_TRIES):
            if data is None:
                raise DamagedFile(
                    f"the object of adapter {name!r}, revision {revision}, is gone from the shared "
                    "store: publish the file again"
                )
            if hashlib.sha256(data).hexdigest() == revision:
                break
            logger.warning(
                "object %s has other bytes than its name says: %d of them", revision, len(data)
            )
            if turn + 1 == _TRIES:
                raise DamagedFile(
                    f"the object of adapter {name!r}, revision {revision}, in the shared store "
                    "does not have its hash: publish the file again"
                )
            data = self.objects.get(object_key(revision), size=size)
        assert data is not None
        self._write(path, data)
        with self._changed:
            self._added(key, path)
        return path

    def _is_verified(self, key: tuple[str, str], path: Path) -> bool:
        """Whether the file is here and whole; one that is not is forgotten."""
        try:
            status = path.stat()
            if self._verified.get(key) == status.st_mtime_ns and key in self._files:
                return True
            with path.open("rb") as file:
                whole = hashlib.file_digest(file, "sha256").hexdigest() == key[1]
        except FileNotFoundError:
            whole = False
        with self._changed:
            if whole:
                self._added(key, path)
            else:
                self._verified.pop(key, None)
                self._files.pop(key, None)
        return whole

    def _added(self, key: tuple[str, str], path: Path) -> None:
        status = path.stat()
        self._verified[key] = status.st_mtime_ns
        self._files[key] = status.st_size
        self._files.move_to_end(key)

    def _write(self, path: Path, data: bytes) -> None:
        """Not synced: what a crash leaves is verified before it is used, or fetched again."""
        temporary = self._temporary / secrets.token_hex(16)
        try:
            temporary.write_bytes(data)
            # Another thread may evict the name's other files, and then removes its folder.
            with self._changed:
                path.parent.mkdir(exist_ok=True)
                os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise

    def _evict(self) -> None:
        """Remove the least recently used files that nobody holds, until the rest fit."""
        excess = sum(self._files.values()) - self._max_bytes
        for key in list(self._files):
            if excess <= 0:
                return
            if key in self._held:
                continue
            excess -= self._files.pop(key)
            self._verified.pop(key, None)
            with contextlib.suppress(OSError):
                path = self.path(*key)
                path.unlink(missing_ok=True)
                path.parent.rmdir()

    def _size_of(self, name: str, revision: str) -> int:
        """How many bytes are expected, for the time that they may take."""
        record = self._records.get(name)
        listed = () if record is None else record.revisions
        return next((each.size for each in listed if each.revision == revision), 0)

    def _scan(self) -> None:
        """Find the files of earlier starts, the least recently read first."""
        found: list[tuple[float, tuple[str, str], int]] = []
        for folder in os.scandir(self.root):
            try:
                files = os.scandir(folder.path) if NAME.fullmatch(folder.name) else ()
                for file in files:
                    if file.name.endswith(_SUFFIX):
                        status = file.stat()
                        key = (folder.name, file.name.removesuffix(_SUFFIX))
                        found.append((status.st_atime, key, status.st_size))
            except NotADirectoryError:
                continue
            except OSError as error:
                # The others have nothing to do with it.
                logger.warning("%s cannot be looked into: %s", folder.path, error.strerror or error)
        self._files.update((key, size) for _, key, size in sorted(found))


def _refusal() -> StoreError:
    return StoreError("the files of a replica change only as the shared log says")
