"""Two replicas as processes, with and without workers: roll-outs under load, a stopped engine, and
a committer that is killed in the middle of a roll-out. `make replicas-test` runs it."""

import os
import signal
import time
from contextlib import ExitStack, suppress
from pathlib import Path

import httpx
import pytest

from adapters.backbone.model import Backbone
from adapters.format.files import serialize
from adapters.shared.log import SharedLog
from adapters.shared.objects import ObjectStore
from tests.support.replicas import Asking
from tests.support.service_process import ReadyService, body_of, ready_service, until
from tests.support.tiny_models import make_adapter

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(240),
    pytest.mark.skipif("REPLICAS_TEST" not in os.environ, reason="make replicas-test runs it"),
]

LEASE_SECONDS = 2.0


def put(service: ReadyService, content: bytes) -> str:
    url = f"{service.url}/v1/adapters/n?force=true"
    response = httpx.put(url, content=content, timeout=30)
    assert response.status_code in (200, 201), response.text
    return str(response.json()["revision"])


def revision_at(service: ReadyService) -> str | int:
    with suppress(httpx.TransportError):
        response = httpx.post(f"{service.url}/v1/predict", json=body_of("n", "x"), timeout=30)
        if response.status_code == 200:
            return str(response.json()["results"][0]["revision"])
        return response.status_code
    return 0


@pytest.mark.parametrize("workers", [0, 2])
def test_replicas_agree_under_load_stops_and_kills(
    workers: int, folder: Path, saved: Backbone, tmp_path: Path
) -> None:
    shared, faults = tmp_path / "shared", tmp_path / "faults"
    files = [serialize(make_adapter(saved, seed=seed)) for seed in range(6)]
    settings = {
        "ADAPTER_STORE": str(shared),
        "FOLLOW_SECONDS": "0.1",
        "LEASE_SECONDS": str(LEASE_SECONDS),
        "STANDBY": "no",
    }
    with ExitStack() as stack:
        services = []
        for name in ("a", "b"):
            place = tmp_path / name
            place.mkdir()
            service = ready_service(
                folder,
                place,
                workers=workers,
                faults=str(faults) if name == "a" else "",
                **(settings | {"REPLICA": name}),
            )
            services.append(stack.enter_context(service))
        a, b = services
        put(a, files[0])
        with Asking(a.url, "n") as at_a, Asking(b.url, "n") as at_b:
            for turn in range(4):
                revision = put(services[turn % 2], files[1 + turn % 2])
                returned = time.monotonic()
                time.sleep(0.15)
                seen = set(at_a.since(returned)) | set(at_b.since(returned))
                assert seen == {revision}
            # A replica that is stopped cannot say that it has switched.
            stopped = b.children()["engine"] if workers else b.process.pid
            os.kill(stopped, signal.SIGSTOP)
            began = time.monotonic()
            revision = put(a, files[3])
            returned = time.monotonic()
            # To be known as dead, and no longer.
            assert returned - began < 2.5 * LEASE_SECONDS + 1
            time.sleep(0.5)
            os.kill(stopped, signal.SIGCONT)
            until(lambda: revision_at(b) == revision)
            assert set(at_b.since(returned)) <= {revision, 503}
            assert set(at_a.since(returned)) == {revision}
        # The committer dies when all are preparing.
        faults.write_text("rollout.prepared kill\n")
        with suppress(httpx.TransportError):
            url = f"{a.url}/v1/adapters/n?force=true"
            assert httpx.put(url, content=files[4], timeout=30).status_code == 503
        faults.unlink()
        assert revision_at(b) == revision
        began = time.monotonic()
        newer = put(b, files[5])
        assert time.monotonic() - began < 2.5 * LEASE_SECONDS + 1
        assert revision_at(b) == newer
        if workers:
            until(lambda: revision_at(a) == newer)
        kinds = [entry.kind for entry in SharedLog(ObjectStore(str(shared))).read(0)]
        assert kinds[-3:] == ["prepare", "prepare", "commit"]
