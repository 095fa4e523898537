"""Several writers on one log against a model of it: calls that fail before or after they were done,
requests that arrive late, snapshots, collection, and replicas that sleep through all of it."""

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Literal, TypeAlias

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from adapters.errors import CollectedEntries, StoreDenied, StoreUnreachable, UnknownOutcome
from adapters.shared.collect import collect
from adapters.shared.log import SharedLog, entry_key
from adapters.shared.objects import ObjectStore, object_key, store_object
from adapters.shared.records import (
    COLLECTED,
    Entry,
    Kind,
    LogState,
    ReplicaState,
    apply,
)
from tests.support.log_entries import entry, record, revision_of

WRITERS = 3
GRACE = 1000.0
CONTENTS = (b"", b"1", b"two", b"three" * 99)

# What becomes of one call that creates an object. before: it fails, and nothing was done. after: it
# was done, then it fails. late: it fails, and is done some time later. again: it was done, the
# answer was lost, and the library tried once more. rival: another writer is a moment faster.
Fate: TypeAlias = Literal["before", "after", "late", "again", "rival", "denied", "down"]

fates = st.lists(st.sampled_from(("before", "after", "late", "again", "rival")), max_size=3)
names = st.sampled_from(("a", "b"))
writers = st.integers(0, WRITERS - 1)


class FlakyStore(ObjectStore):
    """Fails as it is told to.

    fates: of the next calls to `create`. late: what will arrive. rival: what another one does.
    """

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.fates: list[Fate] = []
        self.late: list[tuple[str, bytes]] = []
        self.rival: Callable[[], object] = lambda: None

    def create(self, key: str, content: bytes | Path) -> bool:
        assert isinstance(content, bytes)
        match self.fates.pop(0) if self.fates else None:
            case "before":
                raise StoreUnreachable("broken before")
            case "after":
                super().create(key, content)
                raise StoreUnreachable("broken after")
            case "late":
                self.late.append((key, content))
                raise StoreUnreachable("on its way")
            case "again":
                super().create(key, content)
            case "rival":
                self.rival()
            case "denied":
                raise StoreDenied("denied")
            case "down":
                self.fates.append("down")
                raise StoreUnreachable("down")
        return super().create(key, content)

    def arrive(self) -> None:
        for key, content in self.late:
            super().create(key, content)
        self.late.clear()


