"""Load and unload: what is unloaded is not served, anywhere, until it is loaded or published."""

import base64
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from adapters.backbone.model import Backbone
from adapters.errors import DamagedFile, UnknownAdapter, UnloadedAdapter
from adapters.format.files import serialize
from adapters.format.store import AdapterStore
from tests.support.http_service import Brake, RunningService, error_of, serve, until
from tests.support.ipc_harness import ANY, data, engine_with_workers
from tests.support.tiny_models import make_adapter, make_backbone

UNLOADED = "adapter 'a' is unloaded: load it, or publish it again"


@pytest.fixture
def live(tmp_path: Path) -> Iterator[RunningService]:
    with serve(tmp_path, MAX_UPLOAD_BYTES="30000") as running:
        for name in "ab":
            running.put(name, make_adapter(make_backbone(), seed=ord(name)))
        yield running


def change(live: RunningService, name: str, verb: str, **options: Any) -> httpx.Response:
    return live.client.post(f"/v2/repository/models/{name}/{verb}", **options)


def index(live: RunningService, **asked: bool) -> dict[str, tuple[str, str]]:
    lines = live.client.post("/v2/repository/index", json=asked).json()
    assert all(list(item) == ["name", "version", "state", "reason"] for item in lines)
    return {item["name"]: (item["state"], item["reason"]) for item in lines}


def upload(live: RunningService, name: str, *files: bytes, **parameters: Any) -> httpx.Response:
    encoded = {
        f"file:1/{number}.safetensors": base64.b64encode(content).decode()
        for number, content in enumerate(files)
    }
    return change(live, name, "load", json={"parameters": encoded | parameters})


def test_an_unloaded_adapter_is_served_nowhere_and_comes_back(live: RunningService) -> None:
    revision = live.service.catalog.entry("a").current
    assert live.client.post("/v2/repository/index").status_code == 200
    assert index(live) == {"a": ("READY", ""), "b": ("READY", "")}
    # As KServe's controller and as Triton's client; doing it again changes nothing.
    assert change(live, "a", "unload").json() == {"name": "a", "unload": True}
    body = {"parameters": {"unload_dependents": False}}
    assert change(live, "a", "unload", json=body).status_code == 200
    assert index(live) == {"a": ("UNAVAILABLE", UNLOADED), "b": ("READY", "")}
    assert index(live, ready=True) == {"b": ("READY", "")}
    assert live.client.get("/v2/models").json() == {"models": ["b"]}
    ready = live.client.get("/v2/models/a/ready")
    assert ready.json() == {"name": "a", "ready": False, "error": UNLOADED}
    assert ready.status_code == 400
    tensor = {"name": "text", "shape": [1], "datatype": "BYTES", "data": ["x"]}
    asked = {"inputs": [tensor]}
    for path in ("/v2/models/a", f"/v2/models/a/versions/{revision}"):
        answer = live.client.post(f"{path}/infer", json=asked)
        assert (answer.status_code, answer.json()) == (409, {"error": UNLOADED})
        assert live.client.get(path).status_code == 409
    native = live.client.post("/v1/predict", json={"adapter": "a", "inputs": "x"})
    assert native.status_code == 409
    assert error_of(native)["type"] == "adapter_unloaded"
    shown = live.client.get("/v1/adapters/a").json()
    assert (shown["state"], shown["reason"], shown["revision"]) == ("unloaded", UNLOADED, revision)
    assert live.client.get("/v1/adapters/a/file").status_code == 200
    rollback = live.client.post("/v1/adapters/a/rollback", json={"revision": revision})
    assert error_of(rollback)["type"] == "adapter_unloaded"
    assert live.predict(adapter="b", inputs="x")["results"]
    assert change(live, "a", "load").json() == {"name": "a", "load": True}
    assert index(live)["a"] == ("READY", "")
    assert live.predict(adapter="a", inputs="x")["results"][0]["revision"] == revision


@pytest.mark.slow
def test_requests_that_were_taken_are_answered_after_an_unload(tmp_path: Path) -> None:
    brake = Brake()
    with serve(tmp_path, load=brake.load) as slow, ThreadPoolExecutor(2) as others:
        slow.put("a", make_adapter(make_backbone()))
        brake.on()
        try:
            running = others.submit(slow.predict, adapter="a", inputs="x")
            until(lambda: brake.holds)
            waiting = others.submit(slow.predict, adapter="a", inputs="x")
            until(lambda: slow.service.health().details["waiting_entries"] == 1)
            assert change(slow, "a", "unload").status_code == 200
            refused = slow.client.post("/v1/predict", json={"adapter": "a", "inputs": "x"})
            assert refused.status_code == 409
        finally:
            brake.off()
        assert running.result()["results"] == waiting.result()["results"]


@pytest.mark.slow
def test_publishing_loads_deleting_works_and_a_restart_forgets(tmp_path: Path) -> None:
    with serve(tmp_path) as live:
        for name in "abc":
            live.put(name, make_adapter(make_backbone(), seed=1))
            change(live, name, "unload")
        before = live.series().keys()
        # The same bytes and others: both are published.
        live.put("a", make_adapter(make_backbone(), seed=1))
        live.put("b", make_adapter(make_backbone(), seed=2))
        assert index(live, ready=True).keys() == {"a", "b"}
        assert {key for key in before if "adapter" in dict(key[1])} <= live.series().keys()
        old = live.service.catalog.entry("b").revisions[1].revision
        assert live.predict(adapter=f"b@{old}", inputs="x")["results"]
        change(live, "b", "unload")
        assert live.client.delete("/v1/adapters/b").status_code == 204
        assert index(live).keys() == {"a", "c"}
    with serve(tmp_path) as live:
        assert index(live) == {"a": ("READY", ""), "c": ("READY", "")}


