"""A catalog whose truth is the shared log: it serves what the log's entries say, and makes changes
by adding to it.

Files in its store are a cache. The specs of all revisions are in the log, so a name is known as
soon as its entry is read, and its file is fetched when it is first needed.
"""

import asyncio
import json
import logging
import random
import re
import socket
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from time import monotonic
from typing import Any

from adapters.backbone.model import check_fits
from adapters.errors import (
    AdapterError,
    CurrentRevision,
    DamagedFile,
    IncompatibleAdapter,
    InvalidName,
    RevisionConflict,
    RevisionTried,
    StoreError,
    StoreFailed,
    StoreUnreachable,
    UnknownAdapter,
    UnloadedAdapter,
)
from adapters.format.durable import write_atomically
from adapters.format.events import Event, Happening, with_event
from adapters.format.failures import store_failures
from adapters.format.spec import AdapterSpec
from adapters.format.store import NAME, Revision
from adapters.format.uploads import received_path
from adapters.shared.cache import CachedStore
from adapters.shared.collect import Collected, collect
from adapters.shared.log import SharedLog
from adapters.shared.objects import store_object
from adapters.shared.records import Entry, LogState, NameRecord, RevisionRecord, decode, encode
from service.catalog.catalog import Catalog, files_of, way_back
from service.catalog.entry import CatalogEntry, Change, ChangeResult, Condition
from service.catalog.traffic import Ending, InvalidTraffic, Traffic, now
from service.catalog.trials import Trials
from service.drift.monitor import DriftMonitor
from service.engine.interface import AdapterKey, CheckedAdapter, Engine
from service.engine.observer import Observer
from service.errors import LeaseExpired
from service.records.audit import AuditLog
from service.replicas import names
from service.replicas.follower import Follower
from service.replicas.lease import Lease
from service.replicas.preparations import Preparations
from service.replicas.rollouts import Decision, Rollouts

logger = logging.getLogger(__name__)

# Names of the zoo that a replica has registered: a name that was deleted since must not come back
# with every replica that starts.
_ZOO = "zoo/"
# Of `IDSPAM_ROLLOUT_SECONDS`: after how long a prepare counts as abandoned.
_ABANDONED = 2.0
# Which store this folder is a cache of: its URL and its cluster's id.
_CLUSTER_FILE = ".cluster.json"
# How often the log is looked at for a new snapshot, and for what can go.
_TIDY_SECONDS = 10.0
_COLLECT_SECONDS = 3600.0
# How soon what is known is on this machine's disk.
_SAVED_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class ReplicaSettings:
    """name: of this replica. stale: whether it answers also without a lease. kept: revisions of a
    name that stay when another one is published. The others are the settings of their names."""

    name: str
    follow_seconds: float = 0.5
    lease_seconds: float = 5.0
    rollout_seconds: float = 60.0
    stale: bool = False
    kept: int | None = None


