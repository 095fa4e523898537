"""The authoritative map from adapter names to entries, in front of the store.

Requests resolve names here without touching the disk. A change goes to the store first and to the
map second, one at a time for each name, and only then returns: from then on no request is answered
by an older revision.
"""

import asyncio
import logging
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from adapters.backbone.model import check_fits
from adapters.errors import (
    AdapterError,
    DamagedFile,
    IncompatibleAdapter,
    InvalidAdapter,
    InvalidName,
    NoTraffic,
    RevisionServed,
    RevisionTried,
    StoreError,
    StoreFailed,
    UnlikeRevision,
)
from adapters.format.events import Event, Happening, from_json, to_json, with_event
from adapters.format.failures import store_failed, store_failures
from adapters.format.files import read_spec
from adapters.format.spec import AdapterSpec
from adapters.format.store import AdapterStore, verified_file
from adapters.format.uploads import ReceivedFile, held, received_path
from service.catalog.entry import (
    MAX_CARD_BYTES,
    CatalogEntry,
    Change,
    ChangeResult,
    Condition,
    Inspection,
)
from service.catalog.meaning import changed_meaning
from service.catalog.preloading import preload_all
from service.catalog.traffic import Ending, InvalidTraffic, Traffic, now
from service.catalog.trials import Trials
from service.catalog.view import CatalogView
from service.drift.monitor import DriftMonitor
from service.engine.interface import AdapterKey, CheckedAdapter, Engine
from service.engine.observer import Observer
from service.engine.others import OtherEngines
from service.engine.trials import Cause
from service.errors import ServiceError
from service.records.audit import AuditLog, Outcome

logger = logging.getLogger(__name__)

# Of a name in the audit log: a refused one may have any length.
_MAX_NAME = 80
# For how long the engine keeps an adapter that is no longer served: a request that looked its name
# up before is still on its way.
_RETIRED_SECONDS = 10.0
# A name that could not be read after a change is read again after so long, and so on.
_READ_AGAIN_SECONDS = (0.05, 0.2, 1.0)


