"""Two real services on one folder: changes of one hold on both when they return."""

import base64
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from adapters import faults
from adapters.backbone.model import Backbone
from adapters.shared.records import Entry
from service.replicas.catalog import ReplicatedCatalog
from tests.support.http_service import Brake, RunningService, error_of, until
from tests.support.replicas import Cluster, cluster, content, revision_at
from tests.support.tiny_models import make_backbone


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with cluster(tmp_path_factory.mktemp("pair"), "a", "b") as made:
        yield made


def put(live: RunningService, name: str, seed: int, **headers: str) -> httpx.Response:
    url = f"/v1/adapters/{name}?force=true"
    return live.client.put(url, content=content(seed), headers=headers)


@pytest.mark.slow
def test_what_one_replica_changes_the_other_answers_with_when_the_change_returns(
    pair: Cluster,
) -> None:
    a, b = pair["a"], pair["b"]
    first = put(a, "n", 1).json()["revision"]
    assert revision_at(b, "n") == first
    second = put(b, "n", 2).json()["revision"]
    assert revision_at(a, "n") == second
    assert revision_at(a, f"n@{first}") == first
    rolled = a.client.post("/v1/adapters/n/rollback", json={})
    assert rolled.json() == {"name": "n", "revision": first, "created": False, "changed": True}
    assert revision_at(b, "n") == first
    assert b.client.delete(f"/v1/adapters/n/revisions/{second[:12]}").status_code == 204
    assert a.client.get("/v1/adapters/n").json()["revisions"] == [first]
    assert a.client.delete("/v1/adapters/n").status_code == 204
    assert revision_at(b, "n") is None
    assert b.client.get("/v1/adapters").json()["adapters"] == []


def test_the_same_file_again_changes_nothing_and_says_so(pair: Cluster) -> None:
    put(pair["a"], "same", 1)
    before = pair.log().load()[0]
    again = put(pair["b"], "same", 1)
    assert (again.status_code, again.json()["changed"]) == (200, False)
    assert pair.log().load()[0] == before


def test_conditions_hold_whoever_made_the_last_change(pair: Cluster) -> None:
    a, b = pair["a"], pair["b"]
    first = put(a, "c", 1).json()["revision"]
    second = put(b, "c", 2, **{"If-Match": f'"{first}"'}).json()["revision"]
    stale = put(a, "c", 3, **{"If-Match": f'"{first}"'})
    assert (stale.status_code, error_of(stale)["type"]) == (412, "revision_conflict")
    assert put(b, "c", 3, **{"If-None-Match": "*"}).status_code == 412
    labels = b.client.put("/v1/adapters/c", content=content(3))
    assert labels.status_code in (200, 409)
    assert revision_at(a, "c") in (second, labels.json().get("revision"))


@pytest.mark.slow
@pytest.mark.parametrize("headers", [{"If-None-Match": "*"}, {}], ids=["new", "unconditional"])
def test_of_two_committers_of_one_name_both_are_right(
    pair: Cluster, headers: dict[str, str]
) -> None:
    for turn in range(3):
        name = f"race-{len(headers)}-{turn}"
        with ThreadPoolExecutor(2) as threads:
            answers = list(
                threads.map(
                    lambda item, name=name: put(pair[item[1]], name, item[0], **headers),
                    enumerate(("a", "b"), start=turn * 2),
                )
            )
        won = [answer.json()["revision"] for answer in answers if answer.is_success]
        statuses = sorted(answer.status_code for answer in answers)
        # Without a condition the second is made after the first, as in a single service.
        assert statuses == ([201, 412] if headers else [200, 201])
        served = {revision_at(live, name) for live in pair.replicas.values()}
        assert len(served) == 1
        assert served <= set(won)
        listed = pair["a"].client.get(f"/v1/adapters/{name}").json()["revisions"]
        assert sorted(listed) == sorted(won)


