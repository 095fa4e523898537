"""Servers that break: each request gets the bytes that a test chose, or no answer at all."""

import json
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager

# A request with this text gets no answer, and its connection stays open.
HELD = "never answered"
RESULT = {
    "id": None,
    "adapter": "a",
    "revision": "0c9d",
    "label": "ham",
    "score": 0.75,
    "scores": [{"label": "ham", "score": 0.75}],
    "tokens": 3,
    "truncated": False,
}


def answer(content: object, status: str = "200 OK", *headers: str) -> bytes:
    """A whole response."""
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *headers, "", ""]
    return "\r\n".join(lines).encode() + body


def results(number: int) -> bytes:
    """The response to a predict request with this many inputs."""
    timings = {"tokenize": 0.1, "queue": 0.1, "inference": 0.1}
    return answer({"results": [RESULT] * number, "timings_ms": timings})


class BrokenServer:
    """The n-th request gets the n-th answer, and all further requests the last one.

    None is no answer: the connection is closed. requests: their first lines.
    """

    def __init__(self, listener: socket.socket, answers: Sequence[bytes | None]) -> None:
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        self.requests: list[str] = []
        self.headers: list[dict[str, str]] = []
        self.bodies: list[bytes] = []
        self._listener = listener
        self._answers = answers
        self._turn = threading.Lock()

    def serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._talk, args=(connection,), daemon=True).start()

    def _talk(self, connection: socket.socket) -> None:
        with closing(connection), connection.makefile("rb") as stream:
            while line := stream.readline():
                headers = {}
                while (header := stream.readline()) not in (b"\r\n", b""):
                    name, _, value = header.decode().partition(":")
                    headers[name.lower()] = value.strip()
                if headers.get("expect") == "100-continue":
                    connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
                body = stream.read(int(headers.get("content-length", 0)))
                with self._turn:
                    self.requests.append(line.decode().strip())
                    self.headers.append(headers)
                    self.bodies.append(body)
                    turn = min(len(self.requests), len(self._answers)) - 1
                reply = b"" if HELD.encode() in body else self._answers[turn]
                if reply is None:
                    return
                connection.sendall(reply)
                if b"Connection: close" in reply:
                    return


@contextmanager
def broken(*answers: bytes | None) -> Iterator[BrokenServer]:
    """A server with these answers, until the block ends."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = BrokenServer(listener, answers)
        thread = threading.Thread(target=server.serve, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            # Wakes the thread that waits in accept.
            listener.shutdown(socket.SHUT_RDWR)
            thread.join(10)
