"""Replicas that cannot reach their store: what they answer, and that nothing stale is among it."""

import asyncio
import shutil
import threading
import time
from pathlib import Path

import httpx
import pytest

from adapters.errors import AdapterError
from adapters.format.durable import write_atomically
from adapters.format.store import AdapterStore
from adapters.shared.log import SharedLog
from adapters.shared.objects import ObjectStore
from adapters.shared.records import Entry, LogState, ReplicaState, decode
from service.engine.observer import Observer
from service.local import local_backend
from service.replicas import catalog as replicated
from service.settings import InvalidSettings, read_settings
from service.start import StartFailed
from tests.support.http_service import RunningService, error_of, until
from tests.support.replicas import LEASE_SECONDS, Asking, Cluster, cluster, content, revision_at
from tests.support.tiny_models import make_backbone


def put(live: RunningService, seed: int, query: str = "") -> httpx.Response:
    return live.client.put(f"/v1/adapters/n?force=true{query}", content=content(seed))


@pytest.mark.slow
def test_a_replica_that_is_cut_off_stops_answering_before_a_change_returns(tmp_path: Path) -> None:
    with cluster(tmp_path, "a", "b") as made:
        a, b = made["a"], made["b"]
        old = put(a, 1).json()["revision"]
        id_before = b.client.get("/readyz").json()["details"]["replica"]
        with Asking(b.url, "n") as asking:
            made.cut("b")
            began = time.monotonic()
            new = put(a, 2).json()["revision"]
            returned = time.monotonic()
            # It is waited for until its lease must be over, and no longer.
            assert LEASE_SECONDS * 0.7 < returned - began < LEASE_SECONDS * 3
            time.sleep(0.3)
            assert set(asking.since(returned)) == {503}
            # Until then it has answered as before.
            assert old in asking.since(began)
            refused = b.client.post("/v1/predict", json={"adapter": "n", "inputs": "x"})
            assert error_of(refused)["type"] == "lease_expired"
            assert refused.headers["Retry-After"]
            ready = b.client.get("/readyz")
            assert ready.status_code == 503
            assert "lease is over" in ready.json()["reason"]
            assert b.metric("idspam_replica_lease_held") == 0
            assert b.metric("idspam_follow_ok") == 0
            # A change does not wait for it again, and it can make none.
            began = time.monotonic()
            assert put(a, 1).json()["revision"] == old
            assert time.monotonic() - began < LEASE_SECONDS * 0.7
            assert error_of(put(b, 2))["type"] == "lease_expired"
            assert put(a, 2).json()["revision"] == new
            mended = time.monotonic()
            made.mend("b")
            until(lambda: b.client.get("/readyz").status_code == 200)
            until(lambda: new in asking.since(mended))
        assert set(asking.since(mended)) == {503, new}
        assert b.client.get("/readyz").json()["details"]["replica"] != id_before
        assert put(b, 3).status_code == 200
        assert revision_at(a, "n") == revision_at(b, "n") != new


@pytest.mark.slow
def test_a_short_outage_is_not_noticed(tmp_path: Path) -> None:
    with cluster(tmp_path, "a", "b", LEASE_SECONDS="3") as made:
        old = put(made["a"], 1).json()["revision"]
        with Asking(made["b"].url, "n") as asking:
            made.cut("b")
            time.sleep(1.0)
            made.mend("b")
            new = put(made["a"], 2).json()["revision"]
            returned = time.monotonic()
            time.sleep(0.2)
        assert {answer for _, answer in asking.answers} == {old, new}
        assert set(asking.since(returned)) == {new}


@pytest.mark.slow
def test_with_stale_serve_a_replica_goes_on_answering_and_says_so(tmp_path: Path) -> None:
    with cluster(tmp_path, "a", "b", STALE="serve") as made:
        a, b = made["a"], made["b"]
        old = put(a, 1).json()["revision"]
        made.cut("b")
        new = put(a, 2).json()["revision"]
        time.sleep(0.2)
        assert revision_at(b, "n") == old
        ready = b.client.get("/readyz")
        assert ready.status_code == 200
        assert ready.json()["details"]["stale_seconds"] >= LEASE_SECONDS
        assert "cannot" in ready.json()["details"]["shared_store"]
        assert b.metric("idspam_replica_lease_held") == 0
        refused = put(b, 3)
        assert (refused.status_code, error_of(refused)["type"]) == (503, "store_unreachable")
        for seed in (4, 5, 6):
            new = put(a, seed).json()["revision"]
        made.mend("b")
        until(lambda: revision_at(b, "n") == new)
        # What was replaced meanwhile is not fetched.
        until(lambda: len(b.client.get("/v1/adapters/n").json()["revisions"]) == 5)
        files = {path.stem for path in made.root.glob("cache-b/n/*.safetensors")}
        assert files == {old, new}


