"""The versioned store: names, revisions, comparisons, rollbacks, damage, and concurrent writers."""

import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from hashlib import sha256
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from adapters import faults
from adapters.errors import (
    CurrentRevision,
    DamagedFile,
    InvalidName,
    RevisionConflict,
    StoreFailed,
    StoreFull,
    UnknownAdapter,
    UnknownRevision,
)
from adapters.format.store import AdapterStore, verified_file
from adapters.format.uploads import Upload

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


@pytest.mark.parametrize(
    ("revision", "said"),
    [
        (None, "adapter 'a' has no revision before the current one; known: aabb, aacc"),
        ("77", "adapter 'a' has no revision '77'; known: aabb, aacc"),
        ("aa", "adapter 'a' has several revisions that begin with 'aa'; known: aabb, aacc"),
    ],
)
def test_a_revision_that_is_not_one_says_what_there_is(revision: str | None, said: str) -> None:
    assert str(UnknownRevision("a", revision, ["aabb", "aacc"])) == said


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
    assert sorted(path.name for path in store.root.rglob("*")) == [".locks", ".uploads"]
    assert store.put("spam", B) == (REV_B, True, True)
    assert history(store, "spam") == [REV_B]


def test_collecting_removes_what_interrupted_writers_left(store: AdapterStore) -> None:
    store.put("spam", A)
    debris = [
        ".deleted-ham-0123/current",
        f".deleted-ham-0123/{REV_B}.safetensors",
        ".locks/ham",
        f".uploads/{'0' * 32}.part",
        "spam/.current.abc.tmp",
        f"spam/{REV_B}.safetensors",
        f"first/{REV_C}.safetensors",
    ]
    for path in debris:
        (store.root / path).parent.mkdir(exist_ok=True)
        (store.root / path).write_bytes(b"half")
    assert store.collect() == 7
    left = {str(path.relative_to(store.root)) for path in store.root.rglob("*") if path.is_file()}
    assert left == {".locks/spam", "spam/current", f"spam/{REV_A}.safetensors"}
    assert not (store.root / "first").exists()
    assert history(store, "spam") == [REV_A]
    assert store.collect() == 0


def test_collecting_keeps_revisions_whose_list_is_lost(store: AdapterStore) -> None:
    for name in ("damaged", "lost"):
        store.put(name, A)
        store.put(name, B)
    (store.root / "damaged" / "current").write_bytes(b"nonsense")
    (store.root / "lost" / "current").unlink()
    assert store.collect() == 0
    assert len(list(store.root.glob("*/*.safetensors"))) == 4


# Uploads.


def test_a_received_file_is_moved_into_the_store(store: AdapterStore) -> None:
    with Upload(store.root, announced=1000) as upload:
        for start in range(0, 1000, 300):
            upload.write(A[start : start + 300])
        received = upload.finish()
        assert (received.revision, received.size) == (REV_A, 1000)
        assert store.put("spam", received) == (REV_A, True, True)
    assert store.read("spam", REV_A) == A
    assert store.path("spam", REV_A).stat().st_mode & 0o777 == 0o644
    assert not list((store.root / ".uploads").iterdir())


def test_an_upload_that_nothing_took_leaves_nothing(store: AdapterStore) -> None:
    with Upload(store.root) as upload:
        upload.write(A)
        assert len(list((store.root / ".uploads").iterdir())) == 1
    assert not list((store.root / ".uploads").iterdir())


def test_an_upload_larger_than_the_disk_is_refused_before_its_first_byte(
    store: AdapterStore,
) -> None:
    with pytest.raises(StoreFull, match="bytes free"):
        Upload(store.root, announced=2**60)
    assert not (store.root / ".uploads").exists()


def test_uploads_of_dead_writers_are_collected_and_those_of_others_are_not(
    store: AdapterStore,
) -> None:
    child = os.fork()
    if child == 0:
        Upload(store.root).write(A)
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    with Upload(store.root) as mine:
        # The next upload has collected it.
        assert len(list((store.root / ".uploads").iterdir())) == 1
        assert store.collect() == 0
        mine.write(B)
        assert store.put("spam", mine.finish()).revision == REV_B


