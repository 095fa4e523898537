"""A replica's cache: verified, bounded, fetched once, and changed by the log alone."""

import errno
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from adapters import faults
from adapters.errors import DamagedFile, StoreError, StoreUnreachable, UnknownAdapter
from adapters.format.uploads import received
from adapters.shared.cache import CachedStore
from adapters.shared.objects import ObjectStore, object_key, store_object
from tests.support.log_entries import record, revision_of

KIB = 1024


def contents(number: int) -> list[bytes]:
    return [bytes([each]) * KIB for each in range(number)]


@pytest.fixture
def cache(store: ObjectStore, tmp_path: Path) -> CachedStore:
    """Holds three of four revisions."""
    for content in contents(4):
        store_object(store, revision_of(content), content)
    cache = CachedStore(tmp_path / "cache", store, max_bytes=3 * KIB)
    cache.follow({f"n{at}": record(content) for at, content in enumerate(contents(4))})
    return cache


def files(cache: CachedStore) -> set[str]:
    return {path.parent.name for path in cache.root.glob("*/*.safetensors")}


@pytest.mark.slow
def test_names_and_revisions_are_those_of_the_log(cache: CachedStore) -> None:
    one, two = b"one", b"two"
    cache.apply("n0", record(one, two))
    cache.apply("n3", None)
    assert cache.names() == ["n0", "n1", "n2"]
    assert cache.history("n0") == [revision_of(one), revision_of(two)]
    assert cache.current("n0") == revision_of(one)
    assert cache.resolve("n0", revision_of(two)[:9]) == revision_of(two)
    assert [each.size for each in cache.revisions("n0")] == [3, 3]
    with pytest.raises(UnknownAdapter):
        cache.current("n3")
    assert files(cache) == set()


def test_a_missing_file_is_fetched_and_read(cache: CachedStore) -> None:
    (content, *_) = contents(1)
    assert cache.read("n0", revision_of(content)) == content
    assert cache.fetch("n0", revision_of(content)).read_bytes() == content
    assert files(cache) == {"n0"}


def test_the_least_recently_used_file_goes_first(cache: CachedStore) -> None:
    revisions = list(map(revision_of, contents(4)))
    for at in (0, 1, 2):
        cache.fetch(f"n{at}", revisions[at])
    cache.fetch("n0", revisions[0])
    cache.fetch("n3", revisions[3])
    assert files(cache) == {"n0", "n2", "n3"}
    assert cache.cached_bytes == 3 * KIB


@pytest.mark.slow
def test_a_file_in_use_is_not_evicted(cache: CachedStore) -> None:
    revisions = list(map(revision_of, contents(4)))
    with cache.fetched("n0", revisions[0]) as path:
        for at in (1, 2, 3, 1):
            cache.fetch(f"n{at}", revisions[at])
        assert path.read_bytes() == contents(1)[0]
        assert cache.cached_bytes == 3 * KIB
    assert cache.cached_bytes <= 3 * KIB


def test_files_of_an_earlier_start_are_used_again_and_bounded(
    cache: CachedStore, store: ObjectStore
) -> None:
    revisions = list(map(revision_of, contents(4)))
    for at in (0, 1, 2):
        os.utime(cache.fetch(f"n{at}", revisions[at]), (at, at))
    again = CachedStore(cache.root, store, max_bytes=2 * KIB)
    again.follow({f"n{at}": record(content) for at, content in enumerate(contents(4))})
    store.delete(object_key(revisions[2]))
    assert again.fetch("n2", revisions[2]).exists()
    assert files(again) == {"n1", "n2"}


def test_an_entry_that_cannot_be_read_is_passed_over(
    cache: CachedStore, caplog: pytest.LogCaptureFixture
) -> None:
    (cache.root / "loop").symlink_to(cache.root / "loop")
    CachedStore(cache.root, cache.objects, max_bytes=2**20)
    assert f"{cache.root / 'loop'} cannot be looked into" in caplog.text


def test_a_damaged_file_is_fetched_again(cache: CachedStore) -> None:
    (content, *_) = contents(1)
    path = cache.fetch("n0", revision_of(content))
    path.write_bytes(content[:100])
    os.utime(path, (1, 1))
    assert cache.fetch("n0", revision_of(content)).read_bytes() == content


def test_an_object_that_was_cut_is_read_once_more(
    cache: CachedStore, store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    (content, *_) = contents(1)
    answers = iter([content[:10], content])
    monkeypatch.setattr(store, "get", lambda *_, **__: next(answers))
    assert cache.fetch("n0", revision_of(content)).read_bytes() == content


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["cut", "altered", "empty"])
def test_an_altered_object_is_refused(cache: CachedStore, store: ObjectStore, damage: str) -> None:
    (content, *_) = contents(1)
    revision = revision_of(content)
    altered = {"cut": content[:-1], "altered": b"!" + content[1:], "empty": b""}[damage]
    store.put(object_key(revision), altered)
    with pytest.raises(DamagedFile, match="does not have its hash"):
        cache.fetch("n0", revision)
    assert files(cache) == set()
    store_object(store, revision, content)
    assert cache.read("n0", revision) == content


@pytest.mark.slow
def test_an_object_that_is_gone_is_named(cache: CachedStore, store: ObjectStore) -> None:
    (content, *_) = contents(1)
    store.delete(object_key(revision_of(content)))
    with pytest.raises(DamagedFile, match="gone from the shared store"):
        cache.fetch("n0", revision_of(content))


def test_many_threads_fetch_a_file_once(cache: CachedStore) -> None:
    (content, *_) = contents(1)
    reads: list[str] = []

    def count(name: str) -> bool:
        reads.append(name)
        return False

    start = threading.Barrier(8)

    def fetch(_: int) -> bytes:
        start.wait()
        return cache.read("n0", revision_of(content))

    faults.install(count)
    try:
        with ThreadPoolExecutor(8) as pool:
            assert set(pool.map(fetch, range(8))) == {content}
    finally:
        faults.install(None)
    assert reads.count("shared.get") == 1


def test_what_is_cached_is_read_without_the_store(cache: CachedStore) -> None:
    first, second = contents(2)
    cache.fetch("n0", revision_of(first))

    def fail(name: str) -> bool:
        if name == "shared.get":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return False

    faults.install(fail)
    try:
        assert cache.read("n0", revision_of(first)) == first
        with pytest.raises(StoreUnreachable):
            cache.read("n1", revision_of(second))
    finally:
        faults.install(None)


def test_a_received_file_is_kept_for_its_name(cache: CachedStore, store: ObjectStore) -> None:
    content = b"new"
    with received(cache.root, content) as upload:
        path = cache.adopt("new", upload.file)
    assert path.read_bytes() == content
    assert cache.fetch("new", revision_of(content)) == path
    assert store.get(object_key(revision_of(content))) is None


def test_only_the_log_changes_the_cache(cache: CachedStore) -> None:
    for call in (
        lambda: cache.put("n0", b"x"),
        lambda: cache.create("n9", b"x"),
        lambda: cache.rollback("n0"),
        lambda: cache.delete("n0"),
        lambda: cache.delete_revision("n0", "0" * 64),
    ):
        with pytest.raises(StoreError, match="only as the shared log says"):
            call()


def test_what_a_killed_replica_left_half_written_is_removed(cache: CachedStore) -> None:
    (cache.root / ".known-0123.json.4567.tmp").write_bytes(b"half")
    (cache.root / ".known-0123.json").write_bytes(b"whole")
    assert cache.collect() == 1
    assert [path.name for path in cache.root.glob(".known*")] == [".known-0123.json"]
