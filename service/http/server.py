"""uvicorn: when it starts and stops, which signals do what, and which sockets it listens on."""

import asyncio
import signal
import socket
from collections.abc import Callable
from contextvars import Context
from types import FrameType

import uvicorn
from fastapi import FastAPI

from service.http.lifecycle import Service
from service.http.plain_http import PlainHttpProtocol
from service.start import freeze_loaded_objects, start_error

BACKLOG = 2048
# Every request is answered before uvicorn is asked to exit; this is for connections that stay open.
CLOSING_SECONDS = 2
# Longer than client pools keep idle connections, so that it is the client that closes them.
KEEP_ALIVE_SECONDS = 75
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Server(uvicorn.Server):
    """Serves while the service loads, and on SIGTERM drains it before any socket is closed.

    Args:
        announce: called with one line as soon as the service is ready.

    `failure` says, once `run` has returned, why the service could not start.
    """

    def __init__(
        self, app: FastAPI, service: Service, *, url: str, announce: Callable[[str], None]
    ) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                loop="uvloop",
                http=PlainHttpProtocol,
                ws="none",
                lifespan="on",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_keep_alive=KEEP_ALIVE_SECONDS,
                timeout_graceful_shutdown=CLOSING_SECONDS,
            )
        )
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
        # The lifespan of the app has begun to start the service.
        self._service.starting.add_done_callback(self._started)

    def _started(self, starting: "asyncio.Task[None]") -> None:
        if starting.cancelled():
            return
        if (error := starting.exception()) is not None:
            self.failure = start_error(error)
            self.should_exit = True
            return
        freeze_loaded_objects()
        info = self._service.engine.info
        self._announce(
            f"serving {self._url} backbone={info.identity.name} device={info.device} "
            f"dtype={info.dtype} adapters={len(self._service.catalog)}"
        )

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Drain on the first signal, end at once on the second. Runs between any two bytecodes."""
        if self._loop is None or self._draining is not None:
            super().handle_exit(sig, frame)
            self.force_exit = True
            return
        # In a context of its own: the interrupted one may be a request's, whose id is then logged.
        self._loop.call_soon_threadsafe(self._drain, context=Context())

    def _drain(self) -> None:
        if self._draining is None:
            self._draining = asyncio.ensure_future(self._service.drain())
            self._draining.add_done_callback(self._drained)

    def _drained(self, draining: "asyncio.Task[None]") -> None:
        self.should_exit = True
        if not draining.cancelled() and (error := draining.exception()) is not None:
            self.failure = f"draining failed: {error}"


def ignore_repeated_signals() -> None:
    """Ignore the signals that uvicorn raises again when it is done: they were handled already.

    A signal that comes before uvicorn listens to it waits until then.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    for number in _SIGNALS:
        signal.signal(number, lambda *_: None)


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
    """Close a listener and hold its address for sockets that share it; accepts no connection.

    Raises:
        OSError: another process took the address in between.
    """
    address = listener.getsockname()
    listener.close()
    reserved = socket.socket(listener.family, socket.SOCK_STREAM)
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    if listener.family == socket.AF_INET6:
        # As `socket.create_server` sets it.
        reserved.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    reserved.bind(address)
    return reserved


def listen_shared(host: str, port: int) -> socket.socket:
    """One of several sockets that listen on a reserved address.

    The kernel spreads new connections over them evenly. If several processes accept from one
    socket, those that wake first take up to two and a half times their share.

    Raises:
        OSError: the address is taken and not reserved.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.create_server((host, port), family=family, backlog=BACKLOG, reuse_port=True)
    listener.setblocking(False)
    return listener


def url_of(listener: socket.socket) -> str:
    """The URL of a listening socket."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
