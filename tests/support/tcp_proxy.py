"""A TCP proxy that breaks connections on purpose, between a client and a server that both work."""

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, TypeAlias

# pass: forward all. refuse: end every connection at once. hold: forward nothing, end nothing.
# deaf: forward requests, and end the connection instead of each answer.
Mode: TypeAlias = Literal["pass", "refuse", "hold", "deaf"]

_POLL_SECONDS = 0.02


class Proxy:
    """
    Attributes:
        mode: what happens from now on, also to connections that are open.
        delay: seconds before each piece of an answer is forwarded.
        deaf_left: in mode `deaf`, after so many lost answers it passes all again; None: never.
    """

    def __init__(self, listener: socket.socket, target: tuple[str, int]) -> None:
        self.port: int = listener.getsockname()[1]
        self.mode: Mode = "pass"
        self.delay = 0.0
        self.deaf_left: int | None = None
        self._listener = listener
        self._target = target
        self._open: set[socket.socket] = set()
        self._ended = False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def serve(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            if self.mode == "refuse":
                client.close()
                continue
            threading.Thread(target=self._connect, args=(client,), daemon=True).start()

    def end(self) -> None:
        self._ended = True
        for each in list(self._open):
            _close(each)

    def _connect(self, client: socket.socket) -> None:
        try:
            server = socket.create_connection(self._target)
        except OSError:
            client.close()
            return
        self._open |= {client, server}
        answers = threading.Thread(target=self._pump, args=(server, client, True), daemon=True)
        answers.start()
        self._pump(client, server, False)
        answers.join()
        self._open -= {client, server}

    def _pump(self, source: socket.socket, sink: socket.socket, answers: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if answers and self.delay:
                    time.sleep(self.delay)
                while self.mode == "hold" and not self._ended:
                    time.sleep(_POLL_SECONDS)
                if self.mode == "refuse" or (answers and self._is_deaf(data)):
                    break
                sink.sendall(data)
        _close(source)
        _close(sink)

    def _is_deaf(self, data: bytes) -> bool:
        # The server has only asked for the rest of the request so far.
        if self.mode != "deaf" or data.startswith(b"HTTP/1.1 100 "):
            return False
        if self.deaf_left is not None:
            self.deaf_left -= 1
            if self.deaf_left <= 0:
                self.mode = "pass"
        return True


@contextmanager
def proxy_to(endpoint: str) -> Iterator[Proxy]:
    """A proxy in front of `http://host:port`."""
    host, _, port = endpoint.removeprefix("http://").rpartition(":")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        proxy = Proxy(listener, (host, int(port)))
        thread = threading.Thread(target=proxy.serve, daemon=True)
        thread.start()
        try:
            yield proxy
        finally:
            proxy.end()
            # A listener that is only closed leaves `accept` waiting.
            listener.shutdown(socket.SHUT_RDWR)
    thread.join()


def _close(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
    connection.close()