class Catalog(CatalogView):
    """The adapters of one store, and which of them fit the engine's backbone.

    Attributes:
        on_update: called with a name and its new entry, or None after a deletion, in the same turn
            of the event loop in which the map changes.
        others: the engines of the host's other devices.
    """

    def __init__(
        self,
        store: AdapterStore,
        engine: Engine,
        *,
        observer: Observer,
        audit: AuditLog | None = None,
        trials: Trials | None = None,
        drift: DriftMonitor | None = None,
    ) -> None:
        super().__init__(store.root)
        self.on_update: Callable[[str, CatalogEntry | None], None] = lambda *_: None
        self.others = OtherEngines()
        self._store = store
        self._engine = engine
        self._observer = observer
        self._audit = audit or AuditLog(None)
        self._trials = trials or Trials(observer)
        self._drift = drift
        self._trials.on_verdict = self._take_back
        self._trials.on_unreadable = self._take_back_unreadable
        self._endings: set[asyncio.Task[None]] = set()
        self._changes: set[asyncio.Future[ChangeResult]] = set()
        self._stored_bytes = 0
        # A lock is dropped when nothing holds it or waits for it.
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    async def load(self, zoo: Path | None) -> None:
        """Read the store, then register the zoo's adapters that fit and whose names are free.

        Only the headers of stored files are read, since thousands of files are gigabytes. Their
        bytes are checked when they are first loaded, and by `verify`.
        """
        for entry in await asyncio.to_thread(self._stored_entries):
            self._set(entry)
        for path in await asyncio.to_thread(files_of, zoo):
            if path.stem not in self._entries:
                await self._add_from_zoo(path)

    async def preload_all(self) -> None:
        """Load what is served, as far as the devices have room for it."""
        usable = [
            AdapterKey(entry.name, entry.current)
            for entry in self.entries()
            if entry.current is not None and entry.refusal is None
        ]
        usable += [entry.split.key for entry in self.entries() if entry.split is not None]
        await preload_all(usable, self._preload_answering)

    async def verify(self) -> None:
        """Hash every current file; one whose bytes have changed is no longer served."""
        for name in list(self._entries):
            async with self._lock(name):
                entry = self._entries.get(name)
                if entry is None:
                    continue
                try:
                    if isinstance(entry.refusal, StoreFailed):
                        # It could not be read at the start.
                        await self._read(name, {})
                        entry = self._entries[name]
                    if entry.refusal is not None:
                        continue
                    checked = await asyncio.to_thread(self._hashed, entry)
                except StoreFailed as error:
                    logger.warning("adapter %s cannot be checked now: %s", name, error)
                    if self._is_gone():
                        return
                    continue
                if checked.refusal is not None:
                    self._set(checked)

    async def apply(self, change: Change) -> ChangeResult:
        # Runs to its end even if its request is cancelled: store and map must stay the same.
        task = asyncio.ensure_future(
            self._apply(change, None) if change.file is None else self._apply_file(change)
        )
        self._changes.add(task)
        task.add_done_callback(self._over)
        return await asyncio.shield(task)

    def _over(self, change: asyncio.Future[ChangeResult]) -> None:
        self._changes.discard(change)
        if not change.cancelled():
            # An error is no surprise if nobody is left to get it: the client has gone.
            change.exception()

    async def _apply_file(self, change: Change) -> ChangeResult:
        assert change.file is not None, "a file is received before it is published"
        with store_failures(self.root, "publish"), held(self.root, change.file.name):
            try:
                self.check(change.name, change.condition)
                checked = await self._engine.check(received_path(self.root, change.file.name))
            except AdapterError as error:
                await self._record_end(change, "", error)
                raise
            return await self._apply(change, checked)

    async def inspected(self, file: ReceivedFile) -> Inspection:
        path = received_path(self.root, file.name)
        with store_failures(self.root, "check the file"), held(self.root, file.name):
            try:
                return Inspection((await self._engine.check(path)).spec)
            except (InvalidAdapter, IncompatibleAdapter) as refusal:
                # What it declares may be readable all the same.
                with suppress(InvalidAdapter):
                    return Inspection(await asyncio.to_thread(read_spec, path), refusal)
                return Inspection(None, refusal)

    async def _apply(self, change: Change, uploaded: CheckedAdapter | None) -> ChangeResult:
        async with self._lock(change.name):
            if change.operation in ("rehash", "settle", "figures", "card"):
                return await self._perform(change, uploaded)
            before = self._entries.get(change.name)
            recorded = ""
            try:
                if change.operation != "unload":
                    await self._reconcile(change.name)
                before = self._entries.get(change.name)
                recorded = await self._record_begin(change)
                result = await self._perform(change, uploaded)
            except Exception as error:
                if isinstance(error, StoreFailed):
                    # What the disk made of it may be either.
                    with suppress(AdapterError):
                        await self._reconcile(change.name)
                await self._record_end(change, recorded, error, before=before)
                raise
            await self._record_end(change, recorded, result, before=before)
            return result

    async def _perform(self, change: Change, uploaded: CheckedAdapter | None) -> ChangeResult:
        match change.operation:
            case "publish":
                assert uploaded is not None
                return await self._publish(change, uploaded)
            case "rollback":
                return await self._roll_back(change)
            case "delete":
                return await self._delete(change)
            case "delete_revision":
                return await self._delete_revision(change)
            case "unload":
                self._set(self.entry(change.name).unloaded())
                return ChangeResult()
            case "reload":
                return await self._reload(change.name)
            case "rehash":
                return await self._rehash(change.name, change.revision or "")
            case "settle":
                return ChangeResult()
            case "divide":
                assert change.traffic is not None
                return await self._divide(change, change.traffic)
            case "end_traffic":
                assert change.ending is not None
                return await self._end_traffic(change, change.ending)
            case "figures":
                self.entry(change.name)
                return ChangeResult(figures=self._trials.figures(change.name))
            case "card":
                return await self._card(change)
            case "describe":
                assert change.card is not None
                return await self._describe(change, change.card)

    async def _record_begin(self, change: Change) -> str:
        """
        Raises:
            AuditFailed, StoreFailed: the change cannot be recorded, so it must not be made.
        """
        facts = _facts_of(change) | {"old": self._current(change.name)}
        return await asyncio.to_thread(
            self._audit.begun,
            f"adapter.{change.operation}",
            facts,
            makes_room=change.operation in ("delete", "delete_revision"),
        )

    async def _record_end(
        self,
        change: Change,
        recorded: str,
        outcome: ChangeResult | Exception,
        *,
        before: CatalogEntry | None = None,
    ) -> None:
        after = self._entries.get(change.name)
        stored = {item.revision for item in after.revisions} if after else set()
        removed = [item.revision for item in (before.revisions if before else ())]
        facts = _facts_of(change) | {
            "old": before.current if before else None,
            "new": after.current if after else None,
            "removed": [revision for revision in removed if revision not in stored],
        }
        reason: str | None = None
        word: Outcome = "done"
        if isinstance(outcome, Exception):
            reason = str(outcome)
            refused = isinstance(outcome, AdapterError) and not isinstance(outcome, StoreFailed)
            word = "refused" if refused else "failed"
        elif change.operation == "publish" and not outcome.changed:
            word = "unchanged"
        event = f"adapter.{change.operation}"
        await asyncio.to_thread(self._audit.ended, event, recorded, facts, word, reason)

    async def reconcile(self) -> None:
        """Take over what the store holds now, for when its folder was replaced."""
        names = await asyncio.to_thread(self._store.names)
        for name in {*names, *self._entries}:
            async with self._lock(name):
                try:
                    await self._reconcile(name)
                except StoreFailed as error:
                    if self._is_gone():
                        raise
                    logger.warning("adapter %s cannot be read again now: %s", name, error)

    async def _reconcile(self, name: str) -> None:
        """Take over what another writer has done to the store, or that it came back empty."""
        try:
            history = await asyncio.to_thread(self._store.history, name)
        except (DamagedFile, InvalidName):
            return
        entry = self._entries.get(name)
        if (history[0] if history else None) == (entry.current if entry else None):
            return
        logger.warning("adapter %s was changed by something else than this service", name)
        if history:
            await self._read(name, {})
        else:
            self._forget(name)

    async def _publish(self, change: Change, uploaded: CheckedAdapter) -> ChangeResult:
        name, current, file = change.name, self._current(change.name), change.file
        spec = uploaded.spec
        assert file is not None
        change.condition.check(name, current)
        if change.stage:
            return await self._stage(change, uploaded)
        self._refuse_another_meaning(name, spec, change.condition, force=change.force)
        if current is None:
            stored = await asyncio.to_thread(self._store.create, name, file)
        else:
            spare = await self._in_use(name)
            stored = await asyncio.to_thread(
                self._store.put, name, file, expected=current, spare=spare
            )
        await self._preload(AdapterKey(name, stored.revision), uploaded)
        if stored.changed:
            await self._note(change, "publish", stored.revision)
        await self._read(name, {stored.revision: spec})
        logger.info("adapter published name=%s revision=%s", name, stored.revision)
        return ChangeResult(*stored)

    async def _stage(self, change: Change, uploaded: CheckedAdapter) -> ChangeResult:
        """Store a revision that is not current. It is tried on no text, unless another is tried."""
        name, entry, file = change.name, self.entry(change.name), change.file
        assert file is not None
        current = entry.require_current()
        spare = await self._in_use(name)
        if (split := entry.split) is not None:
            spare |= {split.key.revision}
        stored = await asyncio.to_thread(
            self._store.stage, name, file, expected=current, spare=spare
        )
        is_new = stored.revision not in {item.revision for item in entry.revisions}
        if split is None and is_new:
            traffic = Traffic(stored.revision, current, 0.0, staged=True, since=now())
            await self._write_traffic(name, traffic, current)
        if is_new:
            await self._note(change, "stage", stored.revision)
        await self._preload(AdapterKey(name, stored.revision), uploaded)
        await self._read(name, {stored.revision: uploaded.spec})
        logger.info("adapter staged name=%s revision=%s", name, stored.revision)
        return ChangeResult(stored.revision)

    async def _divide(self, change: Change, wanted: Traffic) -> ChangeResult:
        name, traffic = change.name, self._divided(change, wanted)
        await self._write_traffic(name, traffic, traffic.baseline)
        await self._preload(AdapterKey(name, traffic.revision))
        self._set(replace(self.entry(name), traffic=traffic))
        _log_division(name, traffic)
        return ChangeResult(traffic.revision)

    def _divided(self, change: Change, wanted: Traffic) -> Traffic:
        """The division that a change asks for; raises as `CatalogView.divide`."""
        name, entry = change.name, self.entry(change.name)
        change.condition.check(name, entry.current)
        current = entry.require_current()
        target = entry.revision(wanted.revision)
        if target == current:
            raise RevisionServed(name, target)
        before, after = entry.resolved(current), entry.resolved(target)
        if not wanted.shadow and (changes := changed_meaning(before.spec, after.spec)):
            raise UnlikeRevision(name, target, changes)
        known = entry.split
        goes_on = known is not None and known.key == after.key
        since = known.traffic.since if known is not None and goes_on else now()
        last = entry.traffic
        staged = last is not None and last.revision == target and last.never_current
        return replace(wanted, revision=target, baseline=current, staged=staged, since=since)

    async def _end_traffic(self, change: Change, ending: Ending) -> ChangeResult:
        name, entry = change.name, self.entry(change.name)
        ended = self._ended(change, ending)
        if ended is None:
            return ChangeResult()
        await self._write_traffic(name, ended, entry.require_current())
        self._set(replace(entry, traffic=ended))
        _log_ending(name, ended.revision, ending)
        return ChangeResult(ended.revision)

    def _ended(self, change: Change, ending: Ending) -> Traffic | None:
        """The division that a change ends, or None if it has ended; raises as
        `CatalogView.end_traffic`."""
        name, entry = change.name, self.entry(change.name)
        change.condition.check(name, entry.current)
        traffic = entry.traffic
        if traffic is None:
            raise NoTraffic(name)
        if not traffic.in_force or change.revision not in (None, traffic.revision):
            return None
        return replace(traffic, ended=ending)

    def _take_back(self, name: str, traffic: Traffic, cause: Cause, reason: str) -> None:
        """End a division by its rule."""

        async def end() -> None:
            ending = Ending(cause, reason, now())
            change = Change("end_traffic", name, revision=traffic.revision, ending=ending)
            try:
                await self.apply(change)
            except (AdapterError, ServiceError) as error:
                logger.error("the end of a division is not stored name=%s: %s", name, error)
                entry = self._entries.get(name)
                if entry is not None and entry.traffic == traffic:
                    self._set(replace(entry, traffic=replace(traffic, ended=ending)))

        self._keep(asyncio.ensure_future(end()))

    def _take_back_unreadable(self, name: str, revision: str, reason: str) -> None:
        entry = self._entries.get(name)
        if entry is not None and (split := entry.split) and split.key.revision == revision:
            self._take_back(name, split.traffic, "unusable", reason)

    def _keep(self, task: asyncio.Task[None]) -> None:
        self._endings.add(task)
        task.add_done_callback(self._endings.discard)

    async def _write_traffic(self, name: str, traffic: Traffic, current: str) -> None:
        """
        Raises:
            StoreFailed: it cannot be stored.
        """
        content = traffic.to_json().encode()
        await asyncio.to_thread(self._store.set_traffic, name, content, expected=current)

    async def _store_ending(self, name: str, traffic: Traffic) -> None:
        """Store how a division ended with another change. If that fails, or before it is done, the
        revisions tell the same."""
        async with self._lock(name):
            entry = self._entries.get(name)
            if entry is None or entry.traffic is not traffic or entry.current is None:
                return
            with suppress(StoreError):
                await self._write_traffic(name, traffic, entry.current)

    async def _roll_back(self, change: Change) -> ChangeResult:
        name, entry = change.name, self.entry(change.name)
        change.condition.check(name, entry.current)
        prefix = change.revision
        target = entry.previous() if prefix is None else entry.revision(prefix)
        resolved = entry.resolved(target)
        await asyncio.to_thread(self._store.rollback, name, target)
        if target != entry.current:
            await self._note(change, way_back(entry, target), target)
        await self._preload(resolved.key)
        await self._read(name, {})
        logger.info("adapter rolled back name=%s revision=%s", name, target)
        return ChangeResult(target, changed=True)

    async def _delete(self, change: Change) -> ChangeResult:
        name, entry = change.name, self.entry(change.name)
        change.condition.check(name, entry.current)
        await asyncio.to_thread(self._store.delete, name, expected=entry.current)
        self._forget(name)
        logger.info("adapter deleted name=%s", name)
        return ChangeResult()

    async def _delete_revision(self, change: Change) -> ChangeResult:
        name, entry = change.name, self.entry(change.name)
        change.condition.check(name, entry.current)
        target = entry.revision(change.revision or "")
        if (split := entry.split) is not None and split.key.revision == target:
            raise RevisionTried(name, target)
        await asyncio.to_thread(self._store.delete_revision, name, target, expected=entry.current)
        events = await self._note(change, "delete_revision", target)
        self._set(replace(entry.without(target), events=events))
        logger.info("adapter revision deleted name=%s revision=%s", name, target)
        return ChangeResult(target)

    async def _card(self, change: Change) -> ChangeResult:
        revision = self._revision_of(change)
        content = await asyncio.to_thread(self._store.card, change.name, revision)
        card = None if content is None else content.decode("utf-8", "replace")
        return ChangeResult(revision, card=card)

    async def _describe(self, change: Change, card: str) -> ChangeResult:
        change.condition.check(change.name, self.entry(change.name).current)
        revision = self._revision_of(change)
        await asyncio.to_thread(self._store.set_card, change.name, revision, card.encode())
        return ChangeResult(revision)

    def _revision_of(self, change: Change) -> str:
        """The revision that a change names, or else the current one."""
        entry = self.entry(change.name)
        prefix = change.revision
        return entry.require_current() if prefix is None else entry.revision(prefix)

    async def _note(self, change: Change, what: Happening, revision: str) -> tuple[Event, ...]:
        """Keep who did this to a revision, and return all events. What is done is done, also if
        that cannot be written."""
        name, entry = change.name, self._entries.get(change.name)
        events: tuple[Event, ...] = () if entry is None else entry.events
        try:
            stored = await asyncio.to_thread(self._store.history, name)
            events = with_event(events, Event(now(), what, revision, change.client), stored)
            await asyncio.to_thread(self._store.set_events, name, to_json(events))
        except AdapterError as error:
            logger.warning("who changed adapter %s is not kept beside it: %s", name, error)
        return events

    async def _reload(self, name: str) -> ChangeResult:
        while True:
            before = self.entry(name)
            entry = await asyncio.to_thread(lambda: self._hashed(self._entry_of(name, {})))
            if entry.current is not None and entry.refusal is None:
                await self._preload(AdapterKey(name, entry.current))
            # Other replicas change it without this one's lock.
            if self._entries.get(name) is before:
                break
        self._set(entry)
        key = entry.resolved(entry.require_current()).key
        logger.info("adapter reloaded name=%s revision=%s", name, key.revision)
        return ChangeResult(key.revision, changed=True)

    async def _rehash(self, name: str, prefix: str) -> ChangeResult:
        entry = self.entry(name)
        revision = entry.revision(prefix)
        try:
            await asyncio.to_thread(self._verified, name, revision)
        except AdapterError as error:
            self._raise_trouble(error)
            damage = DamagedFile(f"adapter {name!r}, {revision}: {error}")
            # As it is now: another replica may have changed it meanwhile.
            now = self._entries.get(name)
            stored = () if now is None else now.revisions
            is_there = any(item.revision == revision for item in stored)
            if (
                now is not None
                and is_there
                and not isinstance(now.unusable.get(revision), DamagedFile)
            ):
                self._set(now.damaged(revision, damage))
            raise damage from None
        return ChangeResult()

    async def _add_from_zoo(self, path: Path) -> None:
        try:
            data = await asyncio.to_thread(path.read_bytes)
            await self.publish(path.stem, data, Condition())
            await self._add_card(path)
        except (AdapterError, OSError) as error:
            logger.warning("zoo adapter skipped file=%s: %s", path.name, error)

    async def _add_card(self, path: Path) -> None:
        """Keep the model card that lies beside a file of the zoo."""
        card = path.with_suffix(".md")
        if await asyncio.to_thread(card.is_file):
            content = await asyncio.to_thread(card.read_bytes)
            text = content[:MAX_CARD_BYTES].decode("utf-8", "replace")
            await self.describe(path.stem, None, text, Condition())

    async def _in_use(self, name: str) -> frozenset[str]:
        return self._engine.in_use(name) | await self.others.in_use(name)

    async def _preload(self, key: AdapterKey, checked: CheckedAdapter | None = None) -> None:
        """Load an adapter on all devices that have room for it."""
        await asyncio.gather(self._preload_here(key, checked), self.others.preload(key))

    async def _preload_answering(self, key: AdapterKey) -> None:
        """The same, unless it was replaced or deleted before its turn came."""
        entry = self._entries.get(key.name)
        if entry is not None and key.revision in entry.answering:
            await self._preload(key)

    async def _preload_here(self, key: AdapterKey, checked: CheckedAdapter | None) -> None:
        try:
            await self._engine.preload(key, checked)
        except (ServiceError, AdapterError) as error:
            logger.warning(
                "adapter not preloaded name=%s revision=%s: %s", key.name, key.revision, error
            )

    async def _read(self, name: str, known: Mapping[str, AdapterSpec]) -> None:
        """Update the map from the store. Specs in `known` are not read: files never change.

        Raises:
            StoreFailed: it cannot be read, also when tried again; the map stays as it is.
        """
        before = self._entries.get(name)
        if before is not None:
            usable = {key: spec for key, spec in before.specs.items() if key not in before.unusable}
            known = {**usable, **known}
        for pause in _READ_AGAIN_SECONDS:
            with suppress(StoreFailed):
                self._set(await asyncio.to_thread(self._entry_of, name, known))
                return
            await asyncio.sleep(pause)
        self._set(await asyncio.to_thread(self._entry_of, name, known))

    def _forget(self, name: str) -> None:
        before = self._entries.pop(name)
        self._stored_bytes -= before.size or 0
        self._retire(name, before.served)
        self._trials.follow(name, None)
        if self._drift is not None:
            self._drift.follow(name, None, {})
        self._observer.adapter_removed(name)
        self.on_update(name, None)
        self._observer.stored(len(self._entries), self._stored_bytes)

    def _set(self, entry: CatalogEntry) -> None:
        name, before = entry.name, self._entries.get(entry.name)
        settled = entry.settled()
        if settled is not entry and (traffic := settled.traffic) is not None:
            entry = settled
            logger.info("traffic ended name=%s: %s", name, traffic.ended and traffic.ended.reason)
            self._keep(asyncio.ensure_future(self._store_ending(name, traffic)))
        self._stored_bytes += (entry.size or 0) - ((before.size or 0) if before else 0)
        self._entries[name] = entry
        if before is not None:
            self._retire(name, before.served - entry.served)
        if entry.refusal is not None:
            logger.warning(
                "adapter not served name=%s state=%s: %s", name, entry.state, entry.refusal
            )
        self._observer.adapter_published(name, entry.labels)
        self._trials.follow(name, entry)
        if self._drift is not None:
            self._drift.follow(name, entry.current, entry.answering)
        self.on_update(name, entry)
        self._observer.stored(len(self._entries), self._stored_bytes)

    def _retire(self, name: str, revisions: frozenset[str]) -> None:
        """Have the engine give back the memory of revisions that are served no longer."""

        def retire() -> None:
            entry = self._entries.get(name)
            # One of them may have come back meanwhile.
            for revision in revisions - (entry.served if entry else frozenset()):
                self._engine.retire(AdapterKey(name, revision))
                self.others.retire(AdapterKey(name, revision))

        if revisions:
            asyncio.get_running_loop().call_later(_RETIRED_SECONDS, retire)

    def _stored_entries(self) -> list[CatalogEntry]:
        return [self._stored_entry(name) for name in self._store.names()]

    def _stored_entry(self, name: str) -> CatalogEntry:
        try:
            return self._entry_of(name, {})
        except StoreFailed as error:
            # One name that cannot be read keeps no other from being served.
            return CatalogEntry(name, None, refusal=error)

    def _entry_of(self, name: str, known: Mapping[str, AdapterSpec]) -> CatalogEntry:
        """
        Raises:
            StoreFailed: what is current cannot be read, which says nothing about its bytes.
        """
        try:
            current, revisions = self._store.current(name), tuple(self._store.revisions(name))
        except StoreFailed:
            raise
        except AdapterError as error:
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
            except (InvalidAdapter, FileNotFoundError, IsADirectoryError) as error:
                unusable[revision] = DamagedFile(f"adapter {name!r}, {revision}: {error}")
            except OSError as error:
                unusable[revision] = store_failed(self.root, f"read adapter {name!r}", error)
                if revision == current:
                    raise unusable[revision] from None
        return CatalogEntry(
            name,
            current,
            revisions,
            specs,
            unusable,
            unusable.get(current),
            self._traffic_of(name),
            self._events_of(name),
        )

    def _events_of(self, name: str) -> tuple[Event, ...]:
        try:
            content = self._store.events(name)
            return () if content is None else from_json(content)
        except (AdapterError, OSError, ValueError) as error:
            logger.warning("who changed adapter %s cannot be read: %s", name, error)
            return ()

    def _traffic_of(self, name: str) -> Traffic | None:
        """As it is stored; one that cannot be read has ended."""
        try:
            content = self._store.traffic(name)
            return None if content is None else Traffic.from_json(content)
        except (InvalidTraffic, AdapterError, OSError) as error:
            logger.warning("the division of adapter %s cannot be read: %s", name, error)
            return Traffic("", "", 0.0).end("damaged", f"its file cannot be read: {error}")

    def _hashed(self, entry: CatalogEntry) -> CatalogEntry:
        """The entry, with a refusal if the current file's bytes have changed.

        Raises:
            StoreFailed: they cannot be read.
        """
        name, current = entry.name, entry.current
        if current is None or entry.refusal is not None:
            return entry
        try:
            self._verified(name, current)
        except AdapterError as error:
            self._raise_trouble(error)
            damage = DamagedFile(f"adapter {name!r}, {current}: {error}")
            return entry.damaged(current, damage)
        return entry

    def _verified(self, name: str, revision: str) -> None:
        """
        Raises:
            DamagedFile: the file is gone, or its bytes have changed.
            StoreFailed: it cannot be read.
        """
        verified_file(self.root, name, revision)

    def _raise_trouble(self, error: AdapterError) -> None:
        """Raise an error again if the disk could not be read: the bytes may be right."""
        if isinstance(error, StoreFailed):
            raise error

    def _is_gone(self) -> bool:
        return not self._store.root.is_dir()

    def _lock(self, name: str) -> asyncio.Lock:
        return self._locks.setdefault(name, asyncio.Lock())


