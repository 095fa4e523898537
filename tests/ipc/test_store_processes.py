"""The store under real processes: kill -9 at steps of a change, and two services on one folder."""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from adapters.backbone.model import Backbone
from adapters.format.files import serialize
from tests.support.service_process import (
    TREE,
    ReadyService,
    body_of,
    environ,
    ready_service,
    until,
)
from tests.support.tiny_models import make_adapter

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]


@dataclass(frozen=True)
class Stage:
    """A service with two workers that is killed wherever its file of faults says."""

    service: ReadyService
    faults: Path
    files: list[bytes]

    def client(self) -> httpx.Client:
        return httpx.Client(base_url=self.service.url, timeout=30)

    def state(self) -> list[str]:
        """The revisions of `a` as the service has them, the served one first."""
        with self.client() as client:
            shown = client.get("/v1/adapters/a")
            if shown.status_code == 404:
                return []
            assert shown.status_code == 200, shown.text
            answer = client.post("/v1/predict", json=body_of("a", "x")).json()
        revisions: list[str] = shown.json()["revisions"]
        assert answer["results"][0]["revision"] == revisions[0]
        return revisions

    def stored(self) -> set[str]:
        """Everything in the store's folder, but for what the service holds, who did what, and
        images, which are written in the background."""
        root = self.service.adapter_dir
        others = (".service.lock", ".engine.lock", "audit.jsonl", "audit-refused.jsonl", "events")
        return {
            str(path.relative_to(root))
            for path in root.rglob("*")
            if path.is_file() and path.suffix != ".image" and path.name not in others
        }

    def killed(self, victim: str, points: list[str], change: Callable[[httpx.Client], Any]) -> None:
        """Make a change while the victim is killed at the first of these points that it passes."""
        before = self.service.children()
        written = self.faults.with_suffix(".new")
        written.write_text("".join(f"{point} kill\n" for point in points))
        written.replace(self.faults)
        with self.client() as client, suppress(httpx.TransportError):
            response = change(client)
            assert response.status_code == 503, (points, response.text)
        self.faults.unlink()
        until(lambda: victim not in before or self.service.children().get(victim) != before[victim])
        until(self.ready)

    def ready(self) -> bool:
        """Whether both workers are."""
        with suppress(httpx.TransportError):
            return all(httpx.get(f"{self.service.url}/readyz").status_code == 200 for _ in range(6))
        return False


@pytest.fixture(scope="module")
def stage(
    folder: Path, saved: Backbone, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Stage]:
    place = tmp_path_factory.mktemp("s")
    faults = place / "faults"
    files = [serialize(make_adapter(saved, seed=seed)) for seed in range(3)]
    with ready_service(folder, place, faults=str(faults), KEPT_REVISIONS="2") as service:
        yield Stage(service, faults, files)


