"""Which adapter a name means now: the one map that counts, in front of the store. Knows no HTTP.

Requests resolve names here without touching the disk. Changes go to the store first and to the map
second, one at a time for each name, and are only then reported as done: from there on no request is
answered by what was before.
"""

import asyncio
import logging
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, TypeVar
from weakref import WeakValueDictionary

from adapters.backbone.model import check_fits
from adapters.errors import (
    AdapterError,
    DamagedFile,
    IncompatibleAdapter,
    InvalidAdapter,
)
from adapters.format.files import read_spec
from adapters.format.spec import AdapterSpec
from adapters.format.store import AdapterStore, Published
from service.catalog.entry import CatalogEntry, Condition
from service.catalog.view import Directory
from service.engine.interface import AdapterKey, Engine
from service.errors import ServiceError

logger = logging.getLogger(__name__)

T = TypeVar("T")

# Adapters that are made ready side by side at the start.
_PRELOADED_TOGETHER = 16


class CatalogObserver(Protocol):
    """Counts what the map holds; told from the event loop whenever that changes."""

    def adapter_published(self, name: str, labels: Sequence[str]) -> None: ...
    def adapter_removed(self, name: str) -> None: ...
    def stored(self, adapters: int, bytes_held: int) -> None: ...


class CatalogFollower(Protocol):
    """Keeps a copy of the map; told in the same turn of the loop in which it changes."""

    def changed(self, entry: CatalogEntry) -> None: ...
    def removed(self, name: str) -> None: ...


class _NoFollower:
    def changed(self, entry: CatalogEntry) -> None:
        pass

    def removed(self, name: str) -> None:
        pass


