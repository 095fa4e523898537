"""What the service serves of its store and zoo after a start, and how it treats damage."""

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import count
from pathlib import Path

import pytest

from adapters.errors import StoreFailed
from adapters.format.files import serialize
from adapters.format.store import AdapterStore, Revision
from service.catalog import catalog
from service.http.openapi.schemas import AdapterList
from tests.support.http_service import error_of, serve, until
from tests.support.tiny_models import make_adapter, make_backbone


def data(seed: int = 0) -> bytes:
    return serialize(make_adapter(make_backbone(), seed=seed))


@pytest.mark.slow
def test_adapters_are_there_again_after_a_restart(tmp_path: Path) -> None:
    with serve(tmp_path) as live:
        revisions = [live.put("a", make_adapter(make_backbone(), seed=seed)) for seed in (1, 2)]
    with serve(tmp_path) as live:
        assert live.predict(adapter="a", inputs="x")["results"][0]["revision"] == revisions[1]
        old = live.predict(adapter=f"a@{revisions[0]}", inputs="x")["results"][0]
        assert old["revision"] == revisions[0]


def test_files_that_cannot_be_served_are_listed_with_their_reason(tmp_path: Path) -> None:
    store = AdapterStore(tmp_path)
    store.put("foreign", serialize(make_adapter(make_backbone(seed=1))))
    store.put("good", data(1))
    store.put("no-adapter", b"never was one")
    for name in ("rotten", "gone", "pointless"):
        store.put(name, data(2))
    path = store.path("rotten", store.current("rotten"))
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    store.path("gone", store.current("gone")).unlink()
    (tmp_path / "pointless" / "current").write_text("nonsense")
    with serve(tmp_path) as live:
        # That its content is not what its revision says shows when it is read, after the start.
        until(lambda: live.client.get("/v1/adapters/rotten").json()["state"] == "damaged")
        page = AdapterList.model_validate(live.client.get("/v1/adapters").json())
        states = {item.name: item.state for item in page.adapters}
        damaged = ("gone", "no-adapter", "pointless", "rotten")
        assert states == dict.fromkeys(damaged, "damaged") | {
            "foreign": "incompatible",
            "good": "ready",
        }
        assert all(bool(item.reason) == (item.state != "ready") for item in page.adapters)
        foreign = live.client.get("/v1/adapters/foreign").json()
        assert (foreign["backbone"], foreign["spec"]["prompt"]["length"]) == ("tiny-bert-1", 3)
        expected = {"foreign": 409} | dict.fromkeys(damaged, 500)
        for name, status in expected.items():
            response = live.client.post("/v1/predict", json={"adapter": name, "inputs": "x"})
            assert response.status_code == status, name
            reasons = {item.name: item.reason for item in page.adapters}
            assert error_of(response)["message"] == reasons[name]
        assert live.predict(adapter="good", inputs="x")["results"]
        # Uploading the bytes again repairs the damaged file.
        assert live.client.put("/v1/adapters/rotten", content=data(2)).status_code == 200
        assert live.predict(adapter="rotten", inputs="x")["results"]


@pytest.mark.slow
def test_zoo_is_registered_where_it_fits_and_names_are_free(tmp_path: Path) -> None:
    zoo = tmp_path / "zoo"
    zoo.mkdir()
    (zoo / "fits.safetensors").write_bytes(data(1))
    (zoo / "taken.safetensors").write_bytes(data(2))
    (zoo / "foreign.safetensors").write_bytes(serialize(make_adapter(make_backbone(seed=1))))
    (zoo / "Bad Name.safetensors").write_bytes(data(3))
    (zoo / "broken.safetensors").write_bytes(b"x")
    (zoo / "fits.json").write_text("{}")
    mine = AdapterStore(tmp_path / "adapters").put("taken", data(4)).revision
    for _ in range(2):
        with serve(tmp_path / "adapters", ZOO_DIR=str(zoo)) as live:
            listed = live.client.get("/v1/adapters").json()["adapters"]
            assert [item["name"] for item in listed] == ["fits", "taken"]
            assert live.predict(adapter="taken", inputs="x")["results"][0]["revision"] == mine
            assert live.predict(adapter="fits", inputs="x")["results"]


