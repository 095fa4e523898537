"""A stream on a raw connection: lines are sent and answers read in any order."""

import json
import socket
from collections.abc import Mapping
from http.client import HTTPResponse
from typing import Any, Self
from urllib.parse import urlsplit

PATIENCE_SECONDS = 20.0


class OpenStream:
    """`POST /v1/predict/stream` that was begun.

    Args:
        query: of the URL.
        receive_buffer: of the client's socket, in bytes, to read slowly.
        headers: beside the usual ones.
    """

    def __init__(
        self,
        url: str,
        query: str = "adapter=a",
        *,
        receive_buffer: int | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        parts = urlsplit(url)
        self.socket = socket.socket()
        if receive_buffer is not None:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.socket.settimeout(PATIENCE_SECONDS)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.connect((parts.hostname, parts.port))
        fields = {"Host": "h", "Content-Type": "application/x-ndjson", **(headers or {})}
        lines = [f"{name}: {value}" for name, value in fields.items()]
        head = [f"POST /v1/predict/stream?{query} HTTP/1.1", *lines, "Transfer-Encoding: chunked"]
        self.socket.sendall("\r\n".join([*head, "", ""]).encode())
        self._response: HTTPResponse | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, *lines: object) -> None:
        """Send inputs, each as a line of JSON."""
        self.send_bytes(b"".join(json.dumps(line).encode() + b"\n" for line in lines))

    def send_bytes(self, data: bytes) -> None:
        self.socket.sendall(b"%x\r\n%s\r\n" % (len(data), data))

    def end(self) -> None:
        """The body is complete."""
        self.socket.sendall(b"0\r\n\r\n")

    @property
    def response(self) -> HTTPResponse:
        """The answer, whose head must come now."""
        if self._response is None:
            self._response = HTTPResponse(self.socket, method="POST")
            self._response.begin()
        return self._response

    def line(self) -> dict[str, Any]:
        """The next line of the answer, which must come."""
        line = self.response.readline()
        assert line.endswith(b"\n"), "the answer has ended"
        return dict(json.loads(line))

    def rest(self) -> list[dict[str, Any]]:
        """All further lines."""
        return [json.loads(line) for line in self.response.read().splitlines()]

    def answers(self, *lines: object) -> list[dict[str, Any]]:
        """Send lines, end, and read all answers."""
        self.send(*lines)
        self.end()
        return self.rest()
