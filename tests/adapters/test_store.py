"""The versioned store: names, revisions, comparisons, rollbacks, damage, and concurrent writers."""

import multiprocessing
import threading
from collections.abc import Callable
from hashlib import sha256
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from adapters.errors import (
    DamagedFile,
    InvalidName,
    RevisionConflict,
    UnknownAdapter,
    UnknownRevision,
)
from adapters.format.store import AdapterStore

A, B, C = (letter * 1000 for letter in (b"a", b"b", b"c"))
REV_A, REV_B, REV_C = (sha256(data).hexdigest() for data in (A, B, C))


@pytest.fixture
def store(tmp_path: Path) -> AdapterStore:
    return AdapterStore(tmp_path / "adapters")


def history(store: AdapterStore, name: str) -> list[str]:
    return [item.revision for item in store.revisions(name)]


def test_put_returns_what_changed(store: AdapterStore) -> None:
    assert store.put("spam", A) == (REV_A, True, True)
    assert store.put("spam", B) == (REV_B, False, True)
    assert store.put("spam", B) == (REV_B, False, False)
    assert store.put("spam", A) == (REV_A, False, True)
    assert store.names() == ["spam"]
    assert history(store, "spam") == [REV_A, REV_B]
    assert store.read("spam", REV_B) == B
    assert [item.size for item in store.revisions("spam")] == [1000, 1000]


def test_identical_bytes_write_nothing(store: AdapterStore) -> None:
    store.put("spam", A)
    before = {path: path.stat().st_mtime_ns for path in store.root.glob("spam/*")}
    store.put("spam", A)
    assert {path: path.stat().st_mtime_ns for path in store.root.glob("spam/*")} == before


def test_put_compares_with_the_expected_revision(store: AdapterStore) -> None:
    with pytest.raises(RevisionConflict, match="no revision"):
        store.put("spam", A, expected=REV_A)
    store.put("spam", A)
    with pytest.raises(RevisionConflict, match=REV_A):
        store.put("spam", C, expected=REV_B)
    assert store.current("spam") == REV_A
    assert store.put("spam", B, expected=REV_A).changed


def test_create_refuses_a_name_that_exists(store: AdapterStore) -> None:
    assert store.create("spam", A).created
    with pytest.raises(RevisionConflict):
        store.create("spam", A)


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", ".hidden", "Spam", "a/b", "../x", "a" * 65, "-a", "a b", "a\n", "ä", "a\x00"],
)
def test_invalid_names_are_refused_by_every_method(store: AdapterStore, name: str) -> None:
    actions: list[Callable[[], object]] = [
        lambda: store.put(name, A),
        lambda: store.create(name, A),
        lambda: store.current(name),
        lambda: store.revisions(name),
        lambda: store.resolve(name),
        lambda: store.read(name, REV_A),
        lambda: store.rollback(name),
        lambda: store.delete(name),
    ]
    for action in actions:
        with pytest.raises(InvalidName):
            action()
    assert store.names() == []


def test_an_unknown_name_is_refused_with_the_known_ones(store: AdapterStore) -> None:
    store.put("spam", A)
    for action in (store.current, store.revisions, store.resolve, store.rollback, store.delete):
        with pytest.raises(UnknownAdapter, match="spam"):
            action("ham")


def test_a_revision_is_found_by_any_prefix_that_is_unique(store: AdapterStore) -> None:
    # Try data until two hashes begin with the same digit.
    first = sha256(A).hexdigest()[0]
    twin = next(
        data for data in (b"%d" % i for i in range(999)) if sha256(data).hexdigest()[0] == first
    )
    store.put("spam", A)
    assert store.resolve("spam", first) == REV_A
    store.put("spam", twin)
    assert store.resolve("spam") == sha256(twin).hexdigest()
    assert store.resolve("spam", REV_A) == REV_A
    for prefix in (first, "", "zz", REV_A + "0", REV_A.upper()):
        with pytest.raises(UnknownRevision, match=REV_A[:12]):
            store.resolve("spam", prefix)


def test_rollback_returns_to_the_previous_revision_even_after_a_restart(
    store: AdapterStore,
) -> None:
    for data in (A, B, C):
        store.put("spam", data)
    assert AdapterStore(store.root).rollback("spam") == REV_B
    assert AdapterStore(store.root).rollback("spam") == REV_C
    assert AdapterStore(store.root).rollback("spam", REV_A[:8]) == REV_A
    assert history(AdapterStore(store.root), "spam") == [REV_A, REV_C, REV_B]


