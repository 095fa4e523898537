"""Collection removes what is old and needed by nobody, whoever is slow meanwhile."""

import itertools
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from adapters import faults
from adapters.errors import CollectedEntries, UnknownOutcome
from adapters.shared import collect as collecting
from adapters.shared.collect import Collected, collect
from adapters.shared.listed import Listed
from adapters.shared.log import SharedLog, entry_key, snapshot_key
from adapters.shared.objects import ObjectStore, card_key, object_key, store_object
from adapters.shared.records import COLLECTED, NameRecord, ReplicaState
from tests.support.log_entries import entry, record, revision_of

GRACE = 100.0


class Folder:
    """A store in a folder whose files can be made older."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.store = ObjectStore(str(root))
        self.log = SharedLog(self.store)

    def publish(self, name: str, *contents: bytes) -> None:
        for content in contents:
            store_object(self.store, revision_of(content), content)
        self.append(name, record(*contents))

    def append(self, name: str, state: NameRecord | None) -> None:
        number, _ = self.log.load()
        assert self.log.append(entry(number + 1, name, state))

    def snapshot(self) -> None:
        self.log.load()
        assert self.log.write_snapshot(every=1) is not None

    def age(self, seconds: float = 2 * GRACE) -> None:
        """Time passes; then a replica writes its state."""
        for path in self.root.rglob("*.*"):
            status = path.stat()
            os.utime(path, (status.st_atime, status.st_mtime - seconds))
        self.log.write_state(ReplicaState("one", 1, 1))

    def collect(self) -> Collected:
        return collect(self.log, grace_seconds=GRACE)

    def objects(self) -> set[str]:
        return {path.name.removesuffix(".safetensors") for path in self.root.glob("objects/*")}


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path / "shared")


def test_nothing_young_is_collected(folder: Folder) -> None:
    folder.publish("a", b"1")
    folder.publish("a", b"2")
    folder.snapshot()
    folder.log.write_state(ReplicaState("one", 1, 1))
    assert folder.collect() == Collected()
    assert folder.objects() == {revision_of(b"1"), revision_of(b"2")}


def test_old_entries_snapshots_and_objects_are_collected(folder: Folder) -> None:
    folder.publish("a", b"1")
    folder.publish("b", b"x")
    folder.snapshot()
    folder.publish("a", b"2")
    folder.append("b", None)
    folder.snapshot()
    folder.age()
    folder.publish("a", b"3")
    folder.snapshot()
    before = folder.log.load()
    assert folder.collect() == Collected(entries=4, snapshots=1, objects=2)
    # The snapshot at the base refers to 2, an entry since refers to 3.
    assert folder.objects() == {revision_of(b"2"), revision_of(b"3")}
    assert SharedLog(folder.store).load() == before
    assert [each.number for each in folder.log.read(4)] == [5]
    assert folder.collect() == Collected()


def test_a_card_is_collected_with_its_name_also_if_another_one_has_the_file(
    folder: Folder,
) -> None:
    for name in ("a", "b"):
        folder.publish(name, b"1")
        (item,) = record(b"1").revisions
        folder.store.put(card_key(name, item.revision, item.stored), b"card")
    folder.append("b", None)
    folder.snapshot()
    folder.age()
    assert folder.collect().objects == 1
    assert [path.name.split(".")[1] for path in folder.root.glob("cards/*")] == ["a"]
    assert folder.objects() == {revision_of(b"1")}


def test_what_a_prepared_change_needs_is_kept(folder: Folder) -> None:
    folder.publish("a", b"1")
    store_object(folder.store, revision_of(b"2"), b"2")
    assert folder.log.append(entry(2, "a", record(b"2"), kind="prepare", change="x"))
    folder.snapshot()
    folder.age()
    folder.collect()
    assert revision_of(b"2") in folder.objects()
    assert folder.log.append(entry(3, "a", record(b"2"), kind="abort", change="x"))
    folder.snapshot()
    folder.age()
    folder.collect()
    assert folder.objects() == {revision_of(b"1")}


def test_what_was_dropped_just_now_is_kept_for_a_slow_reader(folder: Folder) -> None:
    folder.publish("a", b"1")
    folder.snapshot()
    folder.age()
    folder.append("a", None)
    folder.snapshot()
    assert folder.collect().objects == 0
    assert folder.objects() == {revision_of(b"1")}


def test_an_upload_that_is_still_running_is_kept(folder: Folder) -> None:
    folder.publish("a", b"1")
    folder.snapshot()
    folder.age()
    store_object(folder.store, revision_of(b"new"), b"new")
    folder.collect()
    assert revision_of(b"new") in folder.objects()


def test_a_file_that_comes_again_just_before_its_object_is_collected_is_there(
    folder: Folder,
) -> None:
    folder.publish("a", b"1")
    folder.append("a", None)
    folder.snapshot()
    folder.age()
    revision = revision_of(b"1")
    uploaded = False

    def upload(name: str) -> bool:
        nonlocal uploaded
        # The collector has found it old and unreferenced, and is about to delete it.
        if name == "shared.delete" and not uploaded:
            uploaded = True
            began.append(time.monotonic())
            thread.start()
            while folder.store.stat(object_key(revision)).modified < young:  # type: ignore[union-attr]  # it is there
                time.sleep(0.01)
        return False

    young = time.time() - 10
    began: list[float] = []
    thread = threading.Thread(
        target=lambda: store_object(
            folder.store, revision, b"1", grace_seconds=GRACE, window_seconds=0.5
        )
    )
    faults.install(upload)
    try:
        assert folder.collect().objects == 1
        thread.join()
    finally:
        faults.install(None)
    assert folder.store.get(object_key(revision)) == b"1"


def test_a_quiet_cluster_is_collected_too(folder: Folder) -> None:
    folder.publish("a", b"1")
    folder.append("a", None)
    folder.log.load()
    assert folder.collect() == Collected()
    folder.age()
    assert folder.collect() == Collected(entries=2, objects=1)
    assert folder.objects() == set()
    assert len(folder.store.list("snapshots/")) == 1


def test_a_listing_that_takes_long_keeps_nothing_from_being_collected(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    for content in (b"1", b"2"):
        folder.publish("a", content)
    folder.append("a", None)
    folder.snapshot()
    folder.age()
    seconds = itertools.count()
    listing = folder.store.listing

    def slow(prefix: str) -> list[Listed]:
        # One of these objects comes again before the listing has ended.
        found = listing(prefix)
        if prefix == "objects/":
            monkeypatch.setattr(collecting, "monotonic", lambda: 1000.0 + next(seconds))
            store_object(folder.store, revision_of(b"2"), b"2", window_seconds=0)
        return found

    monkeypatch.setattr(collecting, "monotonic", lambda: 0.0)
    monkeypatch.setattr(folder.store, "listing", slow)
    assert folder.collect().objects == 1
    assert folder.objects() == {revision_of(b"2")}


def test_what_killed_writers_left_goes_and_what_living_ones_write_stays(folder: Folder) -> None:
    folder.publish("a", b"1")
    left = [
        folder.root / ".unfinished" / "0123",
        folder.root / "replicas" / ".one.json.0123456789abcdef.tmp",
        folder.root / "probes" / "0123",
    ]
    # What is none of the store's neither goes nor keeps anything.
    strange = folder.root / ".unfinished" / "0"
    others = folder.root / "home" / ".mine.tmp"
    folder.log.write_state(ReplicaState("one", 1, 1))
    (folder.root / "probes").mkdir()
    strange.mkdir()
    others.parent.mkdir()
    for path in (*left, others):
        path.write_bytes(b"half")
    folder.snapshot()
    folder.collect()
    assert all(path.exists() for path in left)
    for path in (*left, strange, others, *folder.root.glob("snapshots/*")):
        os.utime(path, (0, 0))
    folder.collect()
    assert not any(path.exists() for path in left)
    assert others.read_bytes() == b"half"
    assert folder.objects() == {revision_of(b"1")}


def test_a_file_that_comes_again_soon_is_not_waited_for(folder: Folder) -> None:
    store_object(folder.store, revision_of(b"1"), b"1")
    began = time.monotonic()
    store_object(folder.store, revision_of(b"1"), b"1")
    assert time.monotonic() - began < 5


def test_a_reader_who_slept_learns_that_it_must_load(folder: Folder) -> None:
    sleeper = SharedLog(folder.store)
    folder.publish("a", b"1")
    assert len(sleeper.read(0)) == 1
    for content in (b"2", b"3"):
        folder.publish("a", content)
    folder.snapshot()
    folder.age()
    folder.collect()
    with pytest.raises(CollectedEntries, match="entry 2"):
        sleeper.read(1)
    assert sleeper.load() == (3, {"a": record(b"3")})
    assert sleeper.read(3) == []


def test_a_writer_who_slept_finds_its_number_taken_forever(folder: Folder) -> None:
    folder.publish("a", b"1")
    late = entry(2, "a", record(b"late"))
    folder.publish("a", b"2")
    folder.snapshot()
    folder.age()
    assert folder.collect().entries == 2
    assert folder.store.get(entry_key(2)) == COLLECTED
    # It cannot tell whether it had already written this entry before it slept.
    with pytest.raises(UnknownOutcome):
        folder.log.append(late)
    assert folder.log.load() == (2, {"a": record(b"2")})


def test_two_replicas_collect_at_once(folder: Folder) -> None:
    for content in (b"1", b"2", b"3"):
        folder.publish("a", content)
    folder.snapshot()
    folder.append("a", None)
    folder.age(1)
    folder.snapshot()
    folder.age()
    other = SharedLog(folder.store)
    interrupted = False

    def both(name: str) -> bool:
        nonlocal interrupted
        if name == "shared.put" and not interrupted:
            interrupted = True
            collect(other, grace_seconds=GRACE)
        return False

    faults.install(both)
    try:
        folder.collect()
    finally:
        faults.install(None)
    assert interrupted
    assert folder.objects() == set()
    assert folder.store.list("snapshots/") == [snapshot_key(4)]
    assert SharedLog(folder.store).load() == (4, {})


@pytest.mark.slow
def test_a_store_on_s3_is_collected_as_well(
    new_store: Callable[[], ObjectStore],
) -> None:
    log = SharedLog(new_store())
    for number, content in enumerate((b"1", b"2"), 1):
        store_object(log.store, revision_of(content), content)
        assert log.append(entry(number, "a", record(content)))
    log.load()
    assert log.write_snapshot(every=1) == 2
    log.write_state(ReplicaState("one", 1, 2))
    assert collect(log, grace_seconds=0) == Collected(entries=2, objects=1)
    assert SharedLog(new_store()).load() == (2, {"a": record(b"2")})
