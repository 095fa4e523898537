"""What adapter names mean at this moment: a map and how it is read. Knows no store and no engine.

`Catalog` keeps the one that counts, beside the store; HTTP workers hold a `Replica` of it.
"""

from abc import ABC, abstractmethod
from pathlib import Path

from adapters.errors import InvalidName, UnknownAdapter
from adapters.format.store import NAME, Published, file_of
from service.catalog.entry import CatalogEntry, Condition, Resolved


class Directory(ABC):
    """Names and their entries. Reading neither waits nor touches a file; whoever asks for a change
    waits until it holds everywhere.

    Args:
        root: of the adapter store, for those who download.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._entries: dict[str, CatalogEntry] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def resolve(self, reference: str) -> Resolved:
        """What `name` or `name@prefix` means at this moment.

        Raises:
            UnknownAdapter, UnknownRevision: naming what exists.
            IncompatibleAdapter, DamagedFile: it is stored, but cannot be served here.
            UnloadedAdapter: it shall not be served now.
        """
        name, at, prefix = reference.partition("@")
        entry = self.entry(name)
        return entry.resolved(entry.revision(prefix) if at else entry.require_current())

    def entry(self, name: str) -> CatalogEntry:
        """
        Raises:
            UnknownAdapter: naming what exists.
        """
        found = self._entries.get(name)
        if found is None:
            raise UnknownAdapter(name, sorted(self._entries))
        return found

    def entries(self) -> list[CatalogEntry]:
        """All of them, by name."""
        return [self._entries[name] for name in sorted(self._entries)]

    def path(self, name: str, prefix: str | None = None) -> tuple[str, Path]:
        """A revision and where its file is.

        Raises:
            UnknownAdapter, UnknownRevision: naming what exists.
            DamagedFile: there is no current revision.
        """
        entry = self.entry(name)
        revision = entry.require_current() if prefix is None else entry.revision(prefix)
        return revision, file_of(self._root, name, revision)

    def check(self, name: str, condition: Condition) -> None:
        """What can be refused about an upload before its bytes are there.

        Raises:
            InvalidName: no adapter can have this name.
            RevisionConflict: the condition does not hold as things stand.
        """
        if not NAME.fullmatch(name):
            expected = "1 to 64 of a-z 0-9 . _ -, a letter or digit first"
            raise InvalidName(f"adapter name {name[:80]!r}: expected {expected}")
        condition.check(name, self._current(name))

    @abstractmethod
    async def publish(self, name: str, data: bytes, condition: Condition) -> Published:
        """Check an adapter file, store it and serve it. A failure leaves what is served as it was.

        Raises:
            InvalidName, RevisionConflict: before anything else is done.
            InvalidAdapter, IncompatibleAdapter: with every fault.
        """

    @abstractmethod
    async def rollback(self, name: str, prefix: str | None, condition: Condition) -> str:
        """Serve an earlier revision again and return it; None is the one that was served before.

        Raises:
            UnknownAdapter, UnknownRevision: there is none such.
            RevisionConflict: the condition does not hold.
            IncompatibleAdapter, DamagedFile: it cannot be served; what is served stays.
            UnloadedAdapter: nothing of it is served.
        """

    @abstractmethod
    async def unload(self, name: str) -> None:
        """Serve a name no longer until it is reloaded or published again, at most until the
        service's end. Requests in flight are answered; the store keeps everything.

        Raises:
            UnknownAdapter: there is none.
        """

    @abstractmethod
    async def reload(self, name: str) -> str:
        """Serve what the store holds of a name, read and checked again; its current revision.

        Raises:
            UnknownAdapter: there is none.
            IncompatibleAdapter, DamagedFile: it cannot be served.
        """

    @abstractmethod
    async def delete(self, name: str, condition: Condition) -> None:
        """Forget a name and all its revisions.

        Raises:
            UnknownAdapter: there is none.
            RevisionConflict: the condition does not hold.
        """

    @abstractmethod
    async def settled(self, name: str) -> None:
        """Return when no change of this name is under way."""

    def _current(self, name: str) -> str | None:
        entry = self._entries.get(name)
        return None if entry is None else entry.current
