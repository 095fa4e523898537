"""Drives exchanges over httpx, blocking or awaited. No other module uses httpx to send anything."""

import asyncio
import ssl
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias, TypeVar, cast

import httpx

from service.client.errors import Closed, InvalidCall
from service.client.proxies import Proxy, proxy_of
from service.client.retry import Exchange, NoReply, Outcome, Reply, Request

T = TypeVar("T")
Hooks: TypeAlias = Mapping[str, list[Callable[..., Any]]]

CONNECT_SECONDS = 10.0
# Shorter than the service keeps idle connections, so that no request is sent on a closing one.
_KEEP_ALIVE_SECONDS = 4.0
# Errors that occur before anything is sent.
_UNSENT = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout, httpx.ProxyError)


@dataclass(frozen=True, slots=True)
class Address:
    """Where requests go, how, and what all of them have in common.

    seconds: until an answer must have begun. connections: requests at a time; others wait. ca: a
    file of certificate authorities in PEM format, in place of those that httpx brings.

    Raises:
        InvalidCall: an address, key, file or number that cannot be used.
    """

    url: str
    api_key: str | None
    headers: Mapping[str, str]
    seconds: float
    connections: int
    ca: str | None = None

    def __post_init__(self) -> None:
        try:
            url = httpx.URL(self.url)
        except httpx.InvalidURL as error:
            raise InvalidCall(f"{self.url!r} is no address: {error}") from None
        if url.scheme not in ("http", "https") or not url.host or url.query or url.fragment:
            raise InvalidCall(f"{self.url!r} is no address: expected http://host:port")
        for value in (self.api_key or "", *self.headers, *self.headers.values()):
            if value and not (value.isascii() and value.isprintable()):
                raise InvalidCall("keys and headers must be printable ASCII")
        if self.connections < 1 or not self.seconds > 0:
            raise InvalidCall("a client needs at least one connection, and positive seconds")

    def proxy(self) -> Proxy | None:
        """The proxy between here and the service; raises as `proxy_of`."""
        return proxy_of(httpx.URL(self.url))

    def connecting(self, proxy: Proxy | None) -> dict[str, Any]:
        """Arguments for either of httpx's transports."""
        return {
            "verify": self._verify(),
            "limits": httpx.Limits(
                max_connections=self.connections,
                max_keepalive_connections=self.connections,
                keepalive_expiry=_KEEP_ALIVE_SECONDS,
            ),
            "proxy": proxy.httpx if proxy else None,
        }

    def options(self, event_hooks: Hooks | None) -> dict[str, Any]:
        """Arguments for either of httpx's clients."""
        return {"base_url": self.url, "headers": self.common(), "event_hooks": event_hooks}

    def common(self) -> dict[str, str]:
        """The headers of every request."""
        key = {} if self.api_key is None else {"authorization": f"Bearer {self.api_key}"}
        return key | dict(self.headers)

    def longer(self, seconds: float) -> "Address":
        """The same with more time for answers."""
        return replace(self, seconds=self.seconds + seconds)

    def context(self) -> ssl.SSLContext | None:
        """For connections that httpx does not make; None if the address is not https."""
        verify = self._verify()
        return httpx.create_ssl_context() if verify is True else verify or None

    def _verify(self) -> bool | ssl.SSLContext:
        # Loading all certificate authorities takes longer than many a request.
        if httpx.URL(self.url).scheme != "https":
            return False
        if self.ca is None:
            return True
        try:
            return ssl.create_default_context(cafile=self.ca)
        except OSError as error:
            is_pem = isinstance(error, ssl.SSLError)
            reason = "no certificates in PEM format" if is_pem else error.strerror
            raise InvalidCall(f"certificate authorities {self.ca!r}: {reason}") from None

    def request(self, http: httpx.Client | httpx.AsyncClient, request: Request) -> httpx.Request:
        """
        Raises:
            Closed: the client was closed.
        """
        if http.is_closed:
            raise Closed(f"the client of {self.url} is closed")
        return http.build_request(
            request.method,
            request.path,
            params=request.params or None,
            headers=request.headers,
            content=request.body,
            timeout=httpx.Timeout(self.seconds + request.seconds, connect=CONNECT_SECONDS),
        )


class BlockingTransport:
    """Runs exchanges for any number of threads. proxy: which they go through.

    httpx gets no more requests at a time than it has connections. While requests wait inside it, it
    may close a connection that another thread has just begun to use, and that thread then hangs.
    """

    def __init__(
        self, address: Address, event_hooks: Hooks | None, transport: httpx.BaseTransport | None
    ) -> None:
        self._address = address
        self._room = threading.BoundedSemaphore(address.connections)
        self.proxy = None if transport else address.proxy()
        self._http = httpx.Client(
            **address.options(event_hooks),
            transport=transport or httpx.HTTPTransport(**address.connecting(self.proxy)),
        )

    def run(self, exchange: Exchange[T], pause: Callable[[float], object] = time.sleep) -> T:
        """Make the exchange's attempts and return its answer. pause: waits, or raises."""
        try:
            attempt = next(exchange)
            while True:
                pause(attempt.delay)
                attempt = exchange.send(self._send(attempt.request))
        except StopIteration as done:
            return cast(T, done.value)

    def _send(self, request: Request) -> Outcome:
        with self._room:
            try:
                return _reply(self._http.send(self._address.request(self._http, request)))
            except httpx.RequestError as error:
                return _no_reply(error)

    def close(self) -> None:
        self._http.close()


class AsyncTransport:
    """As `BlockingTransport`, for any number of tasks of one event loop."""

    def __init__(
        self,
        address: Address,
        event_hooks: Hooks | None,
        transport: httpx.AsyncBaseTransport | None,
    ) -> None:
        self._address = address
        self._room = asyncio.BoundedSemaphore(address.connections)
        self.proxy = None if transport else address.proxy()
        self._http = httpx.AsyncClient(
            **address.options(event_hooks),
            transport=transport or httpx.AsyncHTTPTransport(**address.connecting(self.proxy)),
        )

    async def run(self, exchange: Exchange[T]) -> T:
        """As `BlockingTransport.run`."""
        try:
            attempt = next(exchange)
            while True:
                if attempt.delay:
                    await asyncio.sleep(attempt.delay)
                attempt = exchange.send(await self._send(attempt.request))
        except StopIteration as done:
            return cast(T, done.value)

    async def _send(self, request: Request) -> Outcome:
        async with self._room:
            try:
                return _reply(await self._http.send(self._address.request(self._http, request)))
            except httpx.RequestError as error:
                return _no_reply(error)

    async def close(self) -> None:
        await self._http.aclose()


def _reply(response: httpx.Response) -> Reply:
    headers = {name.lower(): value for name, value in response.headers.items()}
    return Reply(response.status_code, headers, response.content)


def _no_reply(error: httpx.RequestError) -> NoReply:
    """
    Raises:
        InvalidCall: a hook of the caller's has set a header that cannot be sent.
    """
    if isinstance(error, httpx.LocalProtocolError):
        raise InvalidCall(f"this cannot be sent: {error}") from None
    return NoReply(str(error) or type(error).__name__, sent=not isinstance(error, _UNSENT))
