"""Accepting connections: from the listening sockets, and from workers beside this one.

uvicorn's own way serves every connection that it accepts. Here one can go to another worker first,
and none is lost at the end: a kernel completes connections before a process accepts them, and
resets those that wait when the socket is closed. Their clients have sent a request by then, and
cannot know what became of it.
"""

import asyncio
import os
import ssl
from collections.abc import Callable, Sequence
from socket import socket
from typing import Protocol

# At the end, handshakes that have begun are waited for. A client may never end its own.
_HANDSHAKE_SECONDS = 1.0


class Neighbours(Protocol):
    """The workers beside this one, which may serve its connections."""

    def join(self, serve: Callable[[socket], None]) -> None:
        """From now on, serve connections that others hand over."""

    def leave(self) -> list[socket]:
        """Take no more of them. Returns those that were handed over and are not yet served."""

    def hand_over(self, descriptor: int) -> bool:
        """Whether another worker serves a connection. It stays open here."""

    def starting(self, number: int) -> None:
        """Tell the others how many connections this process took and has not yet opened."""

    def opened(self, number: int) -> None:
        """Tell the others how many connections are open in this process."""


class Acceptor:
    """Accepts connections from `start` to `stop`; both are called on the event loop.

    Args:
        listeners: which do not block.
        backlog: connections that may wait in each.
        protocol: makes the protocol of a connection.
        tls: for connections that begin with a handshake.
        neighbours: asked first whether one of them takes a connection.
    """

    def __init__(
        self,
        listeners: Sequence[socket],
        backlog: int,
        protocol: Callable[[], asyncio.Protocol],
        tls: ssl.SSLContext | None,
        neighbours: Neighbours | None,
    ) -> None:
        self._listeners = listeners
        self._backlog = backlog
        self._protocol = protocol
        self._tls = tls
        self._neighbours = neighbours
        self._loop = asyncio.get_running_loop()
        self._servers: list[asyncio.AbstractServer] = []
        self._starting: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        protocol, tls = self._protocol, self._tls
        if self._neighbours is not None:
            self._neighbours.join(self._serve)
            # Before the handshake, which the other worker does.
            protocol, tls = self._arriving(self._neighbours), None
        for listener in self._listeners:
            server = await self._loop.create_server(
                protocol, sock=listener, ssl=tls, backlog=self._backlog
            )
            self._servers.append(server)

    async def stop(self) -> None:
        """Refuse new connections, and serve those that came before."""
        late = [] if self._neighbours is None else self._neighbours.leave()
        for listener in self._listeners:
            late += _waiting(listener)
        # At once: who connects in between is reset.
        self.close()
        for connection in late:
            self._serve(connection)
        if self._starting:
            await asyncio.wait(self._starting, timeout=_HANDSHAKE_SECONDS)

    def close(self) -> None:
        """Refuse new connections; may be called again."""
        if self._neighbours is not None:
            for connection in self._neighbours.leave():
                connection.close()
        for server in self._servers:
            server.close()

    def _arriving(self, neighbours: Neighbours) -> Callable[[], asyncio.Protocol]:
        serve = self._serve if self._tls is not None else None
        return lambda: _Arriving(neighbours, self._protocol, serve)

    def _serve(self, connection: socket) -> None:
        task = self._loop.create_task(self._open(connection))
        self._starting.add(task)
        task.add_done_callback(self._has_started)
        self._tell()

    async def _open(self, connection: socket) -> None:
        connection.setblocking(False)
        try:
            await self._loop.connect_accepted_socket(self._protocol, connection, ssl=self._tls)
        except OSError:
            # The handshake failed or took too long, and that is no one else's concern.
            connection.close()

    def _has_started(self, task: "asyncio.Task[None]") -> None:
        self._starting.discard(task)
        self._tell()

    def _tell(self) -> None:
        if self._neighbours is not None:
            self._neighbours.starting(len(self._starting))


class _Arriving(asyncio.Protocol):
    """A connection before it is known which worker serves it.

    Args:
        protocol: makes the protocol of a connection that stays.
        serve: called with it instead; the protocol has nothing to do then.
    """

    def __init__(
        self,
        neighbours: Neighbours,
        protocol: Callable[[], asyncio.Protocol],
        serve: Callable[[socket], None] | None,
    ) -> None:
        self._neighbours = neighbours
        self._new_protocol = protocol
        self._serve = serve

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        descriptor = transport.get_extra_info("socket").fileno()
        if self._neighbours.hand_over(descriptor):
            # Closes this process's descriptor; the connection lives by the other one's.
            transport.abort()
        elif self._serve is not None:
            own = os.dup(descriptor)
            transport.abort()
            self._serve(socket(fileno=own))
        else:
            protocol = self._new_protocol()
            transport.set_protocol(protocol)
            protocol.connection_made(transport)


def _waiting(listener: socket) -> list[socket]:
    """Connections that the kernel has completed."""
    accepted: list[socket] = []
    while True:
        try:
            connection, _ = listener.accept()
        except OSError:
            # There are no more, or no more descriptors.
            return accepted
        accepted.append(connection)
