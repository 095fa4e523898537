"""HTTP/1.1 by hand, to see how an exchange fails: refused, cut in the middle, or never answered.

A client library hides that behind retries and one class of errors.
"""

import asyncio
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any


class NotConnected(Exception):
    """No process listens: the request was never sent."""


class Cut(Exception):
    """The connection ended before the answer was complete."""


class Silent(Exception):
    """No complete answer came in time."""


@dataclass(frozen=True, slots=True)
class Answer:
    """body: the JSON of the body; None where it is empty. replica: the `X-Replica` that answered;
    "" where a service answers for itself."""

    status: int
    body: Any
    replica: str = ""

    @property
    def error(self) -> str | None:
        """The type of an error in the service's shape; None for anything else."""
        match self.body:
            case {"error": {"type": str(kind), "message": str(message)}} if message:
                return kind
            # The Open Inference Protocol's.
            case {"error": str(message)} if message:
                return message
        return None


@dataclass(slots=True)
class Connection:
    """A connection that is kept alive, and opened again after it was lost."""

    host: str
    port: int
    _streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = field(default=None)

    async def ask(
        self,
        method: str,
        path: str,
        content: bytes = b"",
        *,
        seconds: float,
        kind: str = "application/json",
        headers: Mapping[str, str] | None = None,
    ) -> Answer:
        """
        Args:
            kind: of the content. headers: more of them.

        Raises:
            NotConnected, Cut, Silent
        """
        try:
            async with asyncio.timeout(seconds):
                reader, writer = await self._connected()
                head = f"{method} {path} HTTP/1.1\r\nHost: {self.host}\r\nContent-Type: {kind}\r\n"
                head += "".join(f"{key}: {value}\r\n" for key, value in (headers or {}).items())
                writer.write(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
                await writer.drain()
                return await self._answer(reader)
        except TimeoutError:
            self.close()
            raise Silent(f"{method} {path}: nothing in {seconds:g} s") from None
        except (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError) as error:
            self.close()
            raise Cut(f"{method} {path}: {error!r}") from None
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None

    async def _connected(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if self._streams is None:
            try:
                self._streams = await asyncio.open_connection(self.host, self.port)
            except OSError as error:
                raise NotConnected(str(error)) from None
        return self._streams

    async def _answer(self, reader: asyncio.StreamReader) -> Answer:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
        lines = head.split("\r\n")
        headers = dict(line.split(": ", 1) for line in lines[1:] if ": " in line)
        content = await reader.readexactly(int(headers.get("content-length", "0")))
        if headers.get("connection") == "close":
            self.close()
        body = None
        if content:
            with suppress(ValueError):
                body = json.loads(content)
        return Answer(int(lines[0].split(" ")[1]), body, headers.get("x-replica", ""))
