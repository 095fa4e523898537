"""A real Prometheus: the one that `.ci/promtool` fetches, or the one on PATH."""

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

from service.http.server import listen
from tests.support.service_process import TREE, until
from tests.support.unavailable import unavailable

FETCHED = TREE / ".cache" / "prometheus" / "usr" / "bin"
CONFIG = TREE / "deploy" / "prometheus"
# Where compose.yaml puts the file that says how the service is asked.
MOUNTED = "/etc/idspam/service.yaml"


def binary(name: str) -> str:
    """Path of `prometheus` or `promtool`; without it the test is skipped."""
    __tracebackhide__ = True
    path = shutil.which(name, path=str(FETCHED)) or shutil.which(name)
    if path is None:
        unavailable(f"{name} is missing: run .ci/promtool (Debian) or install Prometheus")
    return path


@dataclass(frozen=True)
class Prometheus:
    """The HTTP API of a running server."""

    client: httpx.Client

    def get(self, path: str, **params: str) -> Any:
        """The `data` of a response."""
        response = self.client.get(f"/api/v1/{path}", params=params)
        assert response.status_code == 200, response.text
        return response.json()["data"]

    def values(self, expression: str) -> list[float]:
        """The finite values of an instant query."""
        series = self.get("query", query=expression)["result"]
        return [value for one in series if math.isfinite(value := float(one["value"][1]))]


@contextmanager
def prometheus(folder: Path, url: str) -> Iterator[Prometheus]:
    """Prometheus with the project's configuration, scraping `url` every second instead of every 15.

    The service's file is where compose.yaml mounts it, and the one that it chooses for this scheme.
    """
    text = (CONFIG / "prometheus.yaml").read_text()
    assert text.count("15s") == 2
    assert text.count(MOUNTED) == 1
    scheme, _, target = url.partition("://")
    service = (CONFIG / f"{scheme}.yaml").read_text()
    assert service.count("service:8000") == 1
    (folder / "service.yaml").write_text(service.replace("service:8000", target))
    (folder / "prometheus.yaml").write_text(
        text.replace("15s", "1s").replace(MOUNTED, str(folder / "service.yaml"))
    )
    for name in ("rules.yaml", "no-token"):
        shutil.copy(CONFIG / name, folder)
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
    """Wait at most `seconds` until nothing is missing; returns what still is."""
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