def test_loading_reads_the_store_again(live: RunningService) -> None:
    store = AdapterStore(live.adapter_dir)
    other = store.put("a", serialize(make_adapter(make_backbone(), seed=7))).revision
    assert change(live, "a", "load").status_code == 200
    assert live.predict(adapter="a", inputs="x")["results"][0]["revision"] == other
    path = store.path("a", other)
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    refused = change(live, "a", "load")
    assert refused.status_code == 500
    assert list(refused.json()) == ["error"]
    assert index(live)["a"][0] == "UNAVAILABLE"
    store.put("b", serialize(make_adapter(make_backbone(seed=1))))
    assert "made for another backbone" in change(live, "b", "load").json()["error"]


@pytest.mark.slow
def test_a_file_that_comes_along_is_published(live: RunningService) -> None:
    good = serialize(make_adapter(make_backbone(), seed=3))
    assert upload(live, "new", good, config="{}").json() == {"name": "new", "load": True}
    assert live.predict(adapter="new", inputs="x")["results"]
    assert live.client.get("/v1/adapters/new/file").content == good
    change(live, "a", "unload")
    assert upload(live, "a", good).status_code == 200
    assert live.predict(adapter="a", inputs="x")["results"]
    assert live.metric("idspam_uploads_total", outcome="created") >= 3
    state = index(live)
    for name, files, parameters, status, fault in (
        ("new", [b"\x08\x07"], {}, 400, "not a valid adapter"),
        ("new", [good, good], {}, 400, "2 files, an adapter is one"),
        ("new", [b"\0" * 30_001], {}, 413, "larger than 30000 bytes"),
        ("new", [b"\0" * 90_000], {}, 413, "larger than"),
        ("A b", [good], {}, 400, "adapter name 'A b'"),
        ("new", [], {"file:x": "not base64!"}, 400, "parameters.file:x: not base64"),
        ("new", [], {"file:x": "é"}, 400, "parameters.file:x: not base64"),
        ("new", [], {"file:x": 7}, 400, "parameters.file:x: not base64"),
        ("new", [], {"config": "{}"}, 400, "parameters.config: an adapter has none"),
        ("new", [], {"x": [{}] * 20_000}, 400, "far more fields"),
    ):
        answer = upload(live, name, *files, **parameters)
        assert answer.status_code == status, answer.text
        assert fault in answer.json()["error"]
    assert index(live) == state


def test_what_is_unknown_is_404_and_what_is_no_request_400(live: RunningService) -> None:
    for verb in ("load", "unload"):
        for name in ("c", "A b", "a@00"):
            answer = change(live, name, verb)
            assert answer.status_code == 404
            assert answer.json()["error"].endswith("known: a, b")
        for content, kind in ((b"[]", 400), (b"{", 400), (b'{"parameters": 7}', 400)):
            assert change(live, "a", verb, content=content).status_code == kind
        origin = {"Origin": "http://elsewhere"}
        assert change(live, "a", verb, content=b"{}", headers=origin).status_code == 403
    assert live.client.post("/v2/repository/index", content=b"7").status_code == 400
    assert index(live) == {"a": ("READY", ""), "b": ("READY", "")}


def test_load_and_unload_ask_for_an_admin_key(tmp_path: Path) -> None:
    with serve(tmp_path, API_KEYS="user", ADMIN_KEYS="admin") as locked:
        admin, user = ({"X-API-Key": key} for key in ("admin", "user"))
        locked.put("a", make_adapter(make_backbone()), **admin)
        for verb in ("unload", "load"):
            assert change(locked, "a", verb).status_code == 401
            refused = change(locked, "a", verb, headers=user)
            assert refused.status_code == 403
            assert "needs a key with the scope adapters:write" in refused.json()["error"]
            assert locked.service.catalog.entry("a").state == "ready"
        assert change(locked, "a", "unload", headers=admin).status_code == 200
        assert locked.service.catalog.entry("a").state == "unloaded"
        path = "/v2/repository/index"
        assert locked.client.post(path, headers=user).status_code == 200
        assert locked.client.post(path).status_code == 401


async def test_unload_and_load_hold_in_every_worker_when_they_return(
    tmp_path: Path, backbone: Backbone
) -> None:
    async with engine_with_workers(backbone, tmp_path) as engine:
        workers = [await engine.worker() for _ in range(3)]
        first = await workers[0].catalog.publish("a", data(backbone, 1), ANY)
        for turn in range(6):
            await workers[turn % 3].catalog.unload("a")
            late = await engine.worker() if turn == 0 else workers[0]
            for worker in (*workers, late):
                assert worker.catalog.entry("a").state == "unloaded"
                with pytest.raises(UnloadedAdapter, match="unloaded"):
                    worker.catalog.resolve("a")
            assert await workers[(turn + 1) % 3].catalog.reload("a") == first.revision
            for worker in (*workers, late):
                assert worker.catalog.resolve("a").key.revision == first.revision
        with pytest.raises(UnknownAdapter):
            await workers[0].catalog.unload("b")
        with pytest.raises(UnknownAdapter):
            await workers[0].catalog.reload("b")
        path = workers[0].catalog.path("a")[1]
        path.write_bytes(b"rotten")
        with pytest.raises(DamagedFile):
            await workers[1].catalog.reload("a")
        assert {worker.catalog.entry("a").state for worker in workers} == {"damaged"}