@pytest.mark.slow
def test_with_stale_serve_a_replica_starts_from_what_it_knew_last(tmp_path: Path) -> None:
    made = Cluster(tmp_path)
    with made.replica("a", STALE="serve") as a:
        old = put(a, 1).json()["revision"]
    with made.replica("b") as b:
        new = put(b, 2).json()["revision"]
        with made.replica("a", cut=True, STALE="serve") as a:
            assert revision_at(a, "n") == old
            assert "stale_seconds" in a.client.get("/readyz").json()["details"]
            assert error_of(put(a, 3))["type"] == "store_unreachable"
            made.mend("a")
            until(lambda: revision_at(a, "n") == new)
            assert put(a, 3).status_code == 200
            assert revision_at(a, "n") == revision_at(b, "n")


def test_what_a_replica_knows_is_kept_after_a_slow_and_after_a_failed_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    faults: list[str] = []
    slow = threading.Event()

    def write(path: Path, data: bytes) -> None:
        fault = faults.pop() if path.name.startswith(".known") and faults else ""
        if fault == "full":
            raise OSError(28, "No space left on device")
        if fault == "slow":
            time.sleep(0.4)
        write_atomically(path, data)
        if fault == "slow":
            slow.set()

    monkeypatch.setattr(replicated, "write_atomically", write)
    monkeypatch.setattr(replicated, "_SAVED_SECONDS", 0.02)
    with cluster(tmp_path, "a", STALE="serve") as made:
        a = made["a"]

        def known() -> str | None:
            for path in made.root.glob("cache-a/.known-*.json"):
                state = decode(LogState, path.name, path.read_bytes())
                return state.names["n"].current if "n" in state.names else None
            return None

        first = put(a, 1).json()["revision"]
        until(lambda: known() == first)
        faults.append("slow")
        put(a, 2)
        until(lambda: not faults)
        newest = put(a, 3).json()["revision"]
        assert slow.wait(5)
        until(lambda: known() == newest)
        faults.append("full")
        newest = put(a, 4).json()["revision"]
        until(lambda: known() == newest)
        assert not faults


@pytest.mark.slow
def test_the_state_of_a_replica_that_died_is_waited_for_once(tmp_path: Path) -> None:
    with cluster(tmp_path, "a", "b") as made:
        put(made["a"], 1)
        made.log().write_state(ReplicaState("dead-1", 7, 0, lease_seconds=LEASE_SECONDS))
        began = time.monotonic()
        assert put(made["a"], 2).status_code == 200
        assert LEASE_SECONDS < time.monotonic() - began < LEASE_SECONDS * 3
        assert "dead-1" not in {state.id for state in made.log().states()}
        began = time.monotonic()
        assert put(made["b"], 3).status_code == 200
        assert time.monotonic() - began < LEASE_SECONDS


@pytest.mark.slow
def test_an_entry_of_a_newer_version_stops_a_replica_until_it_is_upgraded(tmp_path: Path) -> None:
    with cluster(tmp_path, "a") as made:
        a = made["a"]
        put(a, 1)
        number, records = made.log().load()
        entry = Entry(number + 1, "commit", "x", "n", "publish", records["n"], "x", "now")
        assert made.log().append(entry)
        path = made.shared / "log" / f"{number + 2:012}.json"
        newer = (made.shared / "log" / f"{number + 1:012}.json").read_text()
        path.write_text(newer.replace('{"format":1,', '{"format":99,'))
        until(lambda: a.client.get("/readyz").status_code == 503)
        assert "has format 99" in a.client.get("/readyz").json()["reason"]
        path.unlink()
        until(lambda: a.client.get("/readyz").status_code == 200)


