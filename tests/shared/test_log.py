"""The shared log: order, conditional creates whose answer is lost, newer and damaged entries."""

import errno
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from adapters import faults
from adapters.errors import (
    DamagedStore,
    NewerStore,
    OtherBackbone,
    StoreDenied,
    StoreFull,
    UnknownOutcome,
)
from adapters.shared.log import SharedLog, entry_key, snapshot_key
from adapters.shared.objects import ObjectStore
from adapters.shared.records import Entry, ReplicaState, encode
from tests.support.log_entries import BACKBONE, OTHER_BACKBONE, entry, record
from tests.support.tcp_proxy import Proxy

NewStore = Callable[[], ObjectStore]


@pytest.fixture
def log(store: ObjectStore) -> SharedLog:
    return SharedLog(store)


def written(log: SharedLog, *entries: Entry) -> None:
    for each in entries:
        assert log.append(each)


@pytest.mark.slow
def test_an_empty_log_has_no_names_and_no_entries(log: SharedLog) -> None:
    assert log.load() == (0, {})
    assert log.read(0) == []
    assert log.states() == []


@pytest.mark.slow
def test_entries_are_read_in_order_and_loaded_as_their_sum(
    log: SharedLog, new_store: NewStore
) -> None:
    entries = [
        entry(1, "a", record(b"1")),
        entry(2, "b", record(b"2", b"1")),
        entry(3, "a", record(b"3"), kind="prepare", change="x"),
        entry(4, "b", None),
        entry(5, "a", record(b"3"), kind="abort", change="x"),
        entry(6, "c", record(b"4"), kind="prepare", change="y"),
        entry(7, "c", record(b"4"), change="y"),
    ]
    written(log, *entries)
    other = SharedLog(new_store())
    assert other.read(0) == entries
    assert other.read(4) == entries[4:]
    assert other.read(7) == []
    assert other.load() == (7, {"a": record(b"1"), "c": record(b"4")})


@pytest.mark.slow
def test_a_long_log_is_read_whole(log: SharedLog) -> None:
    entries = [entry(number, f"n{number}", record(b"x")) for number in range(1, 60)]
    written(log, *entries)
    assert log.read(0) == entries


@pytest.mark.slow
def test_of_many_writers_one_has_a_number(new_store: NewStore) -> None:
    logs = [SharedLog(new_store()) for _ in range(4)]
    for number in range(1, 6):
        start = threading.Barrier(len(logs))

        def append(turn: int, n: int = number, start: threading.Barrier = start) -> bool:
            start.wait()
            return logs[turn].append(entry(n, f"by-{turn}", record(b"x")))

        with ThreadPoolExecutor(len(logs)) as pool:
            appended = list(pool.map(append, range(len(logs))))
        assert appended.count(True) == 1
        (last,) = logs[0].read(number - 1)
        assert last.name == f"by-{appended.index(True)}"


def test_an_entry_that_was_appended_is_appended_again_without_a_change(log: SharedLog) -> None:
    one = entry(1, "a", record(b"1"))
    assert log.append(one)
    assert log.append(one)
    assert not log.append(replace(one, by="another"))
    assert log.read(0) == [one]


@pytest.mark.slow
@pytest.mark.parametrize("lost", [1, 2])
def test_an_entry_whose_answer_was_lost_is_found_again(
    s3_url: str, s3_proxy: Proxy, lost: int
) -> None:
    # Lost twice, s3fs gives up; lost once, it asks again and hears that the entry exists.
    log = SharedLog(ObjectStore(s3_url, timeout=5))
    one = entry(1, "a", record(b"1"))
    assert log.read(0) == []
    s3_proxy.deaf_left, s3_proxy.mode = lost, "deaf"
    try:
        assert log.append(one)
    finally:
        s3_proxy.mode = "pass"
    assert log.read(0) == [one]


@pytest.mark.slow
@pytest.mark.parametrize("point", ["shared.create", "shared.create.done", "shared.get"])
def test_an_append_that_fails_twice_goes_on_until_it_knows(log: SharedLog, point: str) -> None:
    failures = iter([errno.EIO, errno.ETIMEDOUT])

    def handler(name: str) -> bool:
        if name == point and (number := next(failures, None)):
            raise OSError(number, os.strerror(number))
        return False

    one, two = entry(1, "a", record(b"1")), entry(1, "a", record(b"2"))
    faults.install(handler)
    try:
        assert log.append(one)
        assert not log.append(two)
    finally:
        faults.install(None)
    assert log.read(0) == [one]