class LogMachine(RuleBasedStateMachine):
    """entries: the log as it is. unknown: entries whose writer was told so. known: how far each
    writer has read. uploads: revisions that no entry refers to yet."""

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp())
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr("adapters.shared.log.time.sleep", lambda _: None)
        self.truth = SharedLog(ObjectStore(str(self.root / "shared")))
        self.stores = [FlakyStore(str(self.root / "shared")) for _ in range(WRITERS)]
        self.logs = [SharedLog(store) for store in self.stores]
        self.known = [0] * WRITERS
        self.entries: list[Entry] = []
        self.unknown: list[Entry] = []
        self.collected = 0
        self.uploads: set[bytes] = set()
        self.beat = 0

    def teardown(self) -> None:
        self.patch.undo()
        shutil.rmtree(self.root)

    def put_object(self, content: bytes) -> None:
        store_object(
            self.truth.store,
            revision_of(content),
            content,
            grace_seconds=GRACE,
            window_seconds=0,
        )

    def state(self, number: int) -> LogState:
        """The state after the model's first entries."""
        state = LogState()
        for each in self.entries[:number]:
            apply(state, each)
        return state

    def learn(self) -> None:
        """Take into the model what reached the log without an answer: it must have been asked for,
        and it must come at the end."""
        while True:
            content = self.truth.store.get(entry_key(len(self.entries) + 1))
            if content is None:
                return
            (first, *_) = self.truth.read(len(self.entries))
            assert first in self.unknown, "nobody wrote this"
            self.unknown.remove(first)
            self.entries.append(first)

    def write(self, writer: int, new: Entry, planned: list[Fate]) -> None:
        """Append, and hold the answer to what is in the log."""
        store, log = self.stores[writer], self.logs[writer]
        rival = (writer + 1) % WRITERS

        def overtake() -> None:
            self.put_object(b"1")
            other = entry(len(self.entries) + 1, "rival", record(b"1"), by=f"w{rival}")
            if self.logs[rival].append(other):
                self.entries.append(other)

        self.unknown.append(new)
        store.fates, store.rival = list(planned), overtake
        # Else it would try until the store is there again.
        log.patience = 0.0 if "down" in planned else store.timeout
        try:
            appended = log.append(new)
        except StoreDenied:
            self.unknown.remove(new)
            self.learn()
            assert new not in self.entries
            return
        except UnknownOutcome:
            assert "down" in planned or new.number <= self.collected
            self.learn()
            return
        finally:
            store.fates = []
        self.learn()
        if appended:
            assert self.entries[new.number - 1] == new, "acknowledged and not there"
        else:
            self.unknown.remove(new)
            assert new not in self.entries, "refused and there all the same"
            assert len(self.entries) >= new.number, "refused although nobody was first"

    @rule(
        writer=writers,
        name=names,
        contents=st.lists(st.sampled_from(CONTENTS), max_size=2, unique=True),
        kind=st.sampled_from(("prepare", "commit", "commit", "abort")),
        change=st.sampled_from((None, "x", "y")),
        planned=st.one_of(
            fates,
            st.just(["denied"]),
            st.just(["down"]),
            st.just(["after", "down"]),
            st.just(["late", "down"]),
        ),
        up_to_date=st.booleans(),
    )
    def append(
        self,
        writer: int,
        name: str,
        contents: list[bytes],
        kind: Kind,
        change: str | None,
        planned: list[Fate],
        up_to_date: bool,
    ) -> None:
        if up_to_date:
            self.follow(writer)
        for content in contents:
            self.put_object(content)
        state = record(*contents) if contents else None
        number = self.known[writer] + 1
        self.write(
            writer, entry(number, name, state, kind=kind, change=change, by=f"w{writer}"), planned
        )

    @rule(writer=writers)
    def follow(self, writer: int) -> None:
        """Read on, or load where the next entries were collected."""
        known = self.known[writer]
        try:
            read = self.logs[writer].read(known)
        except CollectedEntries:
            assert known < self.collected
            number, loaded = self.logs[writer].load()
            assert number == len(self.entries)
            assert loaded == self.state(number).names
        else:
            assert known >= self.collected
            assert read == self.entries[known:]
        self.known[writer] = len(self.entries)

    @rule(writer=writers)
    def restart(self, writer: int) -> None:
        self.logs[writer] = SharedLog(self.stores[writer])
        number, loaded = self.logs[writer].load()
        assert number == len(self.entries)
        assert loaded == self.state(number).names
        self.known[writer] = number

    @rule(writer=writers, every=st.integers(1, 5))
    def snapshot(self, writer: int, every: int) -> None:
        number = self.logs[writer].write_snapshot(every=every)
        assert number is None or number <= self.known[writer]

    @rule()
    def late_requests_arrive(self) -> None:
        for store in self.stores:
            store.arrive()
        self.learn()

    @rule(content=st.sampled_from(CONTENTS))
    def upload(self, content: bytes) -> None:
        self.put_object(content)
        self.uploads.add(content)

    @rule()
    def time_passes(self) -> None:
        """More than the grace; no upload and no request takes as long."""
        self.late_requests_arrive()
        self.uploads.clear()
        for path in (self.root / "shared").glob("*/*.*"):
            status = path.stat()
            os.utime(path, (status.st_atime, status.st_mtime - 2 * GRACE))
        self.beat += 1
        self.truth.write_state(ReplicaState("one", self.beat, 0))

    @rule(writer=writers)
    def collect(self, writer: int) -> None:
        collect(self.logs[writer], grace_seconds=GRACE)
        marked = [
            number
            for number in range(1, len(self.entries) + 1)
            if self.truth.store.get(entry_key(number)) == COLLECTED
        ]
        assert marked == list(range(1, len(marked) + 1)), "collected out of order"
        assert len(marked) >= self.collected
        self.collected = len(marked)

    @invariant()
    def a_new_replica_sees_the_model(self) -> None:
        number, loaded = SharedLog(self.truth.store).load()
        assert number == len(self.entries)
        assert loaded == self.state(number).names

    @invariant()
    def every_revision_that_is_needed_has_its_object(self) -> None:
        records = [record for _, record in self.state(len(self.entries)).records() if record]
        needed = {item.revision for record in records for item in record.revisions}
        needed |= set(map(revision_of, self.uploads))
        for revision in needed:
            content = self.truth.store.get(object_key(revision))
            assert content is not None
            assert revision_of(content) == revision


TestLog = pytest.mark.slow(LogMachine.TestCase)
TestLog.settings = settings(max_examples=12, stateful_step_count=30, deadline=None)
