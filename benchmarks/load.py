"""Load over HTTP: so many connections, each sending its next request when one is answered.

The clients are processes of their own (`benchmarks.client`). Knows no server.
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

# What a client may take beyond its window: to connect, and for the last answers.
_PATIENCE_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Figures:
    """One load. Latencies are milliseconds; client_cpu: the clients' share of one core.

    requests: that were under way in the window, and whose latencies these are.
    """

    requests_per_second: float
    texts_per_second: float
    p50_ms: float
    p90_ms: float
    p99_ms: float
    requests: int
    client_cpu: float


def write_bodies(path: Path, bodies: Sequence[Any]) -> Path:
    """One request a line."""
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
    """Send `bodies` over and over; only what is done in the `seconds` behind the warm-up counts.

    Args:
        processes: what the connections are spread over.

    Raises:
        BenchmarkFailed: a request was not answered with 200: figures with failures in them are
            none.
    """
    shares = [
        connections // processes + (index < connections % processes) for index in range(processes)
    ]
    with TemporaryDirectory(prefix="idspam-load-") as folder, ExitStack() as stack:
        clients = [
            stack.enter_context(
                _client(
                    url,
                    bodies,
                    Path(folder) / str(index),
                    connections=share,
                    first=index / processes,
                )
            )
            for index, share in enumerate(shares)
            if share
        ]
        for client in clients:
            client.connect(warm_up=warm_up, seconds=seconds)
        for client in clients:
            client.go()
        results = [client.result(warm_up + seconds + _PATIENCE_SECONDS) for client in clients]
    failed = sum(result["failed"] for result in results)
    latencies = [item for result in results for item in result["latencies"]]
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
    """A client process: it connects, waits for the word to go, and tells what it saw."""

    def __init__(self, process: subprocess.Popen[str], order: dict[str, Any]) -> None:
        self._process, self._order = process, order

    def connect(self, *, warm_up: float, seconds: float) -> None:
        order = self._order | {
            "warm_up": warm_up,
            "seconds": seconds,
            "patience": warm_up + seconds + _PATIENCE_SECONDS / 2,
        }
        self._write(json.dumps(order))
        assert self._process.stdout is not None
        if self._process.stdout.readline() != "connected\n":
            raise BenchmarkFailed(f"cannot connect to port {self._order['port']}")

    def go(self) -> None:
        self._write("go")

    def result(self, timeout: float) -> dict[str, Any]:
        try:
            self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise BenchmarkFailed("the clients hang") from None
        if self._process.returncode:
            raise BenchmarkFailed(f"a client ended with {self._process.returncode}")
        found: dict[str, Any] = json.loads(Path(self._order["result"]).read_text())
        return found

    def _write(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()


@contextmanager
def _client(
    url: str, bodies: Path, result: Path, *, connections: int, first: float
) -> Iterator[_Client]:
    """Ended with the block, whatever it is at."""
    parts = urlsplit(url)
    order = {
        "host": parts.hostname,
        "port": parts.port,
        "path": parts.path,
        "bodies": str(bodies),
        "result": str(result),
        "connections": connections,
        "first": first,
    }
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
