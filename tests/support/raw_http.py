"""Raw connections to a service: bytes that no HTTP library would send, and whole answers."""

import json
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

PATIENCE_SECONDS = 20.0
HOST = b"Host: h\r\n"


@dataclass(frozen=True)
class Answer:
    """One response. headers: by lower-case name."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def error(self) -> dict[str, Any]:
        """The error, which must have the shape of our own routes."""
        error = json.loads(self.body)["error"]
        assert set(error) == {"type", "message", "details"}
        return dict(error)


@contextmanager
def connected(url: str, *, receive_buffer: int | None = None) -> Iterator[socket.socket]:
    """A connection. receive_buffer: of the client's socket, in bytes, to read slowly."""
    parts = urlsplit(url)
    with socket.socket() as connection:
        if receive_buffer is not None:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        connection.settimeout(PATIENCE_SECONDS)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.connect((parts.hostname, parts.port))
        yield connection


def answers(connection: socket.socket) -> list[Answer]:
    """Every answer until the service closes the connection; 100 Continue is one, too."""
    received = []
    with connection.makefile("rb") as stream:
        while line := stream.readline():
            status, headers = int(line.split()[1]), {}
            while (line := stream.readline()) not in (b"\r\n", b""):
                name, _, value = line.decode().partition(":")
                headers[name.lower()] = value.strip()
            body = stream.read(int(headers.get("content-length", "0")))
            received.append(Answer(status, headers, body))
    return received


def sent_and_answered(url: str, *pieces: bytes) -> list[Answer]:
    """Send pieces, each in a packet of its own, then read until the service closes."""
    with connected(url) as connection:
        for piece in pieces:
            connection.sendall(piece)
            time.sleep(0.01 if len(pieces) > 1 else 0)
        return answers(connection)


def send_until_closed(connection: socket.socket, piece: bytes, *, most: int) -> int:
    """Send a piece again and again until the service resets the connection; the bytes sent, which
    must be fewer than `most`."""
    total = 0
    try:
        while total < most:
            connection.sendall(piece)
            total += len(piece)
    except OSError:
        return total
    raise AssertionError(f"the service took {total} bytes")


def seconds_until_closed(connection: socket.socket) -> float:
    """How long the service keeps a connection whose client only reads."""
    began = time.monotonic()
    try:
        while connection.recv(65536):
            pass
    except ConnectionResetError:
        pass
    return time.monotonic() - began