def way_back(entry: CatalogEntry, target: str) -> Happening:
    """What making a stored revision the current one is called."""
    traffic = entry.traffic
    tried = traffic is not None and traffic.in_force and traffic.revision == target
    return "promote" if tried else "rollback"


def _facts_of(change: Change) -> dict[str, Any]:
    """What the audit log tells of a change before it is made."""
    facts: dict[str, Any] = {
        "who": change.client,
        "address": change.address,
        "request_id": change.request_id,
        "adapter": change.name[:_MAX_NAME],
    }
    if change.file is not None:
        facts |= {"file": change.file.revision, "force": change.force}
    if change.card is not None:
        facts["card_characters"] = len(change.card)
    if change.stage:
        facts["stage_only"] = True
    if change.revision is not None:
        facts["revision"] = change.revision
    if (traffic := change.traffic) is not None:
        facts |= {
            "revision": traffic.revision,
            "percent": traffic.percent,
            "shadow": traffic.shadow,
            "rule": asdict(traffic.rule),
        }
    if change.ending is not None:
        facts |= {"cause": change.ending.cause, "why": change.ending.reason}
    return facts


def _log_division(name: str, traffic: Traffic) -> None:
    logger.info(
        "traffic divided name=%s revision=%s percent=%g shadow=%s",
        name,
        traffic.revision,
        traffic.percent,
        traffic.shadow,
    )


def _log_ending(name: str, revision: str, ending: Ending) -> None:
    logger.warning(
        "traffic ended name=%s revision=%s cause=%s: %s",
        name,
        revision,
        ending.cause,
        ending.reason,
    )


def files_of(zoo: Path | None) -> list[Path]:
    """The adapter files of a zoo, by name."""
    return [] if zoo is None else sorted(zoo.glob("*.safetensors"))
