"""One request whose body and answer go at the same time, which httpx does not do: it sends all of a
body before it reads anything.

This is asyncio's streams, for TCP and TLS, and h11, which httpx uses as well, for HTTP.
"""

import asyncio
import ssl
from base64 import b64encode
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import h11
import httpx

from service.client.errors import InvalidCall, UnexpectedAnswer
from service.client.proxies import Proxy, proxy_of
from service.client.retry import NoReply
from service.client.transport import CONNECT_SECONDS, Address

_READ_BYTES = 256 * 1024
# Of an answer that is an error.
_MOST_ERROR_BYTES = 1024 * 1024
_METHOD = "POST"


class Lost(Exception):
    """There is no connection, or it broke. reply: why, and whether the service may have lines."""

    def __init__(self, reply: NoReply) -> None:
        self.reply = reply
        super().__init__(reply.reason)


@dataclass(frozen=True, slots=True)
class Head:
    """The beginning of an answer. headers: with names in lower case."""

    status: int
    headers: Mapping[str, str]


class Duplex:
    """A request that was begun. One task may send while another receives."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._http = h11.Connection(h11.CLIENT)

    @classmethod
    async def open(
        cls, address: Address, path: str, params: Mapping[str, str], headers: Mapping[str, str]
    ) -> Self:
        """Connect and send the head of a request.

        Raises:
            Lost: nobody answers there.
            InvalidCall: the proxy is one of SOCKS.
        """
        url = httpx.URL(address.url).copy_with(params=None)
        target = url.copy_with(path=url.path.rstrip("/") + path, params=dict(params))
        proxy = proxy_of(url)
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                reader, writer = await _connected(url, proxy, address.context())
        except (OSError, TimeoutError, EOFError) as error:
            reason = str(error) or ("timed out" if isinstance(error, TimeoutError) else "closed")
            raise Lost(NoReply(reason, sent=False)) from None
        connection = cls(reader, writer)
        whole = proxy is not None and url.scheme == "http"
        fields = {"host": url.netloc.decode("ascii"), "transfer-encoding": "chunked"}
        fields |= {"accept": "*/*", "accept-encoding": "identity"}
        if whole and proxy is not None and proxy.httpx.raw_auth is not None:
            fields["proxy-authorization"] = _basic(proxy)
        fields |= {
            name.lower(): value for name, value in (address.common() | dict(headers)).items()
        }
        request = h11.Request(
            method=_METHOD,
            target=str(target) if whole else target.raw_path,
            headers=list(fields.items()),
        )
        await connection._write(connection._http.send(request))
        return connection

    async def send(self, data: bytes) -> None:
        """Send a part of the body; returns once the connection has room for more.

        Raises:
            Lost: the connection broke.
        """
        await self._write(self._http.send(h11.Data(data=data)))

    async def finish(self) -> None:
        """The body is complete; raises as `send`."""
        await self._write(self._http.send(h11.EndOfMessage()))

    async def head(self) -> Head:
        """The beginning of the answer.

        Raises:
            Lost: the connection broke.
            UnexpectedAnswer: this is not HTTP.
        """
        while True:
            event = await self._event()
            if isinstance(event, h11.Response):
                headers = {name.decode(): value.decode("latin-1") for name, value in event.headers}
                return Head(event.status_code, headers)
            if not isinstance(event, h11.InformationalResponse):
                raise Lost(NoReply("closed before it answered", sent=True))

    async def receive(self) -> bytes:
        """The next part of the answer; empty at its end. Raises as `head`."""
        while True:
            event = await self._event()
            if isinstance(event, h11.Data):
                if event.data:
                    return bytes(event.data)
            else:
                return b""

    async def rest(self) -> bytes:
        """All of an answer that is an error, up to a limit. Raises as `head`."""
        parts, size = [], 0
        while size < _MOST_ERROR_BYTES and (part := await self.receive()):
            parts.append(part)
            size += len(part)
        return b"".join(parts)

    def close(self) -> None:
        self._writer.transport.abort()

    async def _write(self, data: bytes | None) -> None:
        try:
            if data:
                self._writer.write(data)
                await self._writer.drain()
        except OSError as error:
            raise Lost(NoReply(str(error) or "closed", sent=True)) from None

    async def _event(self) -> h11.Event:
        try:
            while True:
                event = self._http.next_event()
                # Never paused: there is one request on a connection.
                if isinstance(event, h11.Event):
                    return event
                self._http.receive_data(await self._reader.read(_READ_BYTES))
        except h11.RemoteProtocolError as error:
            if self._reader.at_eof():
                raise Lost(NoReply("the answer is not complete", sent=True)) from None
            raise UnexpectedAnswer(f"not HTTP/1.1: {error}") from None
        except OSError as error:
            raise Lost(NoReply(str(error) or "closed", sent=True)) from None


async def _connected(
    url: httpx.URL, proxy: Proxy | None, context: ssl.SSLContext | None
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """
    Raises:
        OSError, EOFError: there is no connection.
        InvalidCall: the proxy is one of SOCKS.
    """
    port = url.port or (443 if url.scheme == "https" else 80)
    if proxy is None:
        name = url.host if context else None
        return await asyncio.open_connection(url.host, port, ssl=context, server_hostname=name)
    at = proxy.httpx.url
    if at.scheme not in ("http", "https"):
        raise InvalidCall(
            f"{proxy.variable}: a stream cannot go through a proxy of SOCKS; NO_PROXY={url.host} "
            "asks the service directly"
        )
    outer = ssl.create_default_context() if at.scheme == "https" else None
    reader, writer = await asyncio.open_connection(
        at.host, at.port or (443 if outer else 80), ssl=outer
    )
    if context is not None:
        place = f"{url.host}:{port}".encode("ascii")
        auth = b"" if proxy.httpx.raw_auth is None else _basic(proxy).encode()
        lines = [b"CONNECT " + place + b" HTTP/1.1", b"Host: " + place]
        lines += [b"Proxy-Authorization: " + auth] if auth else []
        writer.write(b"\r\n".join([*lines, b"", b""]))
        head = await reader.readuntil(b"\r\n\r\n")
        if head.split(b" ", 2)[1:2] != [b"200"]:
            writer.transport.abort()
            raise ConnectionError(
                f"the proxy answered {head.splitlines()[0][:80].decode('latin-1')}"
            )
        await writer.start_tls(context, server_hostname=url.host)
    return reader, writer


def _basic(proxy: Proxy) -> str:
    user, password = proxy.httpx.raw_auth or (b"", b"")
    return "Basic " + b64encode(user + b":" + password).decode("ascii")
