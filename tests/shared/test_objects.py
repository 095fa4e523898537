"""Objects in a folder and on S3: conditional creates, errors by name, and their time."""

import asyncio
import errno
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

import pytest
from s3fs import S3FileSystem

from adapters import faults
from adapters.errors import StoreDenied, StoreFailed, StoreFull, StoreUnreachable
from adapters.shared.objects import ObjectStore, object_key, store_object
from tests.support.broken_server import answer, broken
from tests.support.s3_server import environment
from tests.support.tcp_proxy import Mode, Proxy

NewStore = Callable[[], ObjectStore]


@contextmanager
def failing(point: str, error: OSError) -> Iterator[None]:
    """Every call of one kind fails in this block, before or after it was done."""

    def handler(name: str) -> bool:
        if name == point:
            raise error
        return False

    faults.install(handler)
    try:
        yield
    finally:
        faults.install(None)


def complaint_of(store: ObjectStore) -> str:
    with pytest.raises(StoreUnreachable) as raised:
        store.get("log/1.json")
    return str(raised.value)


def test_an_object_is_written_read_listed_and_deleted(store: ObjectStore, tmp_path: Path) -> None:
    assert store.get("log/1.json") is None
    assert store.list("log/") == []
    assert store.create("log/1.json", b"one")
    store.put("log/2.json", b"two")
    store.put("log/2.json", b"2")
    store.put("other/3.json", b"three")
    assert store.get("log/1.json") == b"one"
    assert store.get_all(["log/2.json", "log/9.json", "log/1.json"]) == [b"2", None, b"one"]
    assert store.list("log/") == ["log/1.json", "log/2.json"]
    assert store.download("log/1.json", tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == b"one"
    assert not store.download("log/9.json", tmp_path / "other")
    assert not (tmp_path / "other").exists()
    store.delete("log/1.json")
    store.delete("log/1.json")
    assert store.list("log/") == ["log/2.json"]


@pytest.mark.slow
def test_a_listing_has_sizes_and_rising_times(store: ObjectStore) -> None:
    store.put("log/1.json", b"12345")
    time.sleep(1.1)  # S3's times are whole seconds.
    store.put("log/2.json", b"")
    first, second = sorted(store.listing("log/"))
    assert (first.size, second.size) == (5, 0)
    assert second.modified > first.modified


@pytest.mark.slow
def test_only_one_of_many_writers_creates_an_object(new_store: NewStore) -> None:
    stores = [new_store() for _ in range(4)]
    for number in range(10):
        start = threading.Barrier(len(stores))

        def create(each: ObjectStore, start: threading.Barrier = start, n: int = number) -> bool:
            start.wait()
            return each.create(f"log/{n}.json", str(id(each)).encode())

        with ThreadPoolExecutor(len(stores)) as pool:
            created = list(pool.map(create, stores))
        assert created.count(True) == 1
        winner = stores[created.index(True)]
        assert stores[0].get(f"log/{number}.json") == str(id(winner)).encode()


def test_conditional_writes_are_checked_and_leave_nothing(store: ObjectStore) -> None:
    store.check_conditional()
    assert store.list("probes/") == []


def test_a_store_that_ignores_the_condition_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    # As an older MinIO or Ceph: it answers 200 to every write.
    with broken(answer(b""), answer(b""), answer(b"second"), answer(b"")) as server:
        for name, value in environment(server.url).items():
            monkeypatch.setenv(name, value)
        with pytest.raises(StoreFailed, match="ignores conditional writes"):
            ObjectStore("s3://bucket/prefix", timeout=2).check_conditional()
        writes = [
            headers
            for line, headers in zip(server.requests, server.headers, strict=True)
            if line.startswith("PUT")
        ]
        assert [headers["if-none-match"] for headers in writes] == ["*", "*"]


def test_an_object_is_uploaded_again_where_it_was_damaged(store: ObjectStore) -> None:
    content = b"whole"
    revision = sha256(content).hexdigest()
    store_object(store, revision, content)
    store.put(object_key(revision), content[:2])
    store_object(store, revision, content)
    assert store.get(object_key(revision)) == content


@pytest.mark.parametrize(
    ("point", "call"),
    [
        ("create", lambda store: store.create("log/1.json", b"x")),
        ("put", lambda store: store.put("log/1.json", b"x")),
        ("get", lambda store: store.get("log/1.json")),
        ("list", lambda store: store.list("log/")),
        ("delete", lambda store: store.delete("log/1.json")),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_failure_names_the_store_and_the_reason(
    store: ObjectStore, point: str, call: Callable[[ObjectStore], object]
) -> None:
    error = OSError(errno.EIO, os.strerror(errno.EIO))
    with failing(f"shared.{point}", error), pytest.raises(StoreUnreachable) as raised:
        call(store)
    assert store.url in str(raised.value)
    assert "Input/output error" in str(raised.value)


def test_a_full_disk_is_named(store: ObjectStore) -> None:
    error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with failing("shared.create", error), pytest.raises(StoreFull):
        store.create("log/1.json", b"x")


def test_a_folder_that_hangs_ends_in_time(tmp_path: Path) -> None:
    store = ObjectStore(str(tmp_path / "shared"), timeout=0.1)
    release = threading.Event()
    faults.install(lambda _: release.wait())
    try:
        began = time.monotonic()
        with pytest.raises(StoreUnreachable, match="no answer in time"):
            store.get("log/1.json")
        assert time.monotonic() - began < 2
        with ThreadPoolExecutor(40) as pool:
            list(pool.map(lambda _: complaint_of(store), range(40)))
        # Now it does not even try.
        assert "have not returned" in complaint_of(store)
    finally:
        release.set()
        faults.install(None)
    until = time.monotonic() + 10
    while threading.active_count() > 20 and time.monotonic() < until:
        time.sleep(0.01)
    assert store.get("log/1.json") is None


def test_many_calls_that_are_slow_and_in_time_are_all_answered(tmp_path: Path) -> None:
    """Those that wait count for nothing: readers would take a replica its lease."""
    store = ObjectStore(str(tmp_path / "shared"), timeout=20)
    store.put("log/1.json", b"x")
    together = threading.Barrier(40)
    faults.install(lambda _: bool(together.wait(20)) and False)
    try:
        with ThreadPoolExecutor(40) as pool:
            found = list(pool.map(lambda _: store.get("log/1.json"), range(40)))
    finally:
        faults.install(None)
    assert found == [b"x"] * 40


def test_a_folder_that_is_removed_is_unreachable_and_not_empty(tmp_path: Path) -> None:
    store = ObjectStore(str(tmp_path / "shared"))
    store.put("log/1.json", b"x")
    (tmp_path / "shared").rename(tmp_path / "away")
    for call in (
        lambda: store.get("log/1.json"),
        lambda: store.list("log/"),
        lambda: store.create("log/2.json", b""),
        lambda: store.put("log/2.json", b""),
    ):
        with pytest.raises(StoreUnreachable, match="folder does not exist"):
            call()
    assert not (tmp_path / "shared").exists()
    (tmp_path / "away").rename(tmp_path / "shared")
    assert store.get("log/1.json") == b"x"


def test_a_folder_whose_parent_is_missing_is_not_made(tmp_path: Path) -> None:
    with pytest.raises(StoreUnreachable, match="folder does not exist"):
        ObjectStore(str(tmp_path / "not-mounted" / "shared")).list("log/")


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["refuse", "hold"])
def test_a_lost_connection_is_unreachable_in_time_and_comes_back(
    s3_url: str, s3_proxy: Proxy, mode: Mode
) -> None:
    store = ObjectStore(s3_url, timeout=2)
    store.put("log/1.json", b"x")
    assert store.get("log/1.json") == b"x"
    s3_proxy.mode = mode
    try:
        for call in (lambda: store.get("log/1.json"), lambda: store.list("log/")):
            began = time.monotonic()
            with pytest.raises(StoreUnreachable):
                call()
            assert time.monotonic() - began < 4
    finally:
        s3_proxy.mode = "pass"
    assert store.get("log/1.json") == b"x"


@pytest.mark.slow
def test_the_loading_of_the_library_is_not_the_stores_time(
    s3_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = S3FileSystem.set_session

    async def slowly(self: S3FileSystem) -> object:
        if self._s3 is None:
            await asyncio.sleep(1.5)
        return await load(self)

    monkeypatch.setattr(S3FileSystem, "set_session", slowly)
    ObjectStore(s3_url, timeout=1).put("log/1.json", b"x")


@pytest.mark.slow
def test_a_create_whose_answer_is_lost_was_done_all_the_same(s3_url: str, s3_proxy: Proxy) -> None:
    store = ObjectStore(s3_url, timeout=3)
    store.check_conditional()
    s3_proxy.deaf_left, s3_proxy.mode = 1, "deaf"
    try:
        # s3fs asks again, and then it exists.
        assert not store.create("log/1.json", b"x")
    finally:
        s3_proxy.mode = "pass"
    assert store.get("log/1.json") == b"x"


@pytest.mark.slow
def test_missing_credentials_are_denied(s3_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    with pytest.raises(StoreDenied, match="Unable to locate credentials"):
        ObjectStore(s3_url).get("log/1.json")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("status", "code"),
    [
        ("403 Forbidden", "AccessDenied"),
        ("403 Forbidden", "SignatureDoesNotMatch"),
        ("403 Forbidden", "InvalidAccessKeyId"),
        ("400 Bad Request", "ExpiredToken"),
    ],
)
def test_refused_credentials_are_denied(
    monkeypatch: pytest.MonkeyPatch, status: str, code: str
) -> None:
    body = f"<Error><Code>{code}</Code><Message>no entry</Message></Error>".encode()
    with broken(answer(body, status)) as server:
        for name, value in environment(server.url).items():
            monkeypatch.setenv(name, value)
        store = ObjectStore("s3://bucket/prefix", timeout=3)
        for call in (
            lambda: store.get("log/1.json"),
            lambda: store.create("log/1.json", b""),
            lambda: store.list("log/"),
        ):
            with pytest.raises(StoreDenied, match="refuses the credentials"):
                call()


def test_a_folder_without_permission_is_denied(tmp_path: Path) -> None:
    store = ObjectStore(str(tmp_path / "shared"))
    error = PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    with failing("shared.put", error), pytest.raises(StoreDenied, match="Permission denied"):
        store.put("log/1.json", b"")


@pytest.mark.slow
def test_a_bucket_that_does_not_exist_is_not_an_empty_one(s3_url: str) -> None:
    assert s3_url
    store = ObjectStore("s3://nobody-made-this/prefix", timeout=3)
    for call in (lambda: store.get("log/1.json"), lambda: store.list("log/")):
        with pytest.raises(StoreUnreachable, match="bucket does not exist"):
            call()


@pytest.mark.parametrize(
    ("url", "complaint"),
    [
        ("relative/folder", "absolute"),
        ("memory://x", "expected a folder or one of s3://"),
        ("http://host/x", "expected a folder or one of s3://"),
        ("s3://", "s3://bucket/prefix"),
        ("gs://bucket/prefix", "gcsfs"),
        ("az://container/prefix", "adlfs"),
    ],
)
def test_a_store_that_cannot_be_used_is_refused_when_it_is_named(url: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        ObjectStore(url)


@pytest.mark.parametrize("prefix", ["", "file://"])
def test_a_folder_may_be_a_path_or_a_url(tmp_path: Path, prefix: str) -> None:
    ObjectStore(f"{prefix}{tmp_path}/shared").put("log/1.json", b"x")
    assert (tmp_path / "shared" / "log" / "1.json").read_bytes() == b"x"