@pytest.mark.slow
@pytest.mark.parametrize(("point", "there"), [("shared.create", False), ("shared.get", True)])
def test_an_append_that_cannot_know_says_so(new_store: NewStore, point: str, there: bool) -> None:
    store = new_store()
    log = SharedLog(store, patience=0.1)
    one = entry(1, "a", record(b"1"))
    store.list("log/")

    def handler(name: str) -> bool:
        if name == point or (there and name == "shared.create.done"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return False

    faults.install(handler)
    try:
        with pytest.raises(UnknownOutcome, match=one.change):
            log.append(one)
    finally:
        faults.install(None)
    assert log.read(0) == ([one] if there else [])


@pytest.mark.parametrize(
    ("number", "error"), [(errno.EACCES, StoreDenied), (errno.ENOSPC, StoreFull)]
)
def test_an_append_that_is_refused_was_not_made(
    log: SharedLog, number: int, error: type[Exception]
) -> None:
    def handler(name: str) -> bool:
        if name == "shared.create":
            raise OSError(number, os.strerror(number))
        return False

    faults.install(handler)
    try:
        with pytest.raises(error):
            log.append(entry(1, "a", record(b"1")))
    finally:
        faults.install(None)
    assert log.read(0) == []


def newer(content: bytes) -> bytes:
    return content.replace(b'{"format":1', b'{"format":2,"more":[]', 1)


@pytest.mark.slow
def test_an_entry_of_a_newer_version_is_refused_and_nothing_is_applied(
    log: SharedLog, store: ObjectStore
) -> None:
    written(log, entry(1, "a", record(b"1")), entry(2, "b", record(b"2")))
    store.put(entry_key(3), newer(encode(entry(3, "c", record(b"3")))))
    with pytest.raises(NewerStore, match=r"format 2.*upgrade"):
        log.read(0)
    with pytest.raises(NewerStore, match=r"log/000000000003\.json"):
        log.load()


@pytest.mark.slow
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b'{"format":1',
        b'{"format":1,"number":3}',
        encode(entry(4, "c", record(b"3"))),
        encode(entry(3, "c", record(b"3")))[:-20],
        encode(entry(3, "c", record(b"3"))).replace(b'"by"', b'"unknown":1,"by"'),
        encode(entry(3, "c", record(b"3"))).replace(b'"commit"', b'"later"'),
    ],
    ids=["empty", "brace", "cut", "fields", "number", "short", "more-fields", "kind"],
)
def test_a_damaged_entry_is_named(log: SharedLog, store: ObjectStore, content: bytes) -> None:
    written(log, entry(1, "a", record(b"1")), entry(2, "b", record(b"2")))
    store.put(entry_key(3), content)
    for call in (lambda: log.read(0), log.load):
        with pytest.raises(DamagedStore, match=r"log/000000000003\.json"):
            call()


def test_a_store_belongs_to_the_first_backbone(log: SharedLog, new_store: NewStore) -> None:
    cluster = log.open(BACKBONE)
    assert SharedLog(new_store()).open(BACKBONE) == cluster
    with pytest.raises(OtherBackbone, match="replicas of the backbone tiny"):
        SharedLog(new_store()).open(OTHER_BACKBONE)


@pytest.mark.slow
def test_replicas_that_begin_a_store_at_once_begin_the_same(new_store: NewStore) -> None:
    start = threading.Barrier(4)

    def open_it(log: SharedLog) -> object:
        start.wait()
        return log.open(BACKBONE)

    with ThreadPoolExecutor(4) as pool:
        clusters = list(pool.map(open_it, [SharedLog(new_store()) for _ in range(4)]))
    assert clusters == [clusters[0]] * 4


def test_a_store_of_a_newer_version_is_refused(log: SharedLog, store: ObjectStore) -> None:
    log.open(BACKBONE)
    content = store.get("cluster.json")
    assert content is not None
    store.put("cluster.json", newer(content))
    with pytest.raises(NewerStore, match=r"cluster\.json"):
        log.open(BACKBONE)


@pytest.mark.slow
def test_replicas_read_the_states_of_the_others(log: SharedLog, new_store: NewStore) -> None:
    one = ReplicaState("one", 1, 0, ready=("x",), refused={"y": "too large"})
    two = ReplicaState("two", 7, 12, lease_seconds=2.5, about={"url": "http://two"})
    log.write_state(replace(one, beat=0))
    log.write_state(one)
    SharedLog(new_store()).write_state(two)
    assert log.states() == [one, two]
    log.remove_state("one")
    assert log.states() == [two]


@pytest.mark.slow
def test_a_start_reads_the_snapshot_and_the_entries_after_it(
    log: SharedLog, new_store: NewStore
) -> None:
    writer = SharedLog(new_store())
    written(writer, *(entry(number, f"n{number}", record(b"x")) for number in range(1, 8)))
    assert writer.write_snapshot(every=5) is None, "it has seen nothing"
    assert len(writer.read(0)) == 7
    assert writer.write_snapshot(every=5) == 7
    assert writer.write_snapshot(every=5) is None
    pending = entry(8, "p", record(b"p"), kind="prepare", change="x")
    written(writer, pending)
    # What the snapshot contains is no longer read.
    log.store.put(entry_key(3), b"damaged")
    number, names = log.load()
    assert (number, len(names)) == (8, 7)
    assert log.write_snapshot(every=1) == 8
    state, at = SharedLog(new_store()).newest_snapshot()
    assert (at, state.pending) == (8, {"x": pending})


@pytest.mark.slow
def test_replicas_that_write_one_snapshot_write_the_same(new_store: NewStore) -> None:
    logs = [SharedLog(new_store()) for _ in range(4)]
    written(logs[0], *(entry(number, f"n{number % 3}", record(b"x")) for number in range(1, 8)))
    for log in logs[:2]:
        log.read(0)
    logs[2].load()
    logs[3].read(0)
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda log: log.write_snapshot(every=1), logs)) == [7] * 4
    assert logs[0].store.list("snapshots/") == [snapshot_key(7)]
    assert SharedLog(new_store()).load() == logs[2].load()


def test_a_damaged_snapshot_is_named(log: SharedLog, store: ObjectStore) -> None:
    store.put(snapshot_key(5), b'{"format":1,"number":')
    with pytest.raises(DamagedStore, match=r"snapshots/000000000005\.json"):
        log.load()
    store.put(snapshot_key(5), b'{"format":3,"number":')
    with pytest.raises(NewerStore, match=r"snapshots/000000000005\.json"):
        log.load()