def test_a_thread_that_still_writes_ends_before_its_file_is_closed(store: AdapterStore) -> None:
    """Another file may get the descriptor's number as soon as it is closed."""
    upload, begun, goes_on = Upload(store.root), threading.Event(), threading.Event()
    others: list[Path] = []

    def wait(name: str) -> bool:
        if name == "upload.write":
            begun.set()
            assert goes_on.wait(10)
        return False

    def close() -> None:
        upload.close()
        # It would have the same number.
        others.append(store.root / "other")
        with others[0].open("wb", buffering=0):
            writer.join()

    faults.install(wait)
    try:
        writer = threading.Thread(target=upload.write, args=(A,))
        writer.start()
        assert begun.wait(10)
        closer = threading.Thread(target=close)
        closer.start()
        time.sleep(0.05)
        assert not others
        goes_on.set()
        closer.join(10)
    finally:
        faults.install(None)
    assert others[0].read_bytes() == b""
    with pytest.raises(StoreFailed):
        upload.write(B)
    assert not list((store.root / ".uploads").iterdir())


@pytest.mark.parametrize("kept", [A, A[:-1], A + b"x", b"", A[:-1] + bytes([A[-1] ^ 1]), None])
def test_what_is_stored_already_stays_and_what_differs_is_replaced(
    store: AdapterStore, kept: bytes | None
) -> None:
    store.put("spam", A)
    path = store.path("spam", REV_A)
    if kept is None:
        path.unlink()
    elif kept != A:
        path.write_bytes(kept)
    before = path.stat().st_ino if kept is not None else 0
    passed: list[str] = []

    def note(name: str) -> bool:
        passed.append(name)
        return False

    faults.install(note)
    try:
        assert store.put("spam", A) == (REV_A, False, False)
    finally:
        faults.install(None)
    assert store.read("spam", REV_A) == A
    assert (path.stat().st_ino == before) == (kept == A)
    assert ("upload.sync" in passed) == (kept != A)
    assert not list((store.root / ".uploads").iterdir())


# A limit of kept revisions, and deleting one.


def test_publishing_drops_the_revisions_beyond_the_limit(tmp_path: Path) -> None:
    store = AdapterStore(tmp_path, kept=2)
    for data in (A, B, C):
        store.put("spam", data)
    assert history(store, "spam") == [REV_C, REV_B]
    assert not store.path("spam", REV_A).exists()
    # What was rolled back to is recent again.
    store.rollback("spam")
    store.put("spam", A)
    assert history(store, "spam") == [REV_A, REV_B]
    assert store.put("spam", A) == (REV_A, False, False)


def test_revisions_in_use_are_kept_beyond_the_limit(tmp_path: Path) -> None:
    store = AdapterStore(tmp_path, kept=1)
    store.put("spam", A)
    store.put("spam", B, spare={REV_A})
    assert history(store, "spam") == [REV_B, REV_A]
    store.put("spam", C)
    assert history(store, "spam") == [REV_C]


def test_one_revision_is_deleted_but_never_the_current_one(store: AdapterStore) -> None:
    for data in (A, B, C):
        store.put("spam", data)
    with pytest.raises(CurrentRevision, match="roll back or publish"):
        store.delete_revision("spam", REV_C)
    with pytest.raises(RevisionConflict):
        store.delete_revision("spam", REV_B, expected=REV_A)
    store.delete_revision("spam", REV_B, expected=REV_C)
    assert history(store, "spam") == [REV_C, REV_A]
    assert not store.path("spam", REV_B).exists()
    with pytest.raises(UnknownRevision):
        store.delete_revision("spam", REV_B)
    with pytest.raises(UnknownAdapter):
        store.delete_revision("ham", REV_B)
    assert store.rollback("spam") == REV_A


# A store that is gone.


def test_a_removed_store_says_so_and_works_again_when_it_is_back(store: AdapterStore) -> None:
    store.put("spam", A)
    away = store.root.with_name("away")
    store.root.rename(away)
    actions: list[Callable[[], object]] = [
        store.names,
        lambda: store.put("spam", B),
        lambda: store.create("ham", B),
        lambda: store.current("spam"),
        lambda: store.revisions("spam"),
        lambda: store.read("spam", REV_A),
        lambda: store.rollback("spam"),
        lambda: store.delete("spam"),
        lambda: store.delete_revision("spam", REV_A),
        lambda: verified_file(store.root, "spam", REV_A),
        store.collect,
    ]
    for action in actions:
        with pytest.raises(StoreFailed, match="its folder is gone"):
            action()
    assert not store.root.exists()
    away.rename(store.root)
    assert store.read("spam", REV_A) == A
    # It may also come back empty.
    shutil.rmtree(store.root)
    store.root.mkdir()
    assert store.put("spam", B) == (REV_B, True, True)


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
