"""What adapter names mean at this moment: a map from names to entries, and how it is read.

`Catalog` keeps the map beside the store; each HTTP worker holds a `RemoteCatalog`, a copy of it.
"""

import asyncio
from abc import ABC, abstractmethod
from dataclasses import replace
from pathlib import Path

from adapters.errors import InvalidName, NoCard, NoTraffic, UnforcedReplacement, UnknownAdapter
from adapters.format.spec import AdapterSpec
from adapters.format.store import NAME, file_of
from adapters.format.uploads import ReceivedFile, received
from service.catalog.entry import (
    ITSELF,
    CatalogEntry,
    Change,
    ChangeResult,
    Condition,
    Inspection,
    Origin,
    Resolved,
    Wait,
)
from service.catalog.meaning import changed_meaning
from service.catalog.traffic import Ending, Figures, Traffic, now


class CatalogView(ABC):
    """Names and their entries. Reading neither waits nor touches a file; a change returns when it
    holds everywhere.

    Args:
        root: the adapter store's folder, for downloads.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._entries: dict[str, CatalogEntry] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def resolve(self, reference: str) -> Resolved:
        """What `name` or `name@prefix` means at this moment; only a name alone can be split.

        Raises:
            UnknownAdapter, UnknownRevision: naming what exists.
            IncompatibleAdapter, DamagedFile: it is stored, but cannot be served here.
            UnloadedAdapter: it was unloaded.
        """
        name, at, prefix = reference.partition("@")
        entry = self.entry(name)
        if at:
            return entry.resolved(entry.revision(prefix))
        resolved = entry.resolved(entry.require_current())
        return resolved if entry.traffic is None else resolved._replace(split=entry.split)

    def entry(self, name: str) -> CatalogEntry:
        """
        Raises:
            UnknownAdapter: naming what exists.
        """
        entry = self._entries.get(name)
        if entry is None:
            raise UnknownAdapter(name, sorted(self._entries))
        return entry

    def entries(self) -> list[CatalogEntry]:
        """All entries, sorted by name."""
        return [self._entries[name] for name in sorted(self._entries)]

    def find(self, name: str) -> CatalogEntry | None:
        """As `entry`; None: there is none."""
        try:
            return self.entry(name)
        except UnknownAdapter:
            return None

    def path(self, name: str, prefix: str | None = None) -> tuple[str, Path]:
        """A revision and the path of its file.

        Raises:
            UnknownAdapter, UnknownRevision: naming what exists.
            DamagedFile: there is no current revision.
        """
        entry = self.entry(name)
        revision = entry.require_current() if prefix is None else entry.revision(prefix)
        return revision, file_of(self.root, name, revision)

    def check(self, name: str, condition: Condition, *, stage: bool = False) -> None:
        """Refuse an upload as far as possible before its bytes have arrived.

        Raises:
            InvalidName: no adapter can have this name.
            RevisionConflict: the condition does not hold at this moment.
        """
        if not NAME.fullmatch(name):
            expected = "1 to 64 of a-z 0-9 . _ -, a letter or digit first"
            raise InvalidName(f"adapter name {name[:80]!r}: expected {expected}")
        condition.check(name, self._current(name))
        if not stage:
            return
        try:
            self.entry(name).require_current()
        except UnknownAdapter as error:
            error.args = (
                f"{error}; a name's first revision cannot be staged: publish it without `stage`",
            )
            raise

    async def publish(
        self,
        name: str,
        content: bytes | ReceivedFile,
        condition: Condition,
        *,
        force: bool = False,
        stage: bool = False,
        wait: Wait = "all",
        by: Origin = ITSELF,
    ) -> ChangeResult:
        """Check an adapter file, store it and serve it. A failure changes nothing.

        Args:
            content: the file's bytes, or the file as it was received beside the store.
            force: replace an adapter also by one that means something else.
            stage: the current revision stays; the new one can be pinned, and tried by `divide`.
            wait: for which replicas, here and in the other changes.

        Raises:
            InvalidName, RevisionConflict: before anything else is done.
            UnknownAdapter, DamagedFile: it is staged, and there is no current revision.
            InvalidAdapter, IncompatibleAdapter: with every fault.
            UnforcedReplacement: it means something else, and the caller did not say that it knows:
                neither by `force` nor by naming the current revision in the condition.
            StoreFailed: it cannot be stored.
            RolloutRefused, RolloutTimeout: another replica does not take it.
        """
        self.check(name, condition, stage=stage)
        if isinstance(content, bytes):
            with await asyncio.to_thread(received, self.root, content) as upload:
                return await self.publish(
                    name, upload.file, condition, force=force, stage=stage, wait=wait, by=by
                )
        change = Change(
            "publish",
            name,
            condition,
            file=content,
            force=force,
            stage=stage,
            wait=wait,
            **by._asdict(),
        )
        return await self.apply(change)

    async def inspect(
        self,
        name: str,
        file: ReceivedFile,
        condition: Condition,
        *,
        force: bool = False,
        stage: bool = False,
    ) -> Inspection:
        """What `publish` would say of a file at this moment; nothing is stored, and the file goes.

        What it would say of the file is the inspection's refusal; all else is raised. It does not
        ask other replicas.

        Raises:
            InvalidName, RevisionConflict, UnknownAdapter, DamagedFile: as `publish`.
            StoreFailed: the file cannot be read.
        """
        self.check(name, condition, stage=stage)
        inspection = await self.inspected(file)
        # As of now: it may have been replaced meanwhile.
        self.check(name, condition, stage=stage)
        spec = inspection.spec
        if inspection.refusal is not None or spec is None:
            return inspection
        if stage:
            return inspection
        try:
            self._refuse_another_meaning(name, spec, condition, force=force)
        except UnforcedReplacement as refusal:
            return replace(inspection, refusal=refusal)
        return inspection

    async def rollback(
        self,
        name: str,
        prefix: str | None,
        condition: Condition,
        *,
        wait: Wait = "all",
        by: Origin = ITSELF,
    ) -> str:
        """Serve an earlier revision again and return it; None is the one that was served before.

        Raises:
            UnknownAdapter, UnknownRevision: it does not exist.
            RevisionConflict: the condition does not hold.
            IncompatibleAdapter, DamagedFile: it cannot be served; the current one stays.
            UnloadedAdapter: the name was unloaded.
            StoreFailed: the disk fails; the current one stays.
            RolloutRefused, RolloutTimeout: another replica does not take it.
        """
        change = Change("rollback", name, condition, prefix, wait=wait, **by._asdict())
        return (await self.apply(change)).revision

    async def delete(
        self, name: str, condition: Condition, *, wait: Wait = "all", by: Origin = ITSELF
    ) -> None:
        """Forget a name and all its revisions.

        Raises:
            UnknownAdapter: it does not exist.
            RevisionConflict: the condition does not hold.
            StoreFailed: the disk fails; it stays.
        """
        await self.apply(Change("delete", name, condition, wait=wait, **by._asdict()))

    async def delete_revision(
        self,
        name: str,
        prefix: str,
        condition: Condition,
        *,
        wait: Wait = "all",
        by: Origin = ITSELF,
    ) -> str:
        """Forget one revision, and return it. Requests that hold it are answered.

        Raises:
            UnknownAdapter, UnknownRevision: it does not exist.
            CurrentRevision: it is the current one.
            RevisionTried: it reads some of the texts.
            RevisionConflict: the condition does not hold.
            StoreFailed: the disk fails; it stays.
        """
        change = Change("delete_revision", name, condition, prefix, wait=wait, **by._asdict())
        return (await self.apply(change)).revision

    async def divide(
        self,
        name: str,
        traffic: Traffic,
        condition: Condition,
        *,
        wait: Wait = "all",
        by: Origin = ITSELF,
    ) -> None:
        """Let a second revision read some of a name's texts, or change how many.

        Args:
            traffic: its revision may be a prefix; its baseline and time are filled in.

        Raises:
            UnknownAdapter, UnknownRevision: it does not exist.
            RevisionConflict: the condition does not hold.
            RevisionServed: it is the current one.
            UnlikeRevision: it would answer texts, and has other labels or another task.
            IncompatibleAdapter, DamagedFile: one of the two cannot be served.
            UnloadedAdapter: the name was unloaded.
            StoreFailed: the disk fails; nothing changes.
        """
        await self.apply(
            Change("divide", name, condition, traffic=traffic, wait=wait, **by._asdict())
        )

    async def end_traffic(
        self, name: str, condition: Condition, *, wait: Wait = "all", by: Origin = ITSELF
    ) -> None:
        """Let the current revision read all texts again. Harmless if that is so already.

        Raises:
            UnknownAdapter: it does not exist.
            NoTraffic: its texts were never divided.
            RevisionConflict: the condition does not hold.
            StoreFailed: the disk fails; nothing changes.
        """
        ending = Ending("stopped", f"stopped by {by.client or 'a request'}", now())
        change = Change("end_traffic", name, condition, ending=ending, wait=wait, **by._asdict())
        await self.apply(change)

    async def promote(
        self, name: str, condition: Condition, *, wait: Wait = "all", by: Origin = ITSELF
    ) -> str:
        """Make the second revision the current one, and return it; raises as `rollback`.

        Raises:
            NoTraffic: there is none.
        """
        traffic = self.entry(name).traffic
        if traffic is None or not traffic.in_force:
            raise NoTraffic(name)
        if condition == Condition():
            condition = Condition(match=frozenset({traffic.baseline}))
        return await self.rollback(name, traffic.revision, condition, wait=wait, by=by)

    async def figures(self, name: str) -> Figures | None:
        """What the engine has seen of a name's division, if it has had one.

        Raises:
            UnknownAdapter: it does not exist.
        """
        return (await self.apply(Change("figures", name))).figures

    async def card(self, name: str, prefix: str | None = None) -> tuple[str, str]:
        """A revision, by default the current one, and its model card, which is Markdown.

        Raises:
            UnknownAdapter, UnknownRevision: it does not exist.
            NoCard: it has none.
            StoreFailed: it cannot be read.
        """
        done = await self.apply(Change("card", name, revision=prefix))
        if done.card is None:
            raise NoCard(name, done.revision)
        return done.revision, done.card

    async def describe(
        self,
        name: str,
        prefix: str | None,
        card: str,
        condition: Condition,
        *,
        by: Origin = ITSELF,
    ) -> str:
        """Keep a model card with a revision, by default the current one, and return the revision.

        Raises:
            UnknownAdapter, UnknownRevision: it does not exist.
            RevisionConflict: the condition does not hold.
            StoreFailed: it cannot be stored.
        """
        change = Change("describe", name, condition, prefix, card=card, **by._asdict())
        return (await self.apply(change)).revision

    async def unload(self, name: str, *, by: Origin = ITSELF) -> None:
        """Stop serving a name until it is reloaded, published again, or the service restarts.
        Requests in flight are answered; the store keeps everything.

        Raises:
            UnknownAdapter: it does not exist.
        """
        await self.apply(Change("unload", name, **by._asdict()))

    async def reload(self, name: str, *, by: Origin = ITSELF) -> str:
        """Read and check again what the store holds of a name, serve it, and return its current
        revision.

        Raises:
            UnknownAdapter: it does not exist.
            IncompatibleAdapter, DamagedFile: it cannot be served.
        """
        return (await self.apply(Change("reload", name, **by._asdict()))).revision

    async def rehash(self, name: str, revision: str) -> None:
        """Hash a stored revision again. If its bytes have changed, it is no longer served.

        Raises:
            UnknownAdapter, UnknownRevision: it does not exist.
            DamagedFile: its bytes have changed. StoreFailed: they cannot be read now.
        """
        await self.apply(Change("rehash", name, revision=revision))

    async def settled(self, name: str) -> None:
        """Return when no change of this name is in progress."""
        await self.apply(Change("settle", name))

    @abstractmethod
    async def apply(self, change: Change) -> ChangeResult:
        """Make a change; errors are those of the method for its operation."""

    @abstractmethod
    async def inspected(self, file: ReceivedFile) -> Inspection:
        """Validate a file and run one text through it on the device; then it is removed."""

    def _refuse_another_meaning(
        self, name: str, spec: AdapterSpec, condition: Condition, *, force: bool
    ) -> None:
        """
        Raises:
            UnforcedReplacement: the spec means something else than the current one, and the caller
                has not said that it knows.
        """
        entry = self._entries.get(name)
        if entry is None or force or entry.current in (condition.match or ()):
            return
        before = entry.spec
        if before is not None and (changes := changed_meaning(before, spec)):
            raise UnforcedReplacement(name, changes)

    def _current(self, name: str) -> str | None:
        entry = self._entries.get(name)
        return None if entry is None else entry.current