def start_error(folder: Path, store: Path | str, **settings: str) -> str:
    """Why a replica does not start."""
    environ = {"ADAPTER_DIR": str(folder / "cache"), "ZOO_DIR": "off", "ADAPTER_STORE": str(store)}
    environ |= settings

    async def start() -> str:
        read = read_settings({f"IDSPAM_{key}": value for key, value in environ.items()})
        try:
            backend = local_backend(read, Observer(), load=lambda: make_backbone(seed=1))
        except StartFailed as error:
            return str(error)
        try:
            await backend.start()
        except (AdapterError, OSError) as error:
            return str(error)
        finally:
            await backend.stop()
        return "it started"

    return asyncio.run(start())


async def test_a_replica_that_is_stopped_twice_leaves_once(tmp_path: Path) -> None:
    values = {"ADAPTER_DIR": str(tmp_path / "cache"), "ZOO_DIR": "off"}
    values["ADAPTER_STORE"] = str(tmp_path / "shared")
    read = read_settings({f"IDSPAM_{key}": value for key, value in values.items()})
    backend = local_backend(read, Observer(), load=lambda: make_backbone(seed=1))
    await backend.start()
    log = SharedLog(ObjectStore(str(tmp_path / "shared")))
    assert len(log.states()) == 1
    await backend.stop()
    await backend.stop()
    assert log.states() == []


def test_what_keeps_a_replica_from_starting_is_named(tmp_path: Path) -> None:
    missing = tmp_path / "not" / "there"
    assert str(missing) in start_error(tmp_path, missing)
    assert start_error(tmp_path, "ftp://host/x").startswith("IDSPAM_ADAPTER_STORE: 'ftp://host/x'")
    assert "must be absolute" in start_error(tmp_path, "relative/folder")
    shared = tmp_path / "shared"
    SharedLog(ObjectStore(str(shared))).open(make_backbone().identity)
    other = start_error(tmp_path, shared)
    assert "belongs to replicas of the backbone tiny-bert-0" in other
    assert "tiny-bert-1" in other
    newer = (shared / "cluster.json").read_text().replace('{"format":1,', '{"format":2,')
    (shared / "cluster.json").write_text(newer)
    assert "has format 2" in start_error(tmp_path, shared)
    # With nothing cached there is nothing to serve either.
    assert str(missing) in start_error(tmp_path, missing, STALE="serve")


def test_a_store_that_is_suddenly_another_one_is_not_taken(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    assert start_error(tmp_path, shared) == "it started"
    assert start_error(tmp_path, shared) == "it started"
    shared.rename(tmp_path / "unmounted")
    refused = start_error(tmp_path, shared)
    assert f"the adapter store {shared} is another one than at the last start" in refused
    shutil.rmtree(tmp_path / "cache")
    assert start_error(tmp_path, shared) == "it started"


def test_a_folder_with_the_adapters_of_a_single_service_is_not_taken_for_a_cache(
    tmp_path: Path,
) -> None:
    AdapterStore(tmp_path / "cache").put("mine", content(1))
    refused = start_error(tmp_path, tmp_path / "shared")
    assert refused.startswith(f"IDSPAM_ADAPTER_DIR: {tmp_path / 'cache'} has the adapters of")
    assert AdapterStore(tmp_path / "cache").names() == ["mine"]


@pytest.mark.parametrize(
    ("settings", "faulty"),
    [
        ({"ADAPTER_STORE": "s3://"}, "ADAPTER_STORE"),
        ({"REPLICA": "a b"}, "REPLICA"),
        ({"FOLLOW_SECONDS": "0"}, "FOLLOW_SECONDS"),
        ({"LEASE_SECONDS": "nan"}, "LEASE_SECONDS"),
        ({"ROLLOUT_SECONDS": "0"}, "ROLLOUT_SECONDS"),
        ({"STALE": "perhaps"}, "STALE"),
        ({"CACHE_MIB": "0"}, "CACHE_MIB"),
        ({"ADAPTER_STORE": "/s", "LEASE_SECONDS": "1", "FOLLOW_SECONDS": "0.3"}, "LEASE_SECONDS"),
        ({"ADAPTER_STORE": "/s", "ADAPTER_DIR": "/s"}, "ADAPTER_STORE"),
    ],
)
def test_bad_settings_of_replicas_are_named(settings: dict[str, str], faulty: str) -> None:
    with pytest.raises(InvalidSettings) as refused:
        read_settings({f"IDSPAM_{key}": value for key, value in settings.items()})
    assert refused.value.faults[0].startswith(f"IDSPAM_{faulty}: ")
    assert len(refused.value.faults) == 1
