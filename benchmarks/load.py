"""A closed loop over HTTP: every connection sends its next request when one is answered.

The clients are processes of their own (`benchmarks.client`).
"""

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import urlsplit

from benchmarks.loop import percentiles_ms
from benchmarks.report import BenchmarkFailed

# A client may take this long beyond its window, to connect and for the last answers.
_PATIENCE_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Figures:
    """The figures of one load.

    requests: how many were under way in the window; the latencies are theirs. client_cpu: the
    clients' share of one core.
    """

    requests_per_second: float
    texts_per_second: float
    p50_ms: float
    p90_ms: float
    p99_ms: float
    requests: int
    client_cpu: float


def write_bodies(path: Path, bodies: Sequence[Any]) -> Path:
    """Write one request per line."""
    path.write_text("".join(json.dumps(body) + "\n" for body in bodies))
    return path


def load(
    url: str,
    bodies: Path,
    *,
    texts_per_request: int,
    connections: int,
    seconds: float,
    warm_up: float = 0.0,
    processes: int = 1,
) -> Figures:
    """Send `bodies` over and over; only the `seconds` after the warm-up count.

    Args:
        processes: the connections are spread over this many client processes.

    Raises:
        BenchmarkFailed: a request was not answered with 200. There are no figures with failures.
    """
    parts = urlsplit(url)
    order = {
        "host": parts.hostname,
        "port": parts.port,
        "path": parts.path,
        "bodies": str(bodies),
        "warm_up": warm_up,
        "seconds": seconds,
        "patience": warm_up + seconds + _PATIENCE_SECONDS / 2,
    }
    with TemporaryDirectory(prefix="idspam-load-") as folder, ExitStack() as stack:
        clients = []
        for index in range(min(processes, connections)):
            own = {
                "result": str(Path(folder) / str(index)),
                "connections": connections // processes + (index < connections % processes),
                "first": index / processes,
            }
            clients.append(stack.enter_context(_client(order | own)))
        for client in clients:
            client.connect()
        for client in clients:
            client.go()
        results = [client.result(warm_up + seconds + _PATIENCE_SECONDS) for client in clients]
    failed = sum(result["failed"] for result in results)
    latencies = [latency for result in results for latency in result["latencies"]]
    if failed or not latencies:
        reason = next((result["failure"] for result in results if result["failure"]), "too slow")
        raise BenchmarkFailed(
            f"{failed} requests to {url} failed, {len(latencies)} were answered: {reason}"
        )
    rate = sum(result["requests"] for result in results) / seconds
    return Figures(
        requests_per_second=rate,
        texts_per_second=rate * texts_per_request,
        **percentiles_ms(latencies),
        requests=len(latencies),
        client_cpu=sum(result["cpu_seconds"] for result in results) / (warm_up + seconds),
    )


class _Client:
    """A client process: it connects, waits for the start, and writes its result to a file."""

    def __init__(self, process: subprocess.Popen[str], order: dict[str, Any]) -> None:
        self._process, self._order = process, order

    def connect(self) -> None:
        self._write(json.dumps(self._order))
        assert self._process.stdout is not None
        if self._process.stdout.readline() != "connected\n":
            raise BenchmarkFailed(f"cannot connect to port {self._order['port']}")

    def go(self) -> None:
        self._write("go")

    def result(self, timeout: float) -> dict[str, Any]:
        try:
            self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise BenchmarkFailed("the clients do not end") from None
        if self._process.returncode:
            raise BenchmarkFailed(f"a client ended with {self._process.returncode}")
        result: dict[str, Any] = json.loads(Path(self._order["result"]).read_text())
        return result

    def _write(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()


@contextmanager
def _client(order: dict[str, Any]) -> Iterator[_Client]:
    """Killed at the end of the block, whatever it is doing."""
    with subprocess.Popen(
        [sys.executable, "-m", "benchmarks.client"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parent.parent,
    ) as process:
        try:
            yield _Client(process, order)
        finally:
            process.kill()