def test_rollback_without_an_earlier_revision_is_refused(store: AdapterStore) -> None:
    store.put("spam", A)
    with pytest.raises(UnknownRevision):
        store.rollback("spam")


def test_rollback_to_a_damaged_file_is_refused_and_changes_nothing(store: AdapterStore) -> None:
    store.put("spam", A)
    store.put("spam", B)
    store.path("spam", REV_A).write_bytes(b"damaged")
    with pytest.raises(DamagedFile):
        store.rollback("spam")
    assert store.current("spam") == REV_B


def test_a_damaged_or_missing_file_is_never_read_and_the_same_upload_repairs_it(
    store: AdapterStore,
) -> None:
    store.put("spam", A)
    store.path("spam", REV_A).write_bytes(A[:-1])
    with pytest.raises(DamagedFile, match="sha256"):
        store.read("spam", REV_A)
    store.put("spam", A)
    assert store.read("spam", REV_A) == A
    store.path("spam", REV_A).unlink()
    with pytest.raises(DamagedFile, match="gone"):
        store.read("spam", REV_A)
    store.put("spam", A)
    assert store.read("spam", REV_A) == A


@pytest.mark.parametrize("content", [b"", b"../../etc/passwd\n", b"\xff\n", REV_A[:-1].encode()])
def test_a_damaged_current_file_is_refused_by_the_adapters_name(
    store: AdapterStore, content: bytes
) -> None:
    store.put("spam", A)
    (store.root / "spam" / "current").write_bytes(content)
    with pytest.raises(DamagedFile, match="spam"):
        store.current("spam")
    with pytest.raises(DamagedFile, match="delete the adapter to repair it"):
        store.put("spam", B)
    with pytest.raises(DamagedFile):
        store.delete("spam", expected=REV_A)
    store.delete("spam")
    assert store.put("spam", B) == (REV_B, True, True)


def test_delete_forgets_everything_and_compares(store: AdapterStore) -> None:
    store.put("spam", A)
    with pytest.raises(RevisionConflict):
        store.delete("spam", expected=REV_B)
    store.delete("spam", expected=REV_A)
    assert store.names() == []
    assert [path.name for path in store.root.iterdir()] == [".locks"]
    assert store.put("spam", B) == (REV_B, True, True)
    assert history(store, "spam") == [REV_B]


def test_opening_removes_what_interrupted_writers_left(store: AdapterStore) -> None:
    store.put("spam", A)
    temporary = store.root / "spam" / ".current.abc.tmp"
    temporary.write_bytes(b"half")
    deleted = store.root / ".deleted-ham-0123"
    deleted.mkdir()
    (deleted / "current").write_bytes(b"")
    assert history(AdapterStore(store.root), "spam") == [REV_A]
    assert not temporary.exists()
    assert not deleted.exists()


# Many writers.


def test_one_of_many_threads_that_expect_the_same_revision_wins(store: AdapterStore) -> None:
    store.put("spam", A)
    won: list[int] = []
    barrier = threading.Barrier(8)

    def write(number: int) -> None:
        barrier.wait()
        try:
            store.put("spam", b"version %d" % number, expected=REV_A)
        except RevisionConflict:
            return
        won.append(number)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert store.read("spam", store.current("spam")) == b"version %d" % won[0]


def append_versions(root: str, writer: int, count: int) -> None:
    store = AdapterStore(root)
    for number in range(count):
        while True:
            current = store.current("spam")
            data = store.read("spam", current) + b"%d.%d;" % (writer, number)
            try:
                store.put("spam", data, expected=current)
                break
            except RevisionConflict:
                continue


def test_writers_in_several_processes_lose_no_update(store: AdapterStore) -> None:
    store.put("spam", b"")
    context = multiprocessing.get_context("fork")
    writers: list[BaseProcess] = [
        context.Process(target=append_versions, args=(str(store.root), writer, 10))
        for writer in range(3)
    ]
    for process in writers:
        process.start()
    # Meanwhile a reader sees only whole versions.
    while any(process.is_alive() for process in writers):
        store.read("spam", store.current("spam"))
        AdapterStore(store.root)
    for process in writers:
        process.join()
        assert process.exitcode == 0
    parts = store.read("spam", store.current("spam")).decode().rstrip(";").split(";")
    assert sorted(parts) == sorted(f"{w}.{n}" for w in range(3) for n in range(10))
    assert len(store.revisions("spam")) == 31
