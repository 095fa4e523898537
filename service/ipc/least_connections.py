"""A new connection goes to the worker that has the fewest, as with `least_conn` of nginx.

Each worker listens on a socket of its own, and the kernel chooses one by a hash of the addresses:
of 16 connections, the busiest of four workers gets 5 to 8. As clients keep their connections, that
worker stays the busiest. So a worker that accepts one while another worker has fewer hands over its
descriptor (`SCM_RIGHTS`).

Workers know of each other what is in a file that all of them map into memory: a row of counts for
each, which this worker alone writes. A row says how many connections it has, and how many it sent
to each other worker; what was sent and not yet taken counts as had. If it cannot be handed over,
the worker that accepted a connection serves it.
"""

import asyncio
import math
import mmap
import os
import socket
import struct
from array import array
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

_MESSAGE = b"\0"
# Of a message that hands over one descriptor. No program that a worker starts may inherit it.
_ANCILLARY_BYTES = socket.CMSG_LEN(struct.calcsize("i"))
_FLAGS = getattr(socket, "MSG_CMSG_CLOEXEC", 0)


# Of a worker's row. takes: 1 while it takes connections. seen: of those sent to it, how many it has
# taken. sent: the first of as many as there are workers, those that it sent to each.
_TAKES, _OPEN, _STARTING, _SEEN, _SENT = range(5)


class LeastConnections:
    """`service.http.accepting.Neighbours` over processes of one machine.

    Args:
        folder: which the workers share, for a file and their sockets.
        number: this worker's, below `workers`.

    Raises:
        OSError: the file or the socket cannot be used.
    """

    def __init__(self, folder: Path, number: int, workers: int) -> None:
        self._number = number
        columns = _SENT + workers
        size = workers * columns * 8
        file = os.open(folder / "connections", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(file, size)
            counts = memoryview(mmap.mmap(file, size)).cast("q")
        finally:
            os.close(file)
        self._rows = [counts[columns * row : columns * (row + 1)] for row in range(workers)]
        self._own = self._rows[number]
        # A process before this one may have had the same number.
        for column in range(_SENT):
            self._own[column] = 0
        self._paths = [str(folder / f"worker-{other}") for other in range(workers)]
        Path(self._paths[number]).unlink(missing_ok=True)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setblocking(False)
        self._socket.bind(self._paths[number])

    def join(self, serve: Callable[[socket.socket], None]) -> None:
        def take() -> None:
            for connection in self._received():
                serve(connection)

        asyncio.get_running_loop().add_reader(self._socket.fileno(), take)
        self._own[_SEEN] = self._sent_here()
        self._own[_TAKES] = 1

    def leave(self) -> list[socket.socket]:
        self._own[_TAKES] = 0
        if self._socket.fileno() < 0:
            return []
        asyncio.get_running_loop().remove_reader(self._socket.fileno())
        # Who sends from now on is told so, and what was sent before can still be received.
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RD)
        late = self._received()
        self._socket.close()
        return late

    def hand_over(self, descriptor: int) -> bool:
        loads = self._loads()
        # One more is not worth what it costs.
        own = loads[self._number] - 1
        if min(loads) >= own:
            return False
        for load, other in sorted(zip(loads, range(len(loads)), strict=True)):
            if load >= own:
                return False
            if self._send(descriptor, other):
                return True
        return False

    def starting(self, number: int) -> None:
        self._own[_STARTING] = number

    def opened(self, number: int) -> None:
        self._own[_OPEN] = number

    def _loads(self) -> list[float]:
        """Connections of each worker. Infinite: it takes none."""
        loads = []
        rows = self._rows
        for other, row in enumerate(rows):
            if not row[_TAKES]:
                loads.append(math.inf)
                continue
            load = row[_OPEN] + row[_STARTING] - row[_SEEN]
            for sender in rows:
                load += sender[_SENT + other]
            loads.append(load)
        return loads

    def _send(self, descriptor: int, other: int) -> bool:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", [descriptor]))]
        # Before it is sent: the other one may have taken it before this line.
        self._own[_SENT + other] += 1
        try:
            self._socket.sendmsg([_MESSAGE], rights, 0, self._paths[other])
        except OSError:
            # It has ended, or as many as the system allows are waiting for it.
            self._own[_SENT + other] -= 1
            return False
        return True

    def _received(self) -> list[socket.socket]:
        """Everything that was handed over by now."""
        connections = []
        while True:
            try:
                message, rights, _, _ = self._socket.recvmsg(1, _ANCILLARY_BYTES, _FLAGS)
            except OSError:
                break
            if not message:
                # The end, after `shutdown`.
                break
            for _, _, data in rights:
                # Without a descriptor left, the system closes it instead.
                (descriptor,) = struct.unpack("i", data)
                connections.append(socket.socket(fileno=descriptor))
        self._own[_SEEN] = self._sent_here()
        return connections

    def _sent_here(self) -> int:
        return sum(row[_SENT + self._number] for row in self._rows)
