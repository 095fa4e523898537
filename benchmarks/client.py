"""One process of HTTP clients: `python -m benchmarks.client`, started by `benchmarks.load`.

The bytes of all requests are made beforehand, connections stay open, and only the status and the
length of a response are read. A request costs about ten microseconds here, so the figures are the
server's. Imports only what loads quickly.
"""

import asyncio
import json
import sys
from collections.abc import Iterator, Sequence
from itertools import cycle, islice
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import uvloop

_HEAD_END = b"\r\n\r\n"
_LENGTH = b"content-length:"
# Bytes of a failed response that the error message shows.
_SHOWN = 300


class Traffic:
    """Shared by all connections: the next request, the measured window, and the results in it."""

    def __init__(self, requests: Iterator[bytes]) -> None:
        self.requests = requests
        self.opens = self.closes = 0.0
        self.latencies: list[float] = []
        self.requests_done = 0.0
        self.failed = 0
        self.failure = ""

    def open(self, *, warm_up: float, seconds: float) -> None:
        self.opens = perf_counter() + warm_up
        self.closes = self.opens + seconds

    def answered(self, sent: float) -> None:
        now = perf_counter()
        inside = min(now, self.closes) - max(sent, self.opens)
        if inside > 0:
            # Counted by the share of its time inside the window, or a few long requests would make
            # the rate jump. All latencies count: leaving out late ones would favour short ones.
            self.requests_done += inside / (now - sent)
            self.latencies.append(now - sent)

    def fail(self, reason: str) -> None:
        self.failed += 1
        self.failure = self.failure or reason


class Connection(asyncio.Protocol):
    """Sends the next request when the previous one is answered, until the window closes."""

    def __init__(self, traffic: Traffic) -> None:
        self._traffic = traffic
        self._transport: Any = None
        self._buffer = b""
        self._needed = 0
        self._sent = 0.0
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def send(self) -> None:
        self._sent = perf_counter()
        if self._sent >= self._traffic.closes:
            self._finish()
        else:
            self._transport.write(next(self._traffic.requests))

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        if not self._needed and not self._read_head():
            return
        if len(self._buffer) < self._needed:
            return
        if self._buffer[9:12] == b"200":
            self._traffic.answered(self._sent)
        else:
            self._traffic.fail(self._buffer[:_SHOWN].decode("latin-1"))
        self._buffer, self._needed = self._buffer[self._needed :], 0
        self.send()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.done.done():
            self._traffic.fail(f"the server closed a connection: {exc}")
            self.done.set_result(None)

    def _read_head(self) -> bool:
        end = self._buffer.find(_HEAD_END)
        if end < 0:
            return False
        head = self._buffer[: end + 2].lower()
        at = head.find(_LENGTH)
        if at < 0:
            self._traffic.fail("a response without Content-Length")
            self._finish()
            return False
        length = head[at + len(_LENGTH) : head.index(b"\r\n", at)]
        self._needed = end + len(_HEAD_END) + int(length)
        return True

    def _finish(self) -> None:
        if not self.done.done():
            self.done.set_result(None)
        self._transport.close()


async def run(order: dict[str, Any], bodies: Sequence[bytes]) -> dict[str, Any]:
    """Connect, wait for a line on stdin, send. `benchmarks.load` writes the order's fields."""
    head = (
        f"POST {order['path']} HTTP/1.1\r\nHost: {order['host']}:{order['port']}\r\n"
        "Content-Type: application/json\r\nContent-Length: "
    ).encode()
    requests = [head + str(len(body)).encode() + _HEAD_END + body for body in bodies]
    traffic = Traffic(islice(cycle(requests), int(order["first"] * len(requests)), None))
    loop = asyncio.get_running_loop()
    connections = []
    for _ in range(order["connections"]):
        _, connection = await loop.create_connection(
            lambda: Connection(traffic), order["host"], order["port"]
        )
        connections.append(connection)
    sys.stdout.write("connected\n")
    sys.stdout.flush()
    await loop.run_in_executor(None, sys.stdin.readline)
    traffic.open(warm_up=order["warm_up"], seconds=order["seconds"])
    busy = process_time()
    for connection in connections:
        connection.send()
    await asyncio.wait([connection.done for connection in connections], timeout=order["patience"])
    for connection in connections:
        if not connection.done.done():
            traffic.fail("a request was not answered in time")
    return {
        "requests": traffic.requests_done,
        "latencies": traffic.latencies,
        "failed": traffic.failed,
        "failure": traffic.failure,
        "cpu_seconds": process_time() - busy,
    }


def main() -> None:
    order = json.loads(sys.stdin.readline())
    bodies = Path(order["bodies"]).read_bytes().splitlines()
    result = uvloop.run(run(order, bodies))
    # Not to stdout: after uvloop.run (0.23), a write to a pipe ends after 64 KiB.
    Path(order["result"]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