class Catalog(Directory):
    """The adapters of one store, and which of them fit the engine's backbone.

    Attributes:
        follower: who copies the map; nobody at first.
    """

    def __init__(self, store: AdapterStore, engine: Engine, *, observer: CatalogObserver) -> None:
        super().__init__(store.root)
        self.follower: CatalogFollower = _NoFollower()
        self._store = store
        self._engine = engine
        self._observer = observer
        self._changes: set[asyncio.Future[Any]] = set()
        self._stored_bytes = 0
        # An entry goes when nobody holds or waits for the lock.
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    async def load(self, zoo: Path | None) -> None:
        """Read the store, then register the zoo's adapters that fit and whose names are free.

        Of the stored files only the headers: thousands of them are gigabytes. Their bytes are
        checked when they are first loaded, and by `verify`.
        """
        for entry in await asyncio.to_thread(self._stored_entries):
            self._set(entry)
        for path in await asyncio.to_thread(_files_of, zoo):
            if path.stem not in self._entries:
                await self._add_from_zoo(path)
        usable = [
            AdapterKey(entry.name, entry.current)
            for entry in self.entries()
            if entry.current is not None and entry.refusal is None
        ]
        for start in range(0, len(usable), _PRELOADED_TOGETHER):
            together = usable[start : start + _PRELOADED_TOGETHER]
            await asyncio.gather(*(self._preload(key) for key in together))

    async def verify(self) -> None:
        """Hash every current file once more; one that is not what it was is served no longer."""
        for name in list(self._entries):
            async with self._lock(name):
                entry = self._entries.get(name)
                if entry is None or entry.refusal is not None:
                    continue
                checked = await asyncio.to_thread(self._hashed, entry)
                if checked.refusal is not None:
                    self._set(checked)

    async def publish(self, name: str, data: bytes, condition: Condition) -> Published:
        self.check(name, condition)
        spec = await self._engine.check(data)
        return await self._to_the_end(self._publish(name, data, spec, condition))

    async def rollback(self, name: str, prefix: str | None, condition: Condition) -> str:
        return await self._to_the_end(self._roll_back(name, prefix, condition))

    async def delete(self, name: str, condition: Condition) -> None:
        await self._to_the_end(self._delete(name, condition))

    async def unload(self, name: str) -> None:
        async with self._lock(name):
            self._set(self.entry(name).unloaded())

    async def reload(self, name: str) -> str:
        return await self._to_the_end(self._reload(name))

    async def settled(self, name: str) -> None:
        async with self._lock(name):
            pass

    async def _publish(
        self, name: str, data: bytes, spec: AdapterSpec, condition: Condition
    ) -> Published:
        async with self._lock(name):
            current = self._current(name)
            condition.check(name, current)
            if current is None:
                published = await asyncio.to_thread(self._store.create, name, data)
            else:
                published = await asyncio.to_thread(self._store.put, name, data, expected=current)
            key = AdapterKey(name, published.revision)
            await self._preload(key)
            await self._read(name, {key.revision: spec})
        logger.info("adapter published name=%s revision=%s", name, published.revision)
        return published

    async def _roll_back(self, name: str, prefix: str | None, condition: Condition) -> str:
        async with self._lock(name):
            entry = self.entry(name)
            condition.check(name, entry.current)
            target = entry.previous() if prefix is None else entry.revision(prefix)
            resolved = entry.resolved(target)
            await asyncio.to_thread(self._store.rollback, name, target)
            await self._preload(resolved.key)
            await self._read(name, {})
        logger.info("adapter rolled back name=%s revision=%s", name, target)
        return target

    async def _delete(self, name: str, condition: Condition) -> None:
        async with self._lock(name):
            entry = self.entry(name)
            condition.check(name, entry.current)
            await asyncio.to_thread(self._store.delete, name, expected=entry.current)
            self._stored_bytes -= self._entries.pop(name).size or 0
            self._observer.adapter_removed(name)
            self.follower.removed(name)
            self._observer.stored(len(self._entries), self._stored_bytes)
        logger.info("adapter deleted name=%s", name)

    async def _reload(self, name: str) -> str:
        async with self._lock(name):
            self.entry(name)
            entry = await asyncio.to_thread(lambda: self._hashed(self._entry_of(name, {})))
            if entry.current is not None and entry.refusal is None:
                await self._preload(AdapterKey(name, entry.current))
            self._set(entry)
            key, _ = entry.resolved(entry.require_current())
        logger.info("adapter reloaded name=%s revision=%s", name, key.revision)
        return key.revision

    async def _add_from_zoo(self, path: Path) -> None:
        try:
            self.check(path.stem, Condition())
            data = await asyncio.to_thread(path.read_bytes)
            spec = await self._engine.check(data)
            await self._publish(path.stem, data, spec, Condition())
        except (AdapterError, OSError) as error:
            logger.warning("zoo adapter skipped file=%s: %s", path.name, error)

    async def _preload(self, key: AdapterKey) -> None:
        try:
            await self._engine.preload(key)
        except (ServiceError, AdapterError) as error:
            logger.warning(
                "adapter not preloaded name=%s revision=%s: %s", key.name, key.revision, error
            )

    async def _read(self, name: str, known: Mapping[str, AdapterSpec]) -> None:
        """Bring the map to where the store is. Revisions never change: what is known stays."""
        before = self._entries.get(name)
        if before is not None:
            usable = {key: spec for key, spec in before.specs.items() if key not in before.unusable}
            known = {**usable, **known}
        self._set(await asyncio.to_thread(self._entry_of, name, known))

    def _set(self, entry: CatalogEntry) -> None:
        name, before = entry.name, self._entries.get(entry.name)
        self._stored_bytes += (entry.size or 0) - ((before.size or 0) if before else 0)
        self._entries[name] = entry
        if entry.refusal is not None:
            logger.warning(
                "adapter not served name=%s state=%s: %s", name, entry.state, entry.refusal
            )
        self._observer.adapter_published(name, entry.labels)
        self.follower.changed(entry)
        self._observer.stored(len(self._entries), self._stored_bytes)

    def _stored_entries(self) -> list[CatalogEntry]:
        return [self._entry_of(name, {}) for name in self._store.names()]

    def _entry_of(self, name: str, known: Mapping[str, AdapterSpec]) -> CatalogEntry:
        try:
            current, revisions = self._store.current(name), tuple(self._store.revisions(name))
        except (AdapterError, OSError) as error:
            return CatalogEntry(name, None, refusal=DamagedFile(str(error)))
        specs: dict[str, AdapterSpec] = {}
        unusable: dict[str, AdapterError] = {}
        for revision in dict.fromkeys([current, *(item.revision for item in revisions)]):
            if revision in known:
                specs[revision] = known[revision]
                continue
            try:
                specs[revision] = read_spec(self._store.path(name, revision))
                check_fits(specs[revision], self._engine.info)
            except (IncompatibleAdapter, DamagedFile) as error:
                unusable[revision] = error
            except (InvalidAdapter, OSError) as error:
                unusable[revision] = DamagedFile(f"adapter {name!r}, {revision}: {error}")
        return CatalogEntry(name, current, revisions, specs, unusable, unusable.get(current))

    def _hashed(self, entry: CatalogEntry) -> CatalogEntry:
        """With a refusal if the current file is not what it was; what is refused stays so."""
        name, current = entry.name, entry.current
        if current is None or entry.refusal is not None:
            return entry
        try:
            self._store.read(name, current)
        except (AdapterError, OSError) as error:
            damage = DamagedFile(f"adapter {name!r}, {current}: {error}")
            return replace(entry, unusable={**entry.unusable, current: damage}, refusal=damage)
        return entry

    def _lock(self, name: str) -> asyncio.Lock:
        return self._locks.setdefault(name, asyncio.Lock())

    async def _to_the_end(self, change: Coroutine[Any, Any, T]) -> T:
        """Run a change whole even if its request is cancelled: store and map must not part."""
        task = asyncio.ensure_future(change)
        self._changes.add(task)
        task.add_done_callback(self._changes.discard)
        return await asyncio.shield(task)


def _files_of(zoo: Path | None) -> list[Path]:
    return [] if zoo is None else sorted(zoo.glob("*.safetensors"))