@pytest.mark.slow
def test_many_changes_of_many_names_at_once_end_the_same_everywhere(pair: Cluster) -> None:
    with ThreadPoolExecutor(6) as threads:
        answers = list(
            threads.map(lambda turn: put(pair["ab"[turn % 2]], f"many-{turn % 3}", turn), range(12))
        )
    assert {answer.status_code for answer in answers} == {200, 201}
    shown = [
        [live.client.get(f"/v1/adapters/many-{index}").json()["revisions"] for index in range(3)]
        for live in pair.replicas.values()
    ]
    assert shown[0] == shown[1]
    assert [len(revisions) for revisions in shown[0]] == [4, 4, 4]


def test_wait_says_for_which_replicas_a_change_waits(pair: Cluster) -> None:
    a, b = pair["a"], pair["b"]
    for wait in ("none", "one", "all"):
        created = a.client.put(f"/v1/adapters/w?wait={wait}&force=true", content=content(4))
        revision = created.json()["revision"]
        if wait == "all":
            assert revision_at(b, "w") == revision
        if wait == "one":
            assert revision_at(a, "w") == revision
        until(lambda revision=revision: revision_at(b, "w") == revision)  # type: ignore[misc]
        assert a.client.delete(f"/v1/adapters/w?wait={wait}").status_code == 204
        until(lambda: revision_at(b, "w") is None)
    bad = a.client.put("/v1/adapters/w?wait=some", content=content(4))
    assert (bad.status_code, error_of(bad)["type"]) == (422, "invalid_request")


def test_other_protocols_change_all_replicas_too_and_unloading_is_for_one(pair: Cluster) -> None:
    a, b = pair["a"], pair["b"]
    file = base64.b64encode(content(5)).decode()
    body = {"parameters": {"file:adapter.safetensors": file}}
    assert a.client.post("/v2/repository/models/oip/load", json=body).status_code == 200
    assert revision_at(b, "oip") == revision_at(a, "oip")
    form = {"data": {"name": "form"}, "files": {"file": content(6)}}
    assert b.client.post("/v1/adapters", **form).status_code == 201  # type: ignore[arg-type]
    assert revision_at(a, "form") == revision_at(b, "form")
    assert a.client.post("/v2/repository/models/oip/unload").status_code == 200
    unloaded = a.client.post("/v1/predict", json={"adapter": "oip", "inputs": "x"})
    assert error_of(unloaded)["type"] == "adapter_unloaded"
    assert revision_at(b, "oip")
    # A change of another kind leaves it unloaded, and publishing it again brings it back.
    assert put(b, "oip", 7).status_code == 200
    assert revision_at(a, "oip") == revision_at(b, "oip")
    assert a.client.post("/v2/repository/models/oip/unload").status_code == 200
    assert a.client.post("/v2/repository/models/oip/load").status_code == 200
    assert revision_at(a, "oip") == revision_at(b, "oip")


def test_probes_and_metrics_show_the_replica(pair: Cluster) -> None:
    a = pair["a"]
    put(a, "shown", 1)
    details = a.client.get("/readyz").json()["details"]
    assert details["replica"].startswith("a-")
    assert details["shared_store"] == "ok"
    assert "stale_seconds" not in details
    assert a.metric("idspam_replica_lease_held") == 1
    assert a.metric("idspam_follow_ok") == 1
    until(lambda: a.metric("idspam_replica_applied") == pair.log().load()[0])
    assert a.metric("idspam_rollouts_total", outcome="committed") > 0
    assert a.metric("idspam_rollout_seconds_count") > 0


def test_a_change_that_could_not_begin_has_changed_nothing_and_says_so(pair: Cluster) -> None:
    for seed in (1, 2):
        served = put(pair["a"], "cut", seed).json()["revision"]

    def cut(name: str) -> bool:
        if name == "shared.create":
            raise OSError(5, "Input/output error")
        return False

    faults.install(cut)
    try:
        refused = pair["a"].client.post("/v1/adapters/cut/rollback", json={})
    finally:
        faults.install(None)
    assert (refused.status_code, error_of(refused)["type"]) == (503, "store_unreachable")
    assert "nothing has changed: the adapter store" in error_of(refused)["message"]
    assert revision_at(pair["b"], "cut") == served


