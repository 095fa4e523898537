"""uvicorn, told when to begin and when to end. Knows signals, and no request."""

import asyncio
import gc
import signal
import socket
import sys
from types import FrameType

import uvicorn

from adapters.errors import AdapterError
from service.lifecycle import Service


class Server(uvicorn.Server):
    """Serves while the service loads, and on SIGTERM drains it before any socket is closed.

    `failure` says, once `run` has returned, why the service could not start.
    """

    def __init__(self, config: uvicorn.Config, service: Service, *, url: str) -> None:
        super().__init__(config)
        self._service = service
        self._url = url
        self._loop: asyncio.AbstractEventLoop | None = None
        self._draining: asyncio.Task[None] | None = None
        self.failure: str | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._loop = asyncio.get_running_loop()
        assert self._service.starting is not None, "the app's lifespan starts the service"
        self._service.starting.add_done_callback(self._started)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A first signal drains; a second one ends at once. Runs between any two bytecodes."""
        if self._loop is None or self._draining is not None:
            super().handle_exit(sig, frame)
            self.force_exit = True
            return
        self._loop.call_soon_threadsafe(self._drain)

    def _drain(self) -> None:
        if self._draining is None:
            self._draining = asyncio.ensure_future(self._service.drain())
            self._draining.add_done_callback(self._drained)

    def _drained(self, draining: "asyncio.Task[None]") -> None:
        self.should_exit = True
        if not draining.cancelled() and (error := draining.exception()) is not None:
            self.failure = f"draining failed: {error}"

    def _started(self, starting: "asyncio.Task[None]") -> None:
        if starting.cancelled():
            return
        error = starting.exception()
        if error is None:
            # What is loaded stays. Without this every full collection looks through all of torch
            # and transformers again while all requests wait: 250 ms, twice a second under load.
            gc.collect()
            gc.freeze()
            info = self._service.engine.info
            sys.stdout.write(
                f"serving {self._url} backbone={info.identity.name} device={info.device} "
                f"dtype={info.dtype} adapters={len(self._service.catalog)}\n"
            )
            sys.stdout.flush()
            return
        # What is wrong with the machine or the settings is one line; a defect keeps its name.
        expected = isinstance(error, (AdapterError, OSError))
        self.failure = str(error) if expected else f"{type(error).__name__}: {error}"
        self.should_exit = True


def ignore_repeated_signals() -> None:
    """uvicorn raises the signals that it got again when it is done: by then they mean nothing."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _nothing)


def _nothing(number: int, frame: FrameType | None) -> None:
    del number, frame
