"""The client that is awaited: the methods of `service.client.sync`, which has their words."""

import asyncio
from collections import deque
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    AsyncIterator,
    Iterable,
    Mapping,
    Sequence,
)
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar, Unpack

import httpx

from service.client import operations as calls
from service.client.batching import (
    IN_FLIGHT,
    PER_REQUEST,
    TIMEOUT_MS,
    Portion,
    aportions_of,
    check_sizes,
    counted_on,
)
from service.client.errors import Refused
from service.client.retrying import Call, Exchange, Exchanger, Retries
from service.client.transport import Address, AwaitedWire, Hooks, adrive
from service.client.types import (
    AdapterDetail,
    AdapterFile,
    AdapterSummary,
    Answer,
    Health,
    Options,
    Published,
    Result,
    Text,
)

T = TypeVar("T")


class AsyncClient:
    """As `Client`, by any number of tasks of one event loop. Close it with `aclose`."""

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        seconds: float = 60.0,
        connections: int = 16,
        retries: Retries | None = None,
        headers: Mapping[str, str] | None = None,
        event_hooks: Hooks | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        address = Address(url, api_key, headers or {}, seconds, connections)
        self._connections = connections
        self._wire = AwaitedWire(address, event_hooks=event_hooks, transport=transport)
        self._exchanger = Exchanger(url, retries or Retries())

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """As `Client.close`."""
        await self._wire.close()

    async def predict(
        self,
        inputs: Text | Sequence[Text],
        adapter: str | None = None,
        **options: Unpack[Options],
    ) -> Answer:
        """As `Client.predict`. Cancelled, the service drops what it has not begun."""
        return await self._call(calls.predict(inputs, adapter, options))

    def classify(
        self,
        inputs: Iterable[Text] | AsyncIterable[Text],
        adapter: str | None = None,
        *,
        per_request: int = PER_REQUEST,
        in_flight: int = IN_FLIGHT,
        **options: Unpack[Options],
    ) -> AsyncGenerator[Result, None]:
        """As `Client.classify`, of either kind of iterable.

        Whoever stops before the end closes it (`contextlib.aclosing`): requests are then cancelled.
        """
        check_sizes(
            inputs,
            per_request=per_request,
            in_flight=in_flight,
            connections=self._connections,
        )
        return self._classified(
            aportions_of(inputs, per_request=per_request), adapter, options, in_flight=in_flight
        )

    async def adapters(self) -> list[AdapterSummary]:
        """As `Client.adapters`."""
        return await self._run(calls.adapters(self._exchanger))

    async def adapter(self, name: str) -> AdapterDetail:
        """As `Client.adapter`."""
        return await self._call(calls.show(name))

    async def upload(
        self,
        name: str,
        file: bytes | Path | str,
        *,
        if_match: str | None = None,
        if_none_match: str | None = None,
    ) -> Published:
        """As `Client.upload`."""
        call = await asyncio.to_thread(
            calls.upload, name, file, if_match=if_match, if_none_match=if_none_match
        )
        return await self._call(call)

    async def download(self, name: str, revision: str | None = None) -> AdapterFile:
        """As `Client.download`."""
        return await self._call(calls.download(name, revision))

    async def rollback(
        self, name: str, revision: str | None = None, *, if_match: str | None = None
    ) -> Published:
        """As `Client.rollback`."""
        return await self._call(calls.rollback(name, revision, if_match=if_match))

    async def delete(self, name: str, *, if_match: str | None = None) -> None:
        """As `Client.delete`."""
        await self._call(calls.delete(name, if_match=if_match))

    async def health(self) -> Health:
        """As `Client.health`."""
        return await self._run(self._exchanger.once()(calls.health()))

    async def ready(self) -> Health:
        """As `Client.ready`."""
        return await self._run(self._exchanger.once()(calls.ready()))

    async def metrics(self) -> str:
        """As `Client.metrics`."""
        return await self._call(calls.metrics())

    async def _call(self, call: Call[T]) -> T:
        return await self._run(self._exchanger(call))

    async def _run(self, exchange: Exchange[T]) -> T:
        return await adrive(exchange, self._wire)

    async def _classified(
        self,
        portions: AsyncIterator[Portion],
        adapter: str | None,
        options: Options,
        *,
        in_flight: int,
    ) -> AsyncGenerator[Result, None]:
        patient: Options = {"timeout_ms": TIMEOUT_MS, **options}

        async def ask(portion: Portion) -> Answer:
            try:
                return await self._call(calls.predict(portion.inputs, adapter, patient))
            except Refused as error:
                raise counted_on(error, portion.first) from None

        waiting: deque[asyncio.Task[Answer]] = deque()
        try:
            async for portion in portions:
                waiting.append(asyncio.create_task(ask(portion)))
                while waiting and (len(waiting) == in_flight or waiting[0].done()):
                    for result in await waiting.popleft():
                        yield result
            while waiting:
                for result in await waiting.popleft():
                    yield result
        finally:
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)