def test_mistakes_of_clients_are_no_roll_outs_that_failed(pair: Cluster) -> None:
    client = pair["a"].client
    revision = put(pair["a"], "right", 1).json()["revision"]
    failed = pair["a"].metric("idspam_rollouts_total", outcome="failed")
    for answer in (
        client.delete("/v1/adapters/nobody"),
        client.post("/v1/adapters/nobody/rollback", json={}),
        client.post("/v1/adapters/right/rollback", json={"revision": "0123"}),
        client.delete(f"/v1/adapters/right/revisions/{revision}"),
    ):
        assert answer.status_code in (404, 409), answer.text
    assert pair["a"].metric("idspam_rollouts_total", outcome="failed") == failed


def test_a_file_that_a_replica_has_not_yet_is_fetched_for_a_download(pair: Cluster) -> None:
    put(pair["a"], "down", 8)
    for live in pair.replicas.values():
        for file in (live.adapter_dir / "down").iterdir():
            file.unlink()
        assert live.client.get("/v1/adapters/down/file").content == content(8)


@pytest.mark.slow
def test_a_replica_that_comes_later_knows_everything_and_takes_part(pair: Cluster) -> None:
    revision = put(pair["a"], "late", 1).json()["revision"]
    with pair.replica("c") as c:
        assert revision_at(c, "late") == revision
        newer = put(c, "late", 2).json()["revision"]
        assert {revision_at(live, "late") for live in pair.replicas.values()} == {newer}
    # It has left, so nobody waits for it.
    assert not any(state.about["name"] == "c" for state in pair.log().states())
    began = time.monotonic()
    assert put(pair["a"], "late", 3).status_code == 200
    assert time.monotonic() - began < 0.8


@pytest.mark.slow
def test_a_prepare_whose_committer_died_blocks_nobody_and_is_aborted(tmp_path: Path) -> None:
    with cluster(tmp_path, "a", "b", ROLLOUT_SECONDS="1.5") as made:
        a = made["a"]
        first = put(a, "n", 1).json()["revision"]
        number, records = made.log().load()
        dead = Entry(number + 1, "prepare", "of-the-dead", "n", "publish", records["n"], "x", "now")
        assert made.log().append(dead)
        began = time.monotonic()
        newer = put(made["b"], "n", 2).json()["revision"]
        assert time.monotonic() - began < 1
        assert {revision_at(live, "n") for live in made.replicas.values()} == {newer} != {first}

        def aborted() -> bool:
            entries = made.log().read(number)
            return any(item.kind == "abort" and item.change == dead.change for item in entries)

        until(aborted)
        aborts = [item for item in made.log().read(number) if item.kind == "abort"]
        assert len(aborts) == 1
        assert {revision_at(live, "n") for live in made.replicas.values()} == {newer}


class Failing:
    """Loads a backbone whose first layer fails while `failing` is set."""

    def __init__(self) -> None:
        self.failing = threading.Event()

    def load(self) -> Backbone:
        backbone = make_backbone()
        backbone._layers[0].register_forward_pre_hook(lambda *_: self._maybe_fail())
        return backbone

    def _maybe_fail(self) -> None:
        if self.failing.is_set():
            raise RuntimeError("this device is broken")


@pytest.mark.slow
def test_a_replica_that_refuses_stops_the_roll_out_with_its_reason(tmp_path: Path) -> None:
    device = Failing()
    made = Cluster(tmp_path)
    with made.replica("a") as a, made.replica("b", load=device.load) as b:
        first = put(a, "n", 1).json()["revision"]
        device.failing.set()
        refused = put(a, "n", 2)
        assert (refused.status_code, error_of(refused)["type"]) == (409, "rollout_refused")
        assert error_of(refused)["message"].startswith("replica b refuses this revision of ")
        assert "the batch failed" in error_of(refused)["message"]
        assert a.metric("idspam_rollouts_total", outcome="refused") == 1
        assert revision_at(a, "n") == first
        # Who does not wait for others does not hear them.
        assert a.client.put("/v1/adapters/m?wait=one", content=content(3)).status_code == 201
        device.failing.clear()
        assert revision_at(b, "n") == first
        assert put(b, "n", 2).status_code == 200
        assert revision_at(a, "n") == revision_at(b, "n") != first
        kinds = [item.kind for item in made.log().read(0)]
        committed = ["prepare", "commit"]
        assert kinds == [*committed, "prepare", "abort", *committed, *committed]


