"""A real Prometheus for tests: what `.ci/promtool` fetches, or what is on PATH."""

import math
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.http.server import listen
from tests.support.service_process import TREE, until

FETCHED = TREE / ".cache" / "prometheus" / "usr" / "bin"
CONFIG = TREE / "deploy" / "prometheus"


def binary(name: str) -> str:
    """Where it is; skips the test that asks where there is none."""
    found = shutil.which(name, path=str(FETCHED)) or shutil.which(name)
    if found is None:
        pytest.skip(f"no {name}: run .ci/promtool (Debian), or install Prometheus")
    return found


@dataclass(frozen=True)
class Prometheus:
    """A running server, asked over its HTTP API."""

    client: httpx.Client

    def get(self, path: str, **params: str) -> Any:
        """The `data` of an answer."""
        response = self.client.get(f"/api/v1/{path}", params=params)
        assert response.status_code == 200, response.text
        return response.json()["data"]

    def values(self, expression: str) -> list[float]:
        """What an instant query returns now, without what is no number."""
        found = [float(item["value"][1]) for item in self.get("query", query=expression)["result"]]
        return [value for value in found if math.isfinite(value)]


@contextmanager
def prometheus(folder: Path, target: str) -> Iterator[Prometheus]:
    """The project's own configuration, but every second instead of every fifteen."""
    text = (CONFIG / "prometheus.yaml").read_text()
    assert text.count("15s") == 2
    assert "service:8000" in text
    (folder / "prometheus.yaml").write_text(
        text.replace("15s", "1s").replace("service:8000", target)
    )
    shutil.copy(CONFIG / "rules.yaml", folder)
    with listen("127.0.0.1", 0) as free:
        port = free.getsockname()[1]
    command = [
        binary("prometheus"),
        f"--config.file={folder / 'prometheus.yaml'}",
        f"--storage.tsdb.path={folder / 'tsdb'}",
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    log = folder / "prometheus.log"
    with log.open("w") as errors, subprocess.Popen(command, stderr=errors) as process:
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=10) as client:
                until(lambda: _ready(client))
                yield Prometheus(client)
        finally:
            process.terminate()
            process.wait(20)


def wait_for(
    missing: Callable[[], list[str]], *, seconds: float, meanwhile: Callable[[], None]
) -> list[str]:
    """What is still missing after at most so many seconds."""
    deadline = time.monotonic() + seconds
    while (left := missing()) and time.monotonic() < deadline:
        meanwhile()
        time.sleep(1)
    return left


def _ready(client: httpx.Client) -> bool:
    try:
        return client.get("/-/ready").status_code == 200
    except httpx.TransportError:
        return False
