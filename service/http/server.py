"""uvicorn, told when to begin and when to end. Knows signals, and no request."""

import asyncio
import signal
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn
from fastapi import FastAPI

from service.http.lifecycle import Service
from service.start import settle, why

# --- merged from service.server

# All answers are out when uvicorn is told to exit; this is for connections that do not close.
CLOSING_SECONDS = 2
# Longer than clients keep idle connections in their pools, so that it is they who close them.
KEEP_ALIVE_SECONDS = 75
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Server(uvicorn.Server):
    """Serves while the service loads, and on SIGTERM drains it before any socket is closed.

    Args:
        announce: called with one line once the service is ready for the first time.

    `failure` says, once `run` has returned, why the service could not start.
    """

    def __init__(
        self, app: FastAPI, service: Service, *, url: str, announce: Callable[[str], None]
    ) -> None:
        super().__init__(_config(app))
        self._service = service
        self._url = url
        self._announce = announce
        self._loop: asyncio.AbstractEventLoop | None = None
        self._draining: asyncio.Task[None] | None = None
        self.failure: str | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
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
            settle()
            info = self._service.engine.info
            self._announce(
                f"serving {self._url} backbone={info.identity.name} device={info.device} "
                f"dtype={info.dtype} adapters={len(self._service.catalog)}"
            )
            return
        self.failure = why(error)
        self.should_exit = True


def ignore_repeated_signals() -> None:
    """uvicorn raises the signals that it got again when it is done: by then they mean nothing.

    One that comes before it listens to them waits until it does.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    for number in _SIGNALS:
        signal.signal(number, _nothing)


def _nothing(number: int, frame: FrameType | None) -> None:
    del number, frame


def _config(app: FastAPI) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        loop="uvloop",
        http="httptools",
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=CLOSING_SECONDS,
    )


# --- merged from service.sockets

BACKLOG = 2048


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one.

    Raises:
        OSError: no such address, or the port is taken.
    """
    family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listener = socket.create_server(address[:2], family=family, backlog=BACKLOG)
    listener.setblocking(False)
    return listener


def reserve(listener: socket.socket) -> socket.socket:
    """The address of a listener, which is closed, for sockets that share it; takes no connection.

    Raises:
        OSError: somebody else was faster.
    """
    address = listener.getsockname()
    listener.close()
    reserved = socket.socket(listener.family, socket.SOCK_STREAM)
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    if listener.family == socket.AF_INET6:
        # As `socket.create_server` has it.
        reserved.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    reserved.bind(address)
    return reserved


def listen_beside(host: str, port: int) -> socket.socket:
    """A listening socket that shares a reserved address with others.

    The kernel spreads new connections over them evenly. Of several processes that accept from one
    socket, those that wake first take them: up to two and a half times their share.

    Raises:
        OSError: the address is not reserved, but taken.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.create_server((host, port), family=family, backlog=BACKLOG, reuse_port=True)
    listener.setblocking(False)
    return listener


def url_of(listener: socket.socket) -> str:
    """Where a listening socket is reached."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
