"""uvicorn: when it starts and stops, which signals do what, and which sockets it listens on."""

import asyncio
import errno
import os
import signal
import socket
from collections.abc import Callable
from contextvars import Context
from functools import partial
from ipaddress import ip_address
from types import FrameType
from typing import cast

import uvicorn
from fastapi import FastAPI

from service.access.exposure import access_of
from service.access.tls import Renewal, certificate_of
from service.engine.interface import EngineInfo
from service.http.accepting import Acceptor, Neighbours
from service.http.bounded_http import BoundedHttpProtocol
from service.http.connections import Connection, Connections, limits_of
from service.http.lifecycle import Service
from service.start import freeze_loaded_objects, start_error

BACKLOG = 2048
# Every request is answered before uvicorn is asked to exit; this is for connections that stay open.
CLOSING_SECONDS = 2
# Then the process ends, also if a thread hangs in a read: once it has drained, and on a second
# signal.
ENDING_SECONDS = 10.0
AT_ONCE_SECONDS = 1.0
# Longer than client pools keep idle connections, so that it is the client that closes them.
KEEP_ALIVE_SECONDS = 75
# Connections are checked every so many tenths of a second.
CHECK_TICKS = 5
# While the service drains: how often it is looked whether idle connections may be closed.
DRAIN_POLL_SECONDS = 0.02
# So are the files of the certificate: as often as the file of keys.
RENEWAL_TICKS = 20
_NO_SUCH_ADDRESS = (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL)
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Server(uvicorn.Server):
    """Serves while the service loads, and on SIGTERM drains it before any socket is closed.

    Args:
        announce: called with one line as soon as the service is ready.
        process: the name of this process in metrics.
        neighbours: other processes that may serve its connections.
        end_within: called with the seconds in which the process must end, once it has drained.

    Raises:
        StartFailed: this process may not have descriptors for its connections.
        BadCertificate: the certificate's files cannot be used.

    `failure` says, once `run` has returned, why the service could not start.
    """

    def __init__(
        self,
        app: FastAPI,
        service: Service,
        *,
        url: str,
        announce: Callable[[str], None],
        process: str = "service",
        neighbours: Neighbours | None = None,
        end_within: Callable[[float], None] = lambda _: None,
    ) -> None:
        self._connections = connections = Connections(
            limits_of(service.settings),
            changed=None if neighbours is None else neighbours.opened,
            opened=self._report,
            ended=service.metrics.connections_ended,
        )
        certificate = certificate_of(service.settings)
        if certificate is not None:
            certificate.check()
        super().__init__(
            uvicorn.Config(
                app,
                loop="uvloop",
                # Called as a class is.
                http=cast("type[asyncio.Protocol]", partial(BoundedHttpProtocol, connections)),
                ws="none",
                lifespan="on",
                log_config=None,
                access_log=False,
                server_header=False,
                # `service.http.proxies` has it, for proxies that are trusted.
                proxy_headers=False,
                timeout_keep_alive=KEEP_ALIVE_SECONDS,
                timeout_graceful_shutdown=CLOSING_SECONDS,
                ssl_certfile=None if certificate is None else certificate.cert,
                ssl_keyfile=None if certificate is None else certificate.key,
            )
        )
        self._certificate = certificate
        self._renewal: Renewal | None = None
        self._service = service
        self._url = url
        self._process = process
        self._end_within = end_within
        self._announce = announce
        self._loop: asyncio.AbstractEventLoop | None = None
        self._neighbours = neighbours
        self._acceptor: Acceptor | None = None
        self._draining: asyncio.Task[None] | None = None
        self.failure: str | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup([])
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        self._loop = asyncio.get_running_loop()
        self._acceptor = Acceptor(
            sockets or [], BACKLOG, self._new_protocol, self.config.ssl, self._neighbours
        )
        await self._acceptor.start()
        if self._certificate is not None and self.config.ssl is not None:
            self._renewal = Renewal(self._certificate, self.config.ssl)
        # The lifespan of the app has begun to start the service.
        self._service.starting.add_done_callback(self._started)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if self._acceptor is not None:
            self._acceptor.close()
        await super().shutdown(sockets)

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
            f"serving {self._url} backbone={info.identity.name} device={self._devices(info)} "
            f"dtype={info.dtype} adapters={len(self._service.catalog)} "
            f"access={access_of(self._service.settings)}"
        )

    def _devices(self, info: EngineInfo) -> str:
        return self._service.settings.device if info.devices > 1 else info.device

    async def on_tick(self, counter: int) -> bool:
        """Called by uvicorn every tenth of a second."""
        if counter % CHECK_TICKS == 0 or self._connections.draining:
            self._connections.check(self._open, asyncio.get_running_loop().time())
        if self._renewal is not None and counter % RENEWAL_TICKS == 0:
            self._renewal.check()
        return await super().on_tick(counter)

    @property
    def _open(self) -> "set[Connection]":
        return cast("set[Connection]", self.server_state.connections)

    def _report(self, opened: int) -> None:
        self._service.metrics.connections(
            self._process,
            opened=opened,
            held_bytes=self._service.body_budget.bytes_in["memory"],
            stored_bytes=self._service.body_budget.bytes_in["disk"],
        )

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Drain on the first signal, end at once on the second. Runs between any two bytecodes."""
        if self._loop is None or self._draining is not None:
            super().handle_exit(sig, frame)
            self.force_exit = True
            self._end_within(AT_ONCE_SECONDS)
            return
        # In a context of its own: the interrupted one may be a request's, whose id is then logged.
        self._loop.call_soon_threadsafe(self._drain, context=Context())

    def _drain(self) -> None:
        if self._draining is None:
            self._connections.drain(self._open, asyncio.get_running_loop().time())
            self._draining = asyncio.ensure_future(self._drain_service())
            self._draining.add_done_callback(self._drained)

    async def _drain_service(self) -> None:
        await self._service.drain()
        loop = asyncio.get_running_loop()
        if self._acceptor is not None:
            await self._acceptor.stop()
        self._connections.last_request = loop.time()
        since = loop.time()
        while self._connections.may_be_asked(loop.time(), since):  # noqa: ASYNC110  # a clock's
            await asyncio.sleep(DRAIN_POLL_SECONDS)

    def _new_protocol(self) -> asyncio.Protocol:
        """As uvicorn makes one for each connection."""
        make = cast("Callable[..., asyncio.Protocol]", self.config.http_protocol_class)
        return make(
            config=self.config, server_state=self.server_state, app_state=self.lifespan.state
        )

    def _drained(self, draining: "asyncio.Task[None]") -> None:
        self.should_exit = True
        self._end_within(ENDING_SECONDS)
        if not draining.cancelled() and (error := draining.exception()) is not None:
            self.failure = f"draining failed: {error}"


def survive_late_signals(end_within: Callable[[float], None] = lambda _: None) -> None:
    """Keep the signals that come when uvicorn is done from ending the process in the midst of its
    end. It raises those again that it has seen.

    A signal that comes before uvicorn listens to it waits until then.

    Args:
        end_within: as of `Server`; called for each of them.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    for number in _SIGNALS:
        signal.signal(number, lambda *_: end_within(AT_ONCE_SECONDS))


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one.

    `::` is every address of the machine, those of IPv4 too. If a name has several addresses, the
    first one that can be used is taken.

    Raises:
        OSError: no such address, or the port is taken.
    """
    return _listener(host, port, reuse_port=False)


def reserve(listener: socket.socket) -> socket.socket:
    """Close a listener and hold its address for sockets that share it; accepts no connection.

    Raises:
        OSError: another process took the address in between.
    """
    address = listener.getsockname()
    is_v6 = listener.family == socket.AF_INET6
    v6_only = listener.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY) if is_v6 else 0
    listener.close()
    reserved = socket.socket(listener.family, socket.SOCK_STREAM)
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    if is_v6:
        reserved.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, v6_only)
    reserved.bind(address)
    return reserved


def listen_shared(host: str, port: int) -> socket.socket:
    """One of several sockets that listen on a reserved address.

    The kernel chooses one for each connection by a hash of its addresses. If several processes
    accept from one socket, those that wake first take up to two and a half times their share.

    Args:
        host: as `bound_host` gives it.

    Raises:
        OSError: the address is taken and not reserved.
    """
    return _listener(host, port, reuse_port=True)


def _listener(host: str, port: int, *, reuse_port: bool) -> socket.socket:
    failure: OSError | None = None
    for family, *_, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
        everywhere = family == socket.AF_INET6 and ip_address(str(address[0])).is_unspecified
        try:
            listener = socket.create_server(
                # With the scope of a link-local address, which is the last of the four.
                address,
                family=family,
                backlog=BACKLOG,
                reuse_port=reuse_port,
                dualstack_ipv6=everywhere and socket.has_dualstack_ipv6(),
            )
        except OSError as error:
            failure = failure or _explained(error, family)
        else:
            listener.setblocking(False)
            return listener
    assert failure is not None, "getaddrinfo raises if there is no address"
    raise failure


def _explained(error: OSError, family: int) -> OSError:
    """The error with its reason where the system's words do not say it."""
    if family != socket.AF_INET6 or error.errno not in _NO_SUCH_ADDRESS:
        return error
    advice = "is IPv6 switched off here? IDSPAM_HOST=0.0.0.0 listens on every address of IPv4"
    return OSError(error.errno, f"{os.strerror(error.errno or 0)}; {advice}")


def bound_host(listener: socket.socket) -> str:
    """The address that a socket is bound to, with the scope of a link-local one: `fe80::1%2`."""
    host, _, *rest = listener.getsockname()
    scope = rest[1] if rest else 0
    return f"{host}%{scope}" if scope else str(host)


def address_text(host: str, port: int) -> str:
    """An address and a port as they are written in a URL: an address of IPv6 is in brackets."""
    # The scope's sign is written as RFC 6874 asks.
    return f"[{host.replace('%', '%25')}]:{port}" if ":" in host else f"{host}:{port}"


def url_of(listener: socket.socket, scheme: str = "http") -> str:
    """The URL of a listening socket."""
    return f"{scheme}://{address_text(bound_host(listener), listener.getsockname()[1])}"
