"""How a service with workers ends: on a signal, or when its supervisor is killed."""

import os
import signal
import threading
from pathlib import Path

import httpx
import pytest

from adapters.backbone.model import Backbone
from adapters.format.files import serialize
from tests.support.service_process import ready_service, until
from tests.support.tiny_models import make_adapter

# Each test starts processes.
pytestmark = pytest.mark.slow


def test_sigterm_drains_the_workers_before_the_engine(
    folder: Path, saved: Backbone, tmp_path: Path
) -> None:
    with ready_service(folder, tmp_path, MAX_WAITING_TOKENS="1000000") as running:
        httpx.put(
            f"{running.url}/v1/adapters/a",
            content=serialize(make_adapter(saved, seed=1, max_length=64)),
            timeout=20,
        ).raise_for_status()
        answers: list[httpx.Response] = []
        # Enough texts for the engine to be busy while the signal comes.
        body = {"adapter": "a", "inputs": ["the card is not good " * 12] * 1000}
        asking = [
            threading.Thread(
                target=lambda: answers.append(
                    httpx.post(f"{running.url}/v1/predict", json=body, timeout=60)
                )
            )
            for _ in range(6)
        ]
        for thread in asking:
            thread.start()
        probe = f"{running.url}/readyz"
        until(lambda: httpx.get(probe).json()["details"]["waiting_entries"] > 0)
        running.process.send_signal(signal.SIGTERM)
        for thread in asking:
            thread.join(60)
        assert [answer.status_code for answer in answers] == [200] * 6
        assert all(len(answer.json()["results"]) == 1000 for answer in answers)
        assert running.process.wait(20) == 0
        assert running.children() == {}
        assert "Traceback" not in running.log.read_text()


def test_a_killed_supervisor_takes_its_children_along(folder: Path, tmp_path: Path) -> None:
    with ready_service(folder, tmp_path) as running:
        assert len(running.children()) == 4
        os.kill(running.process.pid, signal.SIGKILL)
        until(lambda: running.children() == {})