class ReplicatedCatalog(Catalog):
    """
    Attributes:
        everywhere: returns when all HTTP processes have every update up to now.
        renewed: called when the lease was renewed.
    """

    def __init__(
        self,
        store: CachedStore,
        engine: Engine,
        log: SharedLog,
        settings: ReplicaSettings,
        *,
        observer: Observer,
        audit: AuditLog | None = None,
        trials: Trials | None = None,
        drift: DriftMonitor | None = None,
    ) -> None:
        super().__init__(store, engine, observer=observer, audit=audit, trials=trials, drift=drift)
        self.everywhere: Callable[[], Awaitable[None]] = _at_once
        self.renewed: Callable[[], None] = lambda: None
        self._cache = store
        self._log = log
        self._settings = settings
        self._lease = Lease(settings.lease_seconds)
        self._background: set[asyncio.Task[None]] = set()
        # What is known and not yet in its file, and what writes it.
        self._is_unsaved = False
        self._saving: asyncio.Task[None] | None = None
        self._leaving = asyncio.Event()
        self._preparations = Preparations(
            prepare=self._prepare,
            discard=self._discard,
            changed=lambda: self._follower.changed(),
            # Not all replicas at the same moment.
            seconds=_ABANDONED * settings.rollout_seconds * random.uniform(1.0, 1.5),
        )
        self._follower = Follower(
            log,
            settings.name,
            self._lease,
            self._preparations,
            follow_seconds=settings.follow_seconds,
            observer=observer,
            open_log=self._open_log,
            commit=self._committed,
            restore=self._restored,
            everywhere=lambda: self.everywhere(),
            renewed=lambda: self.renewed(),
            expired=lambda entry: self._rollouts.abort(entry),
        )
        self._rollouts = Rollouts(
            log,
            self._follower,
            self._preparations,
            seconds=settings.rollout_seconds,
            lease_seconds=settings.lease_seconds,
            observer=observer,
        )

    @property
    def lease(self) -> float | None:
        """Until when this replica may answer; None: it needs no lease."""
        return None if self._settings.stale else self._lease.until

    def trouble(self) -> str | None:
        """Why this replica may not know the newest changes, if so."""
        if self._lease.held:
            return None
        silent = self._follower.silent_seconds
        reason = self._follower.trouble or "it answers slowly"
        return (
            f"the replica's lease is over; it read the shared store {silent:.1f} seconds ago: "
            f"{reason}"
        )

    def details(self) -> dict[str, float | str]:
        """For /readyz."""
        details: dict[str, float | str] = {
            "replica": self._follower.id,
            "log": self._follower.number,
            "shared_store": self._follower.trouble or "ok",
        }
        if not self._lease.held:
            details["stale_seconds"] = round(self._follower.silent_seconds, 1)
        return details

    def refuse_unless_fresh(self) -> None:
        """
        Raises:
            LeaseExpired: this replica may not know the newest changes, and must not answer then.
        """
        if not self._settings.stale and not self._lease.held:
            raise LeaseExpired(self.trouble() or "the lease is being renewed")

    async def load(self, zoo: Path | None) -> None:
        """Read the log and follow it, and register the zoo unless another replica has done so.

        Raises:
            StoreUnreachable: the store cannot be reached, and nothing is cached that may be served.
            StoreError: the store cannot be used.
        """
        try:
            await self._follower.start()
        except StoreUnreachable as error:
            known = await asyncio.to_thread(self._read_known) if self._settings.stale else None
            if known is None:
                raise
            logger.warning("adapters are served as they were known last: %s", error)
            await self._restored(known.names)
            self._follower.start_later(error)
        else:
            await self._register_zoo(zoo)
        self._spawn(self._tidy())

    async def stop(self) -> None:
        """Leave the cluster; nothing may be answered any more."""
        for task in self._background:
            task.cancel()
        self._leaving.set()
        if self._saving is not None:
            # However it ends, the cluster is left.
            await asyncio.wait([self._saving])
        await self._rollouts.stop()
        await self._follower.stop()

    async def verify(self) -> None:
        """Nothing: every file is hashed when it is fetched and when it is loaded."""

    async def reconcile(self) -> None:
        """Nothing: what is in the folder is only a cache."""

    async def _reconcile(self, name: str) -> None:
        pass

    async def apply(self, change: Change) -> ChangeResult:
        match change.operation:
            case "settle":
                # An entry changes in one turn, and files are not removed before.
                return ChangeResult()
            case "rehash" | "figures" | "card":
                # Not behind a roll-out of the same name.
                return await self._perform(change, None)
            case _:
                return await super().apply(change)

    async def _publish(self, change: Change, uploaded: CheckedAdapter) -> ChangeResult:
        name, file, spec = change.name, change.file, uploaded.spec
        assert file is not None
        published = RevisionRecord(file.revision, file.size, datetime.now(UTC), spec.to_json())

        def decide() -> Decision:
            current, record = self._current(name), self._cache.record(name)
            change.condition.check(name, current)
            if change.stage:
                return self._staged(change, published)
            self._refuse_another_meaning(name, spec, change.condition, force=change.force)
            entry = self._entries.get(name)
            if current == file.revision and entry is not None and entry.refusal is None:
                return Decision(record, ChangeResult(file.revision), changes=False)
            after = names.published(
                record, published, kept=self._settings.kept, spare=self._engine.in_use(name)
            )
            if current != file.revision:
                after = _noted(after, change, "publish", file.revision)
            result = ChangeResult(
                file.revision, created=record is None, changed=current != file.revision
            )
            return Decision(self._settled(name, after), result, prepare=file.revision)

        # Before the bytes travel.
        decide()
        path = received_path(self.root, file.name)
        await asyncio.to_thread(store_object, self._log.store, file.revision, path)
        await asyncio.to_thread(self._cache.adopt, name, file)
        operation = "stage" if change.stage else "publish"
        result = await self._rollouts.run(name, operation, decide, wait=change.wait)
        done = "staged" if change.stage else "published"
        logger.info("adapter %s name=%s revision=%s", done, name, file.revision)
        return result

    def _staged(self, change: Change, staged: RevisionRecord) -> Decision:
        name = change.name
        entry, record = self.entry(name), self._record(name)
        current, split = entry.require_current(), entry.split
        spare = self._engine.in_use(name)
        if split is not None:
            spare |= {split.key.revision}
        after = names.staged(record, staged, kept=self._settings.kept, spare=spare)
        is_new = staged.revision not in {item.revision for item in entry.revisions}
        if is_new:
            after = _noted(after, change, "stage", staged.revision)
        if split is None and is_new:
            traffic = Traffic(staged.revision, current, 0.0, staged=True, since=now())
            after = replace(after, traffic=_stored(traffic))
        result = ChangeResult(staged.revision)
        return Decision(after, result, prepare=staged.revision, changes=after != record)

    async def _divide(self, change: Change, wanted: Traffic) -> ChangeResult:
        name = change.name

        def decide() -> Decision:
            traffic = self._divided(change, wanted)
            after = replace(self._record(name), traffic=_stored(traffic))
            result = ChangeResult(traffic.revision)
            return Decision(after, result, prepare=traffic.revision)

        result = await self._rollouts.run(name, "divide", decide, wait=change.wait)
        logger.info("traffic divided name=%s revision=%s", name, result.revision)
        return result

    async def _end_traffic(self, change: Change, ending: Ending) -> ChangeResult:
        name = change.name

        def decide() -> Decision:
            record, ended = self._record(name), self._ended(change, ending)
            if ended is None:
                return Decision(record, ChangeResult(), changes=False)
            after = replace(record, traffic=_stored(ended))
            return Decision(after, ChangeResult(ended.revision))

        result = await self._rollouts.run(name, "end_traffic", decide, wait=change.wait)
        logger.warning("traffic ended name=%s: %s", name, ending.reason)
        return result

    async def _store_ending(self, name: str, traffic: Traffic) -> None:
        """Nothing: the record says so, or every replica sees it in the revisions."""

    async def _roll_back(self, change: Change) -> ChangeResult:
        name = change.name

        def decide() -> Decision:
            entry = self.entry(name)
            change.condition.check(name, entry.current)
            prefix = change.revision
            target = entry.previous() if prefix is None else entry.revision(prefix)
            entry.resolved(target)
            after = names.rolled_back(self._record(name), target)
            if target != entry.current:
                after = _noted(after, change, way_back(entry, target), target)
            after = self._settled(name, after)
            result = ChangeResult(target, changed=True)
            return Decision(after, result, prepare=target, changes=target != entry.current)

        result = await self._rollouts.run(name, "rollback", decide, wait=change.wait)
        logger.info("adapter rolled back name=%s revision=%s", name, result.revision)
        return result

    async def _delete(self, change: Change) -> ChangeResult:
        name = change.name

        def decide() -> Decision:
            change.condition.check(name, self.entry(name).current)
            return Decision(None, ChangeResult())

        result = await self._rollouts.run(name, "delete", decide, wait=change.wait)
        logger.info("adapter deleted name=%s", name)
        return result

    async def _delete_revision(self, change: Change) -> ChangeResult:
        name = change.name

        def decide() -> Decision:
            entry = self.entry(name)
            change.condition.check(name, entry.current)
            target = entry.revision(change.revision or "")
            if target == entry.current:
                raise CurrentRevision(name, target)
            if (split := entry.split) is not None and split.key.revision == target:
                raise RevisionTried(name, target)
            after = names.without(self._record(name), target)
            after = _noted(after, change, "delete_revision", target)
            return Decision(after, ChangeResult(target))

        result = await self._rollouts.run(name, "delete_revision", decide, wait=change.wait)
        logger.info("adapter revision deleted name=%s revision=%s", name, result.revision)
        return result

    async def _prepare(self, entry: Entry) -> None:
        """Fetch, check and load what a change will serve.

        Raises:
            StoreUnreachable: the file cannot be fetched now.
            Unavailable: this replica is ending.
            AdapterError, ServiceError: this replica cannot serve it.
        """
        if entry.record is None:
            return
        if not NAME.fullmatch(entry.name):
            raise InvalidName(f"adapter name {entry.name[:80]!r}")
        name, served = entry.name, self._entries.get(entry.name)
        for item in self._needed(entry):
            checked: CheckedAdapter | None = None
            if served is None or item.revision not in served.served:
                with ExitStack() as stack:
                    fetched = self._cache.fetched(name, item.revision, size=item.size)
                    path = await asyncio.to_thread(stack.enter_context, fetched)
                    checked = await self._engine.check(path)
            await self._engine.preload(AdapterKey(name, item.revision), checked)

    def _needed(self, entry: Entry) -> list[RevisionRecord]:
        """The revisions that a change is about: the current one, one that is tried, new ones."""
        if entry.record is None:
            return []
        before = self._cache.record(entry.name)
        known = {item.revision for item in before.revisions} if before is not None else set()
        wanted = {entry.record.current}
        if (traffic := _traffic_in(entry.record)) is not None and traffic.in_force:
            wanted.add(traffic.revision)
        return [
            item
            for item in entry.record.revisions
            if item.revision in wanted or item.revision not in known
        ]

    def _discard(self, entry: Entry) -> None:
        """Give back what an aborted change has loaded."""
        self._retire(entry.name, frozenset(item.revision for item in self._needed(entry)))

    def _committed(self, entry: Entry) -> None:
        """Serve an entry's record, in this turn of the event loop."""
        name, record = entry.name, entry.record
        needed = self._needed(entry)
        self._cache.apply(name, record)
        if record is None:
            if name in self._entries:
                self._forget(name)
        else:
            fresh = entry.operation in ("publish", "rollback")
            self._set(self._entry_from(name, record, self._entries.get(name), fresh=fresh))
            if entry.change not in self._preparations:
                for item in needed:
                    self._spawn(self._preload_answering(AdapterKey(name, item.revision)))
        self._save_known()

    async def _restored(self, records: Mapping[str, NameRecord]) -> None:
        """Serve these records and nothing else."""
        before = dict(self._entries)
        entries = await asyncio.to_thread(
            lambda: [
                self._entry_from(name, record, before.get(name), fresh=False)
                for name, record in records.items()
                if self._cache.record(name) != record
            ]
        )
        for name in [name for name in self._entries if name not in records]:
            self._forget(name)
        self._cache.follow(records)
        for entry in entries:
            self._set(entry)
        self._save_known()

    def _entry_from(
        self, name: str, record: NameRecord, before: CatalogEntry | None, *, fresh: bool
    ) -> CatalogEntry:
        """What a record says, as far as it fits this backbone.

        Args:
            before: which specs are known already, and what is unloaded here.
            fresh: the current revision was published just now, and an unloaded name is served.
        """
        known = before.specs if before is not None else {}
        found = before.unusable if before is not None else {}
        specs: dict[str, AdapterSpec] = {}
        unusable: dict[str, AdapterError] = {}
        for item in record.revisions:
            revision = item.revision
            if isinstance(error := found.get(revision), UnloadedAdapter) and not fresh:
                unusable[revision] = error
            try:
                specs[revision] = known.get(revision) or AdapterSpec.from_json(item.spec)
                check_fits(specs[revision], self._engine.info)
            except IncompatibleAdapter as misfit:
                unusable[revision] = misfit
            except AdapterError as fault:
                unusable[revision] = DamagedFile(f"adapter {name!r}, {revision}: {fault}")
        revisions = tuple(
            Revision(item.revision, item.stored, item.size) for item in record.revisions
        )
        current = record.current
        return CatalogEntry(
            name,
            current,
            revisions,
            specs,
            unusable,
            unusable.get(current),
            _traffic_in(record),
            record.events,
        )

    def _settled(self, name: str, record: NameRecord) -> NameRecord:
        """The record with its division ended, if its revisions have ended it."""
        if record.traffic is None:
            return record
        # Without what is so on this replica alone, as that the name is unloaded.
        traffic = self._entry_from(name, record, None, fresh=True).settled().traffic
        return replace(record, traffic=None if traffic is None else _stored(traffic))

    def _entry_of(self, name: str, known: Mapping[str, AdapterSpec]) -> CatalogEntry:
        del known
        return self._entry_from(name, self._record(name), None, fresh=True)

    def _record(self, name: str) -> NameRecord:
        record = self._cache.record(name)
        if record is None:
            raise UnknownAdapter(name, sorted(self._entries))
        return record

    def _verified(self, name: str, revision: str) -> None:
        self._cache.fetch(name, revision)

    def _raise_trouble(self, error: AdapterError) -> None:
        """Raise it, and remember nothing: any replica may get the file again, which repairs the
        object for all. Whoever needs it finds out."""
        raise error

    def _open_log(self) -> None:
        """
        Raises:
            OtherBackbone, NewerStore: the store is not for this replica.
            StoreError: it is another one than at the last start of this replica.
        """
        url, remembered = self._log.store.url, self.root / _CLUSTER_FILE
        cluster = self._log.open(self._engine.info.identity).cluster
        try:
            known: dict[str, str] = json.loads(remembered.read_bytes())
        except (OSError, ValueError):
            known = {}
        if known.get(url, cluster) != cluster:
            raise StoreError(
                f"the adapter store {url} is another one than at the last start: it was emptied, "
                f"or its file system is not mounted. To use it all the same, empty {self.root}"
            )
        with store_failures(self.root, "cache"):
            write_atomically(remembered, json.dumps(known | {url: cluster}).encode())

    async def _tidy(self) -> None:
        """Write snapshots of the log, and remove what nobody needs, now and then."""
        collected = monotonic()
        while True:
            # All replicas do this; not all at the same moment.
            await asyncio.sleep(_TIDY_SECONDS * random.uniform(0.5, 1.5))
            try:
                await asyncio.to_thread(self._log.write_snapshot)
                if monotonic() - collected > _COLLECT_SECONDS:
                    collected = monotonic()
                    removed = await asyncio.to_thread(collect, self._log)
                    if removed != Collected():
                        logger.info("the shared store was tidied: %s", removed)
            except StoreError as error:
                logger.warning("the shared store cannot be tidied now: %s", error)
            except Exception:
                # It is tried again all the same.
                logger.exception("the shared store cannot be tidied now")

    async def _register_zoo(self, zoo: Path | None) -> None:
        paths = await asyncio.to_thread(files_of, zoo)
        if not paths:
            return
        registered = await asyncio.to_thread(self._log.store.list, _ZOO)
        for path in paths:
            key = f"{_ZOO}{path.stem}"
            if path.stem in self._entries or key in registered:
                continue
            await self._add_from_zoo(path)
            if path.stem in self._entries:
                with suppress(StoreFailed):
                    await asyncio.to_thread(self._log.store.create, key, b"")

    async def _add_from_zoo(self, path: Path) -> None:
        try:
            data = await asyncio.to_thread(path.read_bytes)
            new = Condition(none_match=frozenset({"*"}))
            await self.publish(path.stem, data, new, wait="none")
            await self._add_card(path)
        except RevisionConflict:
            # Another replica was first.
            pass
        except (AdapterError, OSError) as error:
            logger.warning("zoo adapter skipped file=%s: %s", path.name, error)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    # What a replica that serves without a lease starts from when it cannot reach the store.

    @property
    def _known_file(self) -> Path:
        store = sha256(self._log.store.url.encode()).hexdigest()[:16]
        return self.root / f".known-{store}.json"

    def _save_known(self) -> None:
        self._is_unsaved = self._settings.stale
        if self._is_unsaved and (self._saving is None or self._saving.done()):
            self._saving = asyncio.create_task(self._save_soon())

    async def _save_soon(self) -> None:
        """Once for all changes that come close together, until the newest is in the file."""
        has_failed = False
        while self._is_unsaved:
            with suppress(TimeoutError):
                async with asyncio.timeout(_SAVED_SECONDS):
                    await self._leaving.wait()
            try:
                await self._save()
            except OSError as error:
                if not has_failed:
                    logger.warning("%s cannot be written: %s", self._known_file, error)
                has_failed, self._is_unsaved = True, not self._leaving.is_set()

    async def _save(self) -> None:
        self._is_unsaved = False
        records = {name: self._cache.record(name) for name in self._cache.names()}
        known = {name: record for name, record in records.items() if record is not None}
        state = LogState(self._follower.number, known)
        await asyncio.to_thread(lambda: write_atomically(self._known_file, encode(state)))

    def _read_known(self) -> LogState | None:
        try:
            return decode(LogState, self._known_file.name, self._known_file.read_bytes())
        except (OSError, AdapterError):
            return None


def replica_name(setting: str) -> str:
    """A replica's name: the setting, or that of this machine as far as it can be part of one."""
    host = re.sub(r"[^A-Za-z0-9._-]", "-", socket.gethostname()).lstrip("-._")
    return setting or host[:63] or "replica"


def _noted(record: NameRecord, change: Change, what: Happening, revision: str) -> NameRecord:
    """The record with who did this to a revision."""
    event = Event(now(), what, revision, change.client)
    stored = {item.revision for item in record.revisions}
    return replace(record, events=with_event(record.events, event, stored))


def _stored(traffic: Traffic) -> dict[str, Any]:
    """A division as a record has it."""
    stored: dict[str, Any] = json.loads(traffic.to_json())
    return stored


def _traffic_in(record: NameRecord) -> Traffic | None:
    """The division that a record has; one that cannot be read has ended."""
    if record.traffic is None:
        return None
    try:
        return Traffic.from_json(json.dumps(record.traffic))
    except InvalidTraffic as error:
        return Traffic("", "", 0.0).end("damaged", f"its record cannot be read: {error}")


async def _at_once() -> None:
    pass
