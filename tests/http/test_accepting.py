"""The end of listening: who connected before it is answered, who comes later is refused."""

import asyncio
import socket
import ssl
from pathlib import Path

import pytest
import trustme

from service.http.accepting import Acceptor
from service.ipc.least_connections import LeastConnections


class Answer(asyncio.Protocol):
    """Answers whatever comes."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._transport = transport

    def data_received(self, _: bytes) -> None:
        self._transport.write(b"answer")


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, bool]]:
    return "asyncio", {"use_uvloop": True}


@pytest.fixture
def listener() -> socket.socket:
    made = socket.create_server(("127.0.0.1", 0))
    made.setblocking(False)
    return made


@pytest.mark.anyio
@pytest.mark.parametrize("with_tls", [False, True], ids=["http", "https"])
@pytest.mark.parametrize("number", [0, 2], ids=["alone", "with a neighbour"])
async def test_who_connected_before_the_end_is_answered(
    listener: socket.socket, tmp_path: Path, with_tls: bool, number: int
) -> None:
    authority = trustme.CA()
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    authority.issue_cert("localhost").configure_cert(server)
    authority.configure_trust(client)
    neighbours = [LeastConnections(tmp_path, index, 2) for index in range(number)]
    acceptors = [
        Acceptor(
            [listener] if index == 0 else [],
            16,
            Answer,
            server if with_tls else None,
            neighbours[index] if neighbours else None,
        )
        for index in range(number or 1)
    ]
    for acceptor in acceptors:
        await acceptor.start()
    # So that some of them are on their way to the neighbour.
    for neighbour in neighbours[:1]:
        neighbour.opened(4)

    async def ask(connection: socket.socket) -> bytes:
        reader, writer = await asyncio.open_connection(
            sock=connection,
            ssl=client if with_tls else None,
            server_hostname="localhost" if with_tls else None,
        )
        writer.write(b"question")
        answer = await reader.read(9)
        writer.transport.abort()
        return answer

    address = listener.getsockname()
    early = [socket.create_connection(address) for _ in range(4)]
    # The loop accepts those four, and the kernel completes the rest.
    await asyncio.sleep(0)
    early += [socket.create_connection(address) for _ in range(4)]
    asking = [asyncio.create_task(ask(connection)) for connection in early]
    await asyncio.gather(*(acceptor.stop() for acceptor in acceptors))
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(address)
    assert await asyncio.gather(*asking) == [b"answer"] * 8
    for acceptor in acceptors:
        acceptor.close()


async def secure(listener: socket.socket, folder: Path) -> tuple[Acceptor, LeastConnections]:
    """Accepts connections over TLS, in the only worker of a folder."""
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    trustme.CA().issue_cert("localhost").configure_cert(server)
    neighbours = LeastConnections(folder, 0, 1)
    acceptor = Acceptor([listener], 16, Answer, server, neighbours)
    await acceptor.start()
    return acceptor, neighbours


@pytest.mark.anyio
async def test_a_handshake_that_fails_disturbs_no_one(
    listener: socket.socket, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    acceptor, neighbours = await secure(listener, tmp_path)
    for sent in (b"GET / HTTP/1.1\r\n\r\n", b""):
        reader, writer = await asyncio.open_connection(*listener.getsockname())
        writer.write(sent)
        writer.write_eof()
        # A TLS alert, and then the end.
        await asyncio.wait_for(reader.read(), 5)
        writer.close()
    await asyncio.wait_for(acceptor.stop(), 5)
    # Nobody is counted any more.
    assert neighbours._rows[0].tolist()[1:3] == [0, 0]
    assert not caplog.records


@pytest.mark.slow
@pytest.mark.anyio
async def test_a_client_that_never_ends_its_handshake_does_not_hold_up_the_end(
    listener: socket.socket, tmp_path: Path
) -> None:
    acceptor, neighbours = await secure(listener, tmp_path)
    with socket.create_connection(listener.getsockname()) as silent:
        await asyncio.sleep(0.05)
        assert neighbours._rows[0].tolist()[1:3] == [0, 1]
        await asyncio.wait_for(acceptor.stop(), 5)
        # The process ends next, and with it the handshake.
        acceptor._starting.pop().cancel()
        await asyncio.sleep(0.05)
        silent.settimeout(5)
        assert silent.recv(9) == b""