@pytest.mark.slow
def test_a_file_lost_while_serving_fails_its_own_adapter_only(tmp_path: Path) -> None:
    with serve(tmp_path, MAX_ACTIVE_ADAPTERS="1") as live:
        for seed, name in enumerate(("a", "b", "c", "d", "e", "f", "g")):
            live.put(name, make_adapter(make_backbone(), seed=seed))
            live.predict(adapter=name, inputs="x")
        live.service.catalog.path("a")[1].unlink()
        response = live.client.post("/v1/predict", json={"adapter": "a", "inputs": "x"})
        assert response.status_code == 500
        assert error_of(response)["type"] == "adapter_load_failed"
        assert live.predict(adapter="b", inputs="x")["results"]
        body = {"inputs": [{"text": "x", "adapter": name} for name in ("b", "c")]}
        assert live.client.post("/v1/predict", json=body).status_code == 422


@contextmanager
def unreadable(path: Path) -> Iterator[None]:
    """The disk cannot read a file for a while, and its bytes are as they were."""
    aside = path.with_name("aside")
    path.rename(aside)
    # Whoever opens it fails: it leads to itself.
    path.symlink_to(path)
    yield
    aside.replace(path)


def test_a_file_that_cannot_be_read_for_a_while_is_not_damaged(tmp_path: Path) -> None:
    with serve(tmp_path) as live:
        revision = live.put("a", make_adapter(make_backbone()))
        path = AdapterStore(tmp_path).path("a", revision)
        with unreadable(path):
            for response in (
                live.client.post("/v2/repository/models/a/load"),
                live.client.get("/v1/adapters/a/file"),
            ):
                assert response.status_code == 503
            whole = live.service.catalog
            assert isinstance(whole, catalog.Catalog)
            loop = live.service.starting.get_loop()
            asyncio.run_coroutine_threadsafe(whole.verify(), loop).result(10)
            assert live.client.get("/v1/adapters/a").json()["state"] == "ready"
            assert live.predict(adapter="a", inputs="x")["results"]
        assert live.client.post("/v2/repository/models/a/load").status_code == 200
        # One whose bytes have changed is found as before.
        path.write_bytes(path.read_bytes()[:-1] + b"\x01")
        assert live.client.post("/v2/repository/models/a/load").status_code == 500
        assert live.client.get("/v1/adapters/a").json()["state"] == "damaged"