# What is done to an adapter with two revisions, and points that the engine passes. Every point of
# the store is tried in tests/adapters/test_store_crashes.py; these are those that change a name.
CHANGES: dict[str, tuple[Callable[[Stage, httpx.Client, list[str]], Any], list[str]]] = {
    "publish and prune": (
        lambda stage, client, _: client.put("/v1/adapters/a", content=stage.files[2]),
        ["revision.rename", "file.rename", "revision.remove"],
    ),
    "publish a new name": (
        lambda stage, client, _: client.put("/v1/adapters/b", content=stage.files[2]),
        ["name.create"],
    ),
    "roll back": (
        lambda _stage, client, _: client.post("/v1/adapters/a/rollback", json={}),
        ["file.rename", "folder.sync"],
    ),
    "delete a revision": (
        lambda _stage, client, revisions: client.delete(f"/v1/adapters/a/revisions/{revisions[1]}"),
        ["revision.remove"],
    ),
    "delete": (
        lambda _stage, client, _: client.delete("/v1/adapters/a"),
        ["name.rename", "name.remove"],
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_kill_of_the_engine_at_any_step_leaves_the_state_before_or_after(
    stage: Stage, name: str
) -> None:
    change, points = CHANGES[name]
    for point in points:
        with stage.client() as client:
            client.delete("/v1/adapters/a")
            client.delete("/v1/adapters/b")
            for content in stage.files[:2]:
                assert client.put("/v1/adapters/a", content=content).is_success
        before = stage.state()
        stage.killed("engine", [point], lambda client, b=before: change(stage, client, b))  # type: ignore[misc]
        after = stage.state()
        # The service has what its store has, no more and no less.
        expected = {f"a/{revision}.safetensors" for revision in after}
        expected |= {"a/current", ".locks/a"} if after else set()
        with stage.client() as client:
            has_b = client.get("/v1/adapters/b").status_code == 200
        assert stage.stored() == expected, point
        assert not has_b
        # The same change still works, and ends as it would have.
        with stage.client() as client:
            response = change(stage, client, before)
        if after == before:
            assert response.is_success, (point, response.text)
        else:
            assert response.status_code in (200, 404), (point, response.text)


def test_the_upload_of_a_killed_worker_is_removed_by_the_next_one(stage: Stage) -> None:
    with stage.client() as client:
        client.put("/v1/adapters/a", content=stage.files[0])
    for point in ("upload.create", "upload.write", "upload.remove"):
        before = stage.state()
        stage.killed("none", [point], lambda c: c.put("/v1/adapters/a", content=stage.files[1]))
        with stage.client() as client:
            assert client.put("/v1/adapters/a", content=stage.files[0]).is_success
            assert not list((stage.service.adapter_dir / ".uploads").iterdir())
            assert client.post("/v1/predict", json=body_of("a", "x")).status_code == 200
        assert set(stage.state()) >= set(before[:1])


def test_changes_are_logged_and_recorded_with_their_requests_id(stage: Stage) -> None:
    with stage.client() as client:
        client.headers["X-Request-ID"] = "of-this-test"
        assert client.put("/v1/adapters/c", content=stage.files[0]).status_code == 201
        assert client.delete("/v1/adapters/c").status_code == 204
    lines = [line for line in stage.service.log.read_text().splitlines() if "name=c" in line]
    assert len(lines) >= 2
    assert all("process=engine request=of-this-test" in line for line in lines)
    log = stage.service.adapter_dir / ".audit" / "audit.jsonl"
    records = [json.loads(line) for line in log.read_text().splitlines()]
    mine = [record for record in records if record["request_id"] == "of-this-test"]
    assert [(record["event"], record["stage"]) for record in mine] == [
        ("adapter.publish", "begun"),
        ("adapter.publish", "ended"),
        ("adapter.delete", "begun"),
        ("adapter.delete", "ended"),
    ]


@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_second_service_on_the_same_folder_does_not_start(
    stage: Stage, folder: Path, workers: str
) -> None:
    root = stage.service.adapter_dir
    second = subprocess.run(
        [sys.executable, "-m", "service", "serve"],
        cwd=TREE,
        env=environ(folder, root, WORKERS=workers),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert second.returncode == 2
    expected = f"another service (process {stage.service.process.pid}) uses the folder {root}"
    assert second.stderr == f"service: IDSPAM_ADAPTER_DIR: {expected}\n"
    assert stage.ready()


def test_after_a_kill_of_all_processes_the_folder_is_free(
    folder: Path, saved: Backbone, tmp_path: Path
) -> None:
    content = serialize(make_adapter(saved))
    with ready_service(folder, tmp_path) as service:
        assert httpx.put(f"{service.url}/v1/adapters/a", content=content).status_code == 201
        service.process.kill()
        began = time.monotonic()
        # An engine that found the folder taken would wait for so long.
        with ready_service(folder, tmp_path, DRAIN_SECONDS="90") as again:
            assert time.monotonic() - began < 90
            assert httpx.get(f"{again.url}/v1/adapters/a").status_code == 200