@pytest.mark.slow
def test_a_replica_that_is_not_ready_in_time_is_named(tmp_path: Path) -> None:
    brake = Brake()
    made = Cluster(tmp_path)
    with made.replica("a", ROLLOUT_SECONDS="2") as a, made.replica("b", load=brake.load) as b:
        first = put(a, "n", 1).json()["revision"]
        brake.on()
        try:
            late = put(a, "n", 2)
        finally:
            brake.off()
        assert (late.status_code, error_of(late)["type"]) == (504, "rollout_timeout")
        assert error_of(late)["message"].endswith("after 2 seconds: b")
        assert revision_at(a, "n") == revision_at(b, "n") == first
        assert put(b, "n", 2).status_code == 200


@pytest.mark.slow
def test_the_zoo_is_registered_once_and_what_was_deleted_stays_so(tmp_path: Path) -> None:
    zoo = tmp_path / "zoo"
    zoo.mkdir()
    for seed, name in enumerate(("one", "two")):
        (zoo / f"{name}.safetensors").write_bytes(content(seed))
    made = Cluster(tmp_path)
    backbones = {name: make_backbone() for name in "abc"}
    with ExitStack() as stack, ThreadPoolExecutor(3) as threads:

        def start(name: str) -> None:
            replica = made.replica(name, load=lambda: backbones[name], ZOO_DIR=str(zoo))
            stack.enter_context(replica)

        list(threads.map(start, backbones))
        assert {entry.name for entry in made.log().read(0)} == {"one", "two"}
        commits = [entry for entry in made.log().read(0) if entry.kind == "commit"]
        assert len(commits) == 2
        for live in made.replicas.values():
            until(lambda live=live: revision_at(live, "one") is not None)  # type: ignore[misc]
        assert made["a"].client.delete("/v1/adapters/two").status_code == 204
        with made.replica("d", ZOO_DIR=str(zoo)) as d:
            assert revision_at(d, "one") is not None
            assert revision_at(d, "two") is None


@pytest.mark.slow
def test_an_object_that_was_altered_is_refused_and_repaired_by_sending_it_again(
    tmp_path: Path,
) -> None:
    made = Cluster(tmp_path)
    with made.replica("a") as a:
        revision = put(a, "n", 1).json()["revision"]
        stored = made.shared / "objects" / f"{revision}.safetensors"
        stored.chmod(0o644)
        stored.write_bytes(stored.read_bytes()[:-8])
        with made.replica("b") as b:
            asked = b.client.post("/v1/predict", json={"adapter": "n", "inputs": "x"})
            assert (asked.status_code, error_of(asked)["type"]) == (500, "adapter_load_failed")
            assert "does not have its hash" in error_of(asked)["message"]
            damaged = b.client.get("/v1/adapters/n/file")
            assert error_of(damaged)["type"] == "adapter_damaged"
            assert revision_at(a, "n") == revision
            assert put(b, "n", 1).status_code == 200
            assert revision_at(b, "n") == revision
            assert b.client.get("/v1/adapters/n/file").content == content(1)


def test_an_object_is_repaired_for_the_replicas_that_found_it_damaged(tmp_path: Path) -> None:
    with cluster(tmp_path, "a", "b") as made:
        a, b = made["a"], made["b"]
        revision = put(a, "n", 1).json()["revision"]
        put(a, "n", 2)
        put(a, "same", 1)
        for stored in [
            made.shared / "objects" / f"{revision}.safetensors",
            *made.root.glob(f"cache-b/*/{revision}.safetensors"),
        ]:
            stored.write_bytes(b"damaged")
        for path in (f"n/file?revision={revision}", "same/file"):
            found = b.client.get(f"/v1/adapters/{path}")
            assert error_of(found)["type"] == "adapter_damaged"
        loaded = b.client.post("/v2/repository/models/same/load")
        assert loaded.status_code == 500, loaded.text
        assert put(a, "same", 1).json()["changed"] is False
        for name in (f"n@{revision}", "same"):
            assert revision_at(b, name) == revision
        assert b.client.get("/v1/adapters/same").json()["state"] == "ready"
        assert b.client.get("/v1/adapters/same/file").content == content(1)


