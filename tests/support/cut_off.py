"""A proxy that cuts connections in the middle of answers."""

import asyncio
import threading
from contextlib import suppress
from typing import Self
from urllib.parse import urlsplit


class CutOff:
    """Passes connections on to a service, and resets each after so many bytes of its answer.

    Args:
        url: of the service.
        every: bytes.
        answer: what every connection gets instead; then there is no service.

    Attributes:
        cuts: connections that were reset so far.
    """

    def __init__(self, url: str, *, every: int, answer: bytes = b"") -> None:
        self._to = urlsplit(url)
        self._every = every
        self._answer = answer
        self.cuts = 0
        self.url = ""
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run)
        # The loop refers to tasks weakly, and a connection that was aborted not at all.
        self._serving: set[asyncio.Task[None] | None] = set()

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._ready.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    def _run(self) -> None:
        server = self._loop.run_until_complete(asyncio.start_server(self._serve, "127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        self._ready.set()
        self._loop.run_forever()
        server.close()
        self._loop.run_until_complete(_end_all())

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        self._serving.add(task)
        try:
            await self._passed_on(reader, writer)
        except asyncio.CancelledError:
            # The test is over; the server would report it.
            pass
        finally:
            self._serving.discard(task)

    async def _passed_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            if self._answer:
                await reader.read(100)
                writer.write(self._answer)
                await writer.drain()
                writer.close()
                return
            back, forth = await asyncio.open_connection(self._to.hostname, self._to.port)
            sending = asyncio.ensure_future(_copy(reader, forth))
            try:
                left = self._every
                while left > 0 and (data := await back.read(min(left, 65536))):
                    left -= len(data)
                    writer.write(data)
                    await writer.drain()
                self.cuts += left <= 0
            finally:
                sending.cancel()
                forth.transport.abort()
                writer.transport.abort()
                await asyncio.gather(sending, return_exceptions=True)


async def _end_all() -> None:
    # A connection that was accepted a moment ago becomes a task in a later turn.
    for _ in range(3):
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.sleep(0.01)


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(OSError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
