"""How a service with workers ends: on a signal, or when its supervisor is killed."""

import os
import signal
import threading
from pathlib import Path

import httpx
import pytest

from adapters.backbone.loading import load_backbone
from adapters.format.files import serialize
from tests.support.service_process import ready_service, until
from tests.support.tiny_models import make_adapter, save_backbone

# Each test starts processes.
pytestmark = pytest.mark.slow


def test_sigterm_drains_the_workers_before_the_engine(tmp_path: Path) -> None:
    # So large that the engine still has all six requests when the signal comes.
    folder = save_backbone(tmp_path / "backbone", hidden_size=256, layers=6)
    adapter = make_adapter(load_backbone(str(folder), device="cpu"), seed=1, max_length=64)
    texts, requests, seconds = 150, 6, 100
    with ready_service(
        folder, tmp_path, MAX_WAITING_TOKENS="1000000", DRAIN_SECONDS=str(seconds)
    ) as running:
        httpx.put(
            f"{running.url}/v1/adapters/a", content=serialize(adapter), timeout=20
        ).raise_for_status()
        answers: list[httpx.Response] = []
        body = {
            "adapter": "a",
            "inputs": ["the card is not good " * 12] * texts,
            "timeout_ms": seconds * 1000,
        }
        asking = [
            threading.Thread(
                target=lambda: answers.append(
                    httpx.post(f"{running.url}/v1/predict", json=body, timeout=seconds)
                )
            )
            for _ in range(requests)
        ]
        for thread in asking:
            thread.start()
        probe = f"{running.url}/readyz"
        waiting = (requests - 1) * texts
        until(lambda: httpx.get(probe).json()["details"]["waiting_entries"] > waiting)
        running.process.send_signal(signal.SIGTERM)
        for thread in asking:
            thread.join(seconds)
        assert [answer.status_code for answer in answers] == [200] * requests
        assert all(len(answer.json()["results"]) == texts for answer in answers)
        assert running.process.wait(20) == 0
        assert running.children() == {}
        assert "Traceback" not in running.log.read_text()


def test_a_killed_supervisor_takes_its_children_along(folder: Path, tmp_path: Path) -> None:
    with ready_service(folder, tmp_path) as running:
        assert len(running.children()) == 4
        os.kill(running.process.pid, signal.SIGKILL)
        until(lambda: running.children() == {})
