"""A store that is full, read-only or gone: changes are refused with the reason, nothing stays
behind, and predictions go on from memory."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from adapters.errors import StoreInUse
from adapters.format.files import serialize
from adapters.format.ownership import StoreLock
from adapters.format.store import AdapterStore
from service import local
from service.engine.images import FOLDER
from tests.support.http_service import RunningService, error_of, serve, until
from tests.support.small_disk import fill, make_read_only, make_writable, small_disk
from tests.support.tiny_models import make_adapter, make_backbone


def data(seed: int) -> bytes:
    return serialize(make_adapter(make_backbone(), seed=seed))


@pytest.fixture
def live(tmp_path: Path) -> Iterator[RunningService]:
    """A service on a small disk, which serves the adapter `a`."""
    with small_disk(tmp_path / "disk") as disk, serve(disk / "adapters") as live:
        live.put("a", make_adapter(make_backbone(), seed=1))
        live.put("a", make_adapter(make_backbone(), seed=2))
        yield live


def files(live: RunningService) -> set[Path]:
    """All but images, which are written in the background."""
    folder = live.adapter_dir
    apart = {folder / ".uploads", folder / FOLDER}
    return {
        path
        for path in folder.rglob("*")
        if path not in apart and folder / FOLDER not in path.parents
    }


def changes(live: RunningService, *, deletes: bool = True) -> list[httpx.Response]:
    """Every change of an adapter, tried once; each must be refused."""
    client = live.client
    form = {"data": {"name": "form"}, "files": {"file": data(3)}}
    return [
        client.put("/v1/adapters/a", content=data(3)),
        client.put("/v1/adapters/new", content=data(3)),
        client.post("/v1/adapters", **form),  # type: ignore[arg-type]
        client.post("/v1/adapters/a/rollback", json={}),
        *([client.delete("/v1/adapters/a")] if deletes else []),
    ]


def still_serves(live: RunningService) -> None:
    assert live.predict(adapter="a", inputs="x")["results"]
    assert [item["name"] for item in live.client.get("/v1/adapters").json()["adapters"]] == ["a"]


@pytest.mark.slow
def test_a_full_disk_refuses_uploads_and_leaves_nothing(live: RunningService) -> None:
    filler = fill(live.adapter_dir.parent)
    before = files(live)
    for response in changes(live, deletes=False)[:3]:
        assert response.status_code == 507, response.text
        assert error_of(response)["type"] == "store_failed"
    assert files(live) == before
    still_serves(live)
    filler.unlink()
    assert live.client.put("/v1/adapters/new", content=data(3)).status_code == 201


def test_a_disk_that_is_full_midway_says_so(live: RunningService) -> None:
    """The length was not announced, so only the disk can tell."""
    chunks = (b"x" * 2**18 for _ in range(40))
    response = live.client.put("/v1/adapters/new", content=chunks)
    assert response.status_code == 507
    assert "No space left" in error_of(response)["message"]
    assert not list((live.adapter_dir / ".uploads").iterdir())
    assert live.client.put("/v1/adapters/new", content=data(3)).status_code == 201


def test_an_upload_that_cannot_fit_is_refused_before_its_bytes_come(live: RunningService) -> None:
    response = live.client.put("/v1/adapters/new", content=b"x" * 5 * 2**20)
    assert response.status_code == 507
    assert "bytes free" in error_of(response)["message"]


def test_a_read_only_disk_refuses_every_change(live: RunningService) -> None:
    make_read_only(live.adapter_dir.parent)
    before = files(live)
    for response in changes(live):
        assert response.status_code == 503, response.text
        assert response.headers["retry-after"]
        error = error_of(response)
        assert error["type"] == "store_failed"
        assert "Read-only" in error["message"]
    assert files(live) == before
    still_serves(live)
    assert live.client.get("/v1/adapters/a/file").content == data(2)
    make_writable(live.adapter_dir.parent)
    assert live.client.post("/v1/adapters/a/rollback", json={}).status_code == 200


@pytest.mark.slow
def test_a_removed_store_refuses_every_change_until_it_is_back(live: RunningService) -> None:
    away = live.adapter_dir.with_name("away")
    live.adapter_dir.rename(away)
    for response in [*changes(live), live.client.get("/v1/adapters/a/file")]:
        assert response.status_code == 503, response.text
        error = error_of(response)
        assert error["type"] == "store_failed"
        assert "its folder is gone" in error["message"]
    assert not live.adapter_dir.exists()
    still_serves(live)
    away.rename(live.adapter_dir)
    assert live.client.get("/v1/adapters/a/file").content == data(2)
    assert live.client.post("/v1/adapters/a/rollback", json={}).status_code == 200
    assert live.client.get("/v1/adapters/a").json()["state"] == "ready"


@pytest.mark.slow
def test_readiness_and_metrics_tell_that_the_store_cannot_be_changed(
    live: RunningService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "STORE_SECONDS", 0.05)

    def store() -> str:
        response = live.client.get("/readyz")
        assert response.status_code == 200
        return str(response.json()["details"]["store"])

    # The first interval began before it was made shorter.
    until(lambda: store() == "ok")
    disk, away = live.adapter_dir.parent, live.adapter_dir.with_name("away")
    make_read_only(disk)
    until(lambda: store() == "its file system is read-only")
    assert live.metric("idspam_store_usable") == 0
    make_writable(disk)
    until(lambda: store() == "ok")
    filler = fill(disk)
    until(lambda: store() == "its file system is full")
    assert live.metric("idspam_store_free_bytes") < 2**18
    filler.unlink()
    live.adapter_dir.rename(away)
    until(lambda: store() == "its folder is gone")
    still_serves(live)
    away.rename(live.adapter_dir)
    until(lambda: store() == "ok")
    assert live.metric("idspam_store_usable") == 1


@pytest.mark.slow
def test_a_folder_that_was_replaced_is_served_as_it_is_now(
    live: RunningService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "STORE_SECONDS", 0.05)
    shutil.rmtree(live.adapter_dir)
    AdapterStore(live.adapter_dir).put("b", data(3))

    def names() -> list[str]:
        return [item["name"] for item in live.client.get("/v1/adapters").json()["adapters"]]

    until(lambda: names() == ["b"])
    assert live.predict(adapter="b", inputs="x")["results"]
    # The new folder has an owner again.
    with pytest.raises(StoreInUse):
        StoreLock(live.adapter_dir, "engine").acquire()


@pytest.mark.slow
def test_a_store_that_comes_back_empty_takes_uploads_again(live: RunningService) -> None:
    shutil.rmtree(live.adapter_dir)
    live.adapter_dir.mkdir()
    response = live.client.put("/v1/adapters/a", content=data(3))
    assert response.status_code == 201, response.text
    assert live.client.get("/v1/adapters/a/file").content == data(3)
    assert len(live.client.get("/v1/adapters/a").json()["revisions"]) == 1