@pytest.mark.slow
def test_clocks_of_other_replicas_mean_nothing(tmp_path: Path) -> None:
    with cluster(tmp_path, "a", "b") as made:
        put(made["a"], "n", 1)
        number, records = made.log().load()
        # By a replica whose clock is fifty years ahead, and one whose clock stands at zero.
        for at in ("2076-01-01T00:00:00Z", "1970-01-01T00:00:00Z"):
            number += 1
            entry = Entry(number, "commit", at, "m", "publish", records["n"], "x", at)
            assert made.log().append(entry)
        until(lambda: revision_at(made["b"], "m") is not None)
        newer = put(made["b"], "m", 2).json()["revision"]
        assert revision_at(made["a"], "m") == newer


def test_a_second_revision_is_tried_on_all_replicas_alike(pair: Cluster) -> None:
    a, b = pair["a"], pair["b"]
    first = put(a, "t", 1).json()["revision"]
    staged = b.client.put("/v1/adapters/t?stage=true&force=true", content=content(2))
    second = staged.json()["revision"]
    assert revision_at(a, "t") == revision_at(b, "t") == first
    assert revision_at(a, f"t@{second}") == second
    divided = a.client.put(
        "/v1/adapters/t/traffic", json={"revision": second, "percent": 100, "shadow": False}
    )
    if divided.status_code == 409:
        # Its labels may differ: then it can only be a shadow.
        divided = a.client.put(
            "/v1/adapters/t/traffic", json={"revision": second, "percent": 100, "shadow": True}
        )
    assert divided.status_code == 200, divided.text
    shown = [live.client.get("/v1/adapters/t/traffic").json() for live in (a, b)]
    for field in ("revision", "baseline", "percent", "shadow", "state"):
        assert shown[0][field] == shown[1][field]
    assert shown[1]["state"] == "active"
    tried = b.client.delete(f"/v1/adapters/t/revisions/{second}")
    assert error_of(tried)["type"] == "revision_tried"
    promoted = b.client.post("/v1/adapters/t/traffic/promote")
    assert promoted.json()["revision"] == second
    assert revision_at(a, "t") == revision_at(b, "t") == second
    for live in (a, b):
        ended = live.client.get("/v1/adapters/t/traffic").json()
        assert (ended["state"], ended["ended"]["cause"]) == ("ended", "promoted")
    assert a.client.delete("/v1/adapters/t/traffic").status_code == 204


@pytest.mark.slow
@pytest.mark.parametrize("change", ["publish", "delete"])
def test_a_load_does_not_undo_what_another_replica_changes_meanwhile(
    change: str, pair: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = pair["a"], pair["b"]
    name, reading, go = f"load-{change}", threading.Event(), threading.Event()
    put(a, name, 1).raise_for_status()
    assert revision_at(b, name) == revision_at(a, name)
    verified = ReplicatedCatalog._verified

    def verify(catalog: ReplicatedCatalog, of: str, revision: str) -> None:
        verified(catalog, of, revision)
        if not reading.is_set():
            reading.set()
            assert go.wait(20)

    monkeypatch.setattr(ReplicatedCatalog, "_verified", verify)
    with ThreadPoolExecutor(1) as pool:
        path = f"/v2/repository/models/{name}/load"
        loading = pool.submit(b.client.post, path, json={}, timeout=30)
        assert reading.wait(20)
        done = put(a, name, 2) if change == "publish" else a.client.delete(f"/v1/adapters/{name}")
        go.set()
        done.raise_for_status()
        assert loading.result().status_code == (200 if change == "publish" else 404)
    assert revision_at(b, name) == revision_at(a, name)
