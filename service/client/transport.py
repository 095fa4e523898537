"""Exchanges over httpx, blocking or awaited: the one place that knows httpx. Knows no route."""

import asyncio
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

import httpx

from service.client.errors import Closed, InvalidCall
from service.client.retrying import Broken, Exchange, Outcome, Reply, Request, Wait

T = TypeVar("T")
Hooks: TypeAlias = Mapping[str, list[Callable[..., Any]]]

CONNECT_SECONDS = 10.0
# Shorter than the service keeps an idle connection: no request meets one that is just being closed.
_KEEP_ALIVE_SECONDS = 4.0
# Nothing was sent before these.
_UNSENT = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout, httpx.ProxyError)


@dataclass(frozen=True, slots=True)
class Address:
    """Where requests go and what each of them carries.

    seconds: until an answer must have begun. connections: requests at a time; more wait.

    Raises:
        InvalidCall: no such address, key or number can be.
    """

    url: str
    api_key: str | None
    headers: Mapping[str, str]
    seconds: float
    connections: int

    def __post_init__(self) -> None:
        try:
            url = httpx.URL(self.url)
        except httpx.InvalidURL as error:
            raise InvalidCall(f"{self.url!r} is no address: {error}") from None
        if url.scheme not in ("http", "https") or not url.host or url.query or url.fragment:
            raise InvalidCall(f"{self.url!r} is no address: expected http://host:port")
        for value in (self.api_key or "", *self.headers, *self.headers.values()):
            if not (value.isascii() and value.isprintable()) and value:
                raise InvalidCall("keys and headers are printable ASCII")
        if self.connections < 1 or not self.seconds > 0:
            raise InvalidCall("a client has one connection or more, and seconds to wait")

    def options(self, event_hooks: Hooks | None) -> dict[str, Any]:
        """For either of httpx's clients."""
        key = {} if self.api_key is None else {"authorization": f"Bearer {self.api_key}"}
        return {
            "base_url": self.url,
            "headers": key | dict(self.headers),
            "event_hooks": event_hooks,
            # Reading all authorities takes longer than many a request.
            "verify": httpx.URL(self.url).scheme == "https",
            "limits": httpx.Limits(
                max_connections=self.connections,
                max_keepalive_connections=self.connections,
                keepalive_expiry=_KEEP_ALIVE_SECONDS,
            ),
        }

    def request(self, http: httpx.Client | httpx.AsyncClient, request: Request) -> httpx.Request:
        """
        Raises:
            Closed: no more requests go there.
        """
        if http.is_closed:
            raise Closed(f"the client of {self.url} is closed")
        patience = self.seconds + request.seconds
        return http.build_request(
            request.method,
            request.path,
            params=request.params or None,
            headers=request.headers,
            content=request.body,
            timeout=httpx.Timeout(patience, connect=CONNECT_SECONDS),
        )


class BlockingWire:
    """Sends and waits; for any number of threads.

    No more requests are given to httpx than it has connections: where some wait inside it, it may
    close a connection that another thread has just begun to use, and that thread then hangs.
    """

    def __init__(
        self, address: Address, *, event_hooks: Hooks | None, transport: httpx.BaseTransport | None
    ) -> None:
        self._address = address
        self._room = threading.BoundedSemaphore(address.connections)
        self._http = httpx.Client(**address.options(event_hooks), transport=transport)

    def send(self, request: Request) -> Outcome:
        with self._room, _caught() as caught:
            response = self._http.send(self._address.request(self._http, request))
            caught.outcome = _reply(response)
        return caught.outcome

    def close(self) -> None:
        self._http.close()


class AwaitedWire:
    """As `BlockingWire`, for any number of tasks of one event loop."""

    def __init__(
        self,
        address: Address,
        *,
        event_hooks: Hooks | None,
        transport: httpx.AsyncBaseTransport | None,
    ) -> None:
        self._address = address
        self._room = asyncio.BoundedSemaphore(address.connections)
        self._http = httpx.AsyncClient(**address.options(event_hooks), transport=transport)

    async def send(self, request: Request) -> Outcome:
        async with self._room:
            with _caught() as caught:
                response = await self._http.send(self._address.request(self._http, request))
                caught.outcome = _reply(response)
        return caught.outcome

    async def close(self) -> None:
        await self._http.aclose()


def drive(exchange: Exchange[T], wire: BlockingWire, pause: Callable[[float], object]) -> T:
    """Do what the exchange asks for. pause: waits for so many seconds, or raises."""
    outcome: Outcome = None
    while True:
        try:
            step = exchange.send(outcome)
        except StopIteration as done:
            answer: T = done.value
            return answer
        outcome = None
        if isinstance(step, Wait):
            pause(step.seconds)
        else:
            outcome = wire.send(step)


async def adrive(exchange: Exchange[T], wire: AwaitedWire) -> T:
    """As `drive`, awaited."""
    outcome: Outcome = None
    while True:
        try:
            step = exchange.send(outcome)
        except StopIteration as done:
            answer: T = done.value
            return answer
        outcome = None
        if isinstance(step, Wait):
            await asyncio.sleep(step.seconds)
        else:
            outcome = await wire.send(step)


class _Caught:
    """What came of a request."""

    outcome: Outcome = None


@contextmanager
def _caught() -> Iterator[_Caught]:
    """Turns what httpx raises into an outcome.

    Raises:
        InvalidCall: a header that is none, from a hook of the caller's.
    """
    caught = _Caught()
    try:
        yield caught
    except httpx.LocalProtocolError as error:
        raise InvalidCall(f"this cannot be sent: {error}") from None
    except httpx.RequestError as error:
        reason = str(error) or type(error).__name__
        caught.outcome = Broken(reason, sent=not isinstance(error, _UNSENT))


def _reply(response: httpx.Response) -> Reply:
    headers = {name.lower(): value for name, value in response.headers.items()}
    return Reply(response.status_code, headers, response.content)