def test_an_entry_that_cannot_be_read_keeps_no_other_from_being_served(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A folder in place of a list, links that lead to themselves; likewise what others own."""
    store, adapter = AdapterStore(tmp_path), serialize(make_adapter(make_backbone()))
    for name in ("good", "folder", "link"):
        store.put(name, adapter)
    (tmp_path / "folder" / "current").unlink()
    (tmp_path / "folder" / "current").mkdir()
    (tmp_path / "link" / "current").rename(tmp_path / "link" / "aside")
    (tmp_path / "link" / "current").symlink_to(tmp_path / "link" / "current")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    bad = {"folder": "Is a directory", **dict.fromkeys(("link", "loop"), "Too many levels")}
    with serve(tmp_path) as live:
        listed = live.client.get("/v1/adapters").json()["adapters"]
        assert {item["name"] for item in listed} == {"good", *bad}
        for item in listed:
            assert item["state"] == ("damaged" if item["name"] in bad else "ready")
            assert bad.get(item["name"], "") in (item["reason"] or "")
        assert live.predict(adapter="good", inputs="x")["results"]
    for name in bad:
        assert f"{tmp_path / name} cannot be cleaned" in caplog.text


@pytest.mark.slow
def test_a_disk_that_fails_after_a_change_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures = count()
    last = 2
    read = AdapterStore.revisions

    def revisions(store: AdapterStore, name: str) -> list[Revision]:
        if next(failures) < last:
            raise StoreFailed("the adapter store cannot be read: Input/output error")
        return read(store, name)

    with serve(tmp_path) as live:
        live.put("a", make_adapter(make_backbone(), seed=1))
        monkeypatch.setattr(AdapterStore, "revisions", revisions)
        second = live.put("a", make_adapter(make_backbone(), seed=2))
        assert live.predict(adapter="a", inputs="x")["results"][0]["revision"] == second
        # One that stays is said, and what was served is served on until it is over.
        last = 10**9
        third = serialize(make_adapter(make_backbone(), seed=3))
        response = live.client.put("/v1/adapters/a?force=true", content=third)
        assert error_of(response)["type"] == "store_failed"
        assert live.predict(adapter="a", inputs="x")["results"][0]["revision"] == second
        monkeypatch.undo()
        response = live.client.put("/v1/adapters/a?force=true", content=third)
        assert response.json()["revision"] != second
        assert live.predict(adapter="a", inputs="x")["results"][0]["revision"] != second


def test_a_name_that_cannot_be_read_at_the_start_says_so_and_comes_back(tmp_path: Path) -> None:
    store = AdapterStore(tmp_path)
    path = store.path("a", store.put("a", data(1)).revision)
    store.put("b", data(2))
    with unreadable(path), serve(tmp_path) as live:
        response = live.client.post("/v1/predict", json={"adapter": "a", "inputs": "x"})
        assert error_of(response)["type"] == "store_failed"
        assert live.predict(adapter="b", inputs="x")["results"]
        path.unlink()
        path.write_bytes(data(1))
        assert live.client.post("/v2/repository/models/a/load").status_code == 200
        assert live.predict(adapter="a", inputs="x")["results"]


@pytest.mark.slow
def test_memory_holds_what_is_served_however_many_revisions_there_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(catalog, "_RETIRED_SECONDS", 0.1)
    with serve(tmp_path, KEPT_REVISIONS="3") as live:

        def hold(adapters: int) -> None:
            for tier in ("registered", "active"):
                size = partial(live.metric, "idspam_tier_adapters", tier=tier)
                until(lambda size=size: size() == adapters)  # type: ignore[misc]

        def publish(name: str, seed: int) -> str:
            revision = live.put(name, make_adapter(make_backbone(), seed=seed))
            assert live.predict(adapter=name, inputs="x")["results"][0]["revision"] == revision
            return revision

        # Replaced: the oldest revisions leave the store, and memory.
        revisions = [publish(name, seed) for name in "abc" for seed in range(5)]
        hold(9)
        assert live.client.delete(f"/v1/adapters/a/revisions/{revisions[3]}").status_code == 204
        hold(8)
        assert live.client.delete("/v1/adapters/a").status_code == 204
        hold(6)
        assert live.client.post("/v2/repository/models/b/unload").status_code == 200
        hold(3)
        # What comes back is loaded again, from the store.
        assert live.client.post("/v2/repository/models/b/load").status_code == 200
        assert live.predict(adapter="b", inputs="x")["results"][0]["revision"] == revisions[9]
        hold(4)


@pytest.mark.slow
def test_a_revision_that_comes_back_at_once_stays_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(catalog, "_RETIRED_SECONDS", 0.1)
    with serve(tmp_path) as live:
        loads = partial(live.metric, "idspam_adapter_loads_total", tier="registered")
        for _ in range(3):
            live.put("a", make_adapter(make_backbone()))
            live.client.delete("/v1/adapters/a")
        live.put("a", make_adapter(make_backbone()))
        # Its own load may come after the answer of the upload; a prediction waits for it.
        live.predict(adapter="a", inputs="x")
        before = loads()
        # Longer than the time after which the deleted one would have left.
        live.put("b", make_adapter(make_backbone(), seed=1))
        until(lambda: loads() == before + 1)
        time.sleep(0.2)
        live.predict(adapter="a", inputs="x")
        assert loads() == before + 1
