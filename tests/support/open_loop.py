"""Requests that are sent at a rate, whether or not earlier ones were answered: real overload."""

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit


@dataclass(frozen=True)
class Answer:
    """status, headers and body of an answer, and the seconds that it took."""

    status: int
    headers: dict[str, str]
    body: bytes
    seconds: float


@dataclass
class Connections:
    """Keep-alive connections to a service, as many as are in use at once."""

    url: str
    _idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = field(default_factory=list)

    async def post(self, path: str, body: Any) -> Answer:
        split = urlsplit(self.url)
        data, started = json.dumps(body).encode(), time.monotonic()
        reader, writer = (
            self._idle.pop()
            if self._idle
            else await asyncio.open_connection(split.hostname, split.port)
        )
        head = f"POST {path} HTTP/1.1\r\nHost: {split.netloc}\r\nContent-Type: application/json\r\n"
        writer.write(head.encode() + b"Content-Length: %d\r\n\r\n" % len(data) + data)
        first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().strip().split("\r\n")
        headers = dict(line.lower().split(": ", 1) for line in lines)
        answer = await reader.readexactly(int(headers["content-length"]))
        self._idle.append((reader, writer))
        return Answer(int(first.split()[1]), headers, answer, time.monotonic() - started)

    def close(self) -> None:
        for _, writer in self._idle:
            writer.close()


@asynccontextmanager
async def connections(url: str) -> AsyncIterator[Connections]:
    """Connections that are closed at the end."""
    opened = Connections(url)
    try:
        yield opened
    finally:
        opened.close()


async def closed_loop(
    ask: Callable[[], Awaitable[Answer]], *, clients: int, seconds: float
) -> list[Answer]:
    """The answers of clients that each wait for one answer before they ask again."""
    answers: list[Answer] = []
    until = time.monotonic() + seconds

    async def client() -> None:
        while time.monotonic() < until:
            answers.append(await ask())

    await asyncio.gather(*(client() for _ in range(clients)))
    return answers


async def open_loop(
    ask: Callable[[], Awaitable[Answer]], *, rate: float, seconds: float
) -> list[Answer]:
    """The answers to requests that are sent at random times, `rate` a second on average."""
    tasks: list[asyncio.Task[Answer]] = []
    chance, begun = random.Random(1), time.monotonic()
    due = begun
    while due < begun + seconds:
        if (pause := due - time.monotonic()) > 0:
            await asyncio.sleep(pause)
        tasks.append(asyncio.ensure_future(ask()))
        due += chance.expovariate(rate)
    return list(await asyncio.gather(*tasks))
