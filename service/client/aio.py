"""The awaitable client. `service.client.sync` has the same methods and documents them."""

import asyncio
from collections import deque
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    AsyncIterator,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Literal, Self, TypeVar, Unpack

import httpx

from service.client import operations
from service.client.batch import (
    IN_FLIGHT,
    PER_REQUEST,
    TIMEOUT_MS,
    Chunk,
    achunks_of,
    check_many,
    check_sizes,
    one_by_one,
    renumbered,
    results_of,
)
from service.client.environment import from_environment
from service.client.errors import Refused
from service.client.retry import ONCE, Call, Exchanger, Retries
from service.client.streaming import STREAM_SECONDS, Lines
from service.client.transport import Address, AsyncTransport, Hooks
from service.client.types import (
    AdapterDetail,
    AdapterFile,
    AdapterState,
    AdapterSummary,
    Answer,
    Card,
    Drift,
    Embeddings,
    Health,
    Options,
    Published,
    Ranking,
    Result,
    RevisionDifference,
    Rule,
    Text,
    TrafficDetail,
    Unanswered,
    UncertainText,
    UploadReport,
    Wait,
)

T = TypeVar("T")


class AsyncClient:
    """As `Client`, for any number of tasks of one event loop. Close it with `aclose`."""

    def __init__(
        self,
        url: str | None = None,
        *,
        api_key: str | None = None,
        seconds: float = 60.0,
        connections: int = 16,
        retries: Retries | None = None,
        headers: Mapping[str, str] | None = None,
        ca: str | None = None,
        event_hooks: Hooks | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        url, api_key, ca = from_environment(url, api_key, ca)
        address = Address(url, api_key, headers or {}, seconds, connections, ca)
        self._address = address
        self._connections = connections
        self._transport = AsyncTransport(address, event_hooks, transport)
        via = "" if self._transport.proxy is None else str(self._transport.proxy)
        self._exchanger = Exchanger(url, retries or Retries(), via=via)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """As `Client.close`."""
        await self._transport.close()

    async def predict(
        self,
        inputs: Text | Sequence[Text],
        adapter: str | None = None,
        *,
        adapters: Sequence[str] | None = None,
        **options: Unpack[Options],
    ) -> Answer:
        """As `Client.predict`. If it is cancelled, the service drops what it has not begun."""
        return await self._call(operations.predict(inputs, adapter, options, adapters))

    def classify(
        self,
        inputs: Iterable[Text] | AsyncIterable[Text],
        adapter: str | None = None,
        *,
        adapters: Sequence[str] | None = None,
        per_request: int = PER_REQUEST,
        in_flight: int = IN_FLIGHT,
        **options: Unpack[Options],
    ) -> AsyncGenerator[Result, None]:
        """As `Client.classify`, for either kind of iterable.

        A caller that stops early must close the generator (`contextlib.aclosing`), which cancels
        the requests in flight.
        """
        check_sizes(
            inputs, per_request=per_request, in_flight=in_flight, connections=self._connections
        )
        patient: Options = {"timeout_ms": TIMEOUT_MS, **options}
        each = len(adapters) if adapters else 1
        chunks = achunks_of(inputs, per_request=per_request, each=each)
        return self._classified(chunks, in_flight, adapter, adapters, patient)

    def stream(
        self,
        inputs: Iterable[Text] | AsyncIterable[Text],
        adapter: str | None = None,
        **options: Unpack[Options],
    ) -> AsyncGenerator[Result | Unanswered, None]:
        """As `Client.stream`, for either kind of iterable.

        A caller that stops early must close the generator (`contextlib.aclosing`).
        """
        check_many(inputs)
        lines = self._lines(adapter, options)
        return self._streamed(inputs, lines)

    async def rerank(
        self,
        query: str,
        documents: Sequence[str],
        adapter: str | None = None,
        *,
        label: str | None = None,
        top_n: int | None = None,
        truncate: bool = True,
        request_id: str | None = None,
        request_key: str | None = None,
    ) -> Ranking:
        """As `Client.rerank`."""
        return await self._call(
            operations.rerank(
                query,
                documents,
                adapter,
                label=label,
                top_n=top_n,
                truncate=truncate,
                request_id=request_id,
                request_key=request_key,
            )
        )

    async def embed(
        self,
        inputs: str | Sequence[str],
        *,
        dimensions: int | None = None,
        truncate: bool = True,
        request_id: str | None = None,
    ) -> Embeddings:
        """As `Client.embed`."""
        return await self._call(
            operations.embed(
                inputs, dimensions=dimensions, truncate=truncate, request_id=request_id
            )
        )

    async def adapters(
        self, *, search: str = "", state: AdapterState | None = None
    ) -> list[AdapterSummary]:
        """As `Client.adapters`."""
        return await self._transport.run(operations.adapters(self._exchanger, search, state))

    async def adapter(self, name: str) -> AdapterDetail:
        """As `Client.adapter`."""
        return await self._call(operations.show(name))

    async def upload(
        self,
        name: str,
        file: bytes | Path | str,
        *,
        if_match: str | None = None,
        if_none_match: str | None = None,
        force: bool = False,
        stage: bool = False,
        wait: Wait | None = None,
    ) -> Published:
        """As `Client.upload`."""
        call = await asyncio.to_thread(
            operations.upload,
            name,
            file,
            if_match=if_match,
            if_none_match=if_none_match,
            force=force,
            stage=stage,
            wait=wait,
        )
        return await self._call(call)

    async def check(
        self,
        name: str,
        file: bytes | Path | str,
        *,
        if_match: str | None = None,
        if_none_match: str | None = None,
        force: bool = False,
        stage: bool = False,
    ) -> UploadReport:
        """As `Client.check`."""
        call = await asyncio.to_thread(
            operations.check,
            name,
            file,
            if_match=if_match,
            if_none_match=if_none_match,
            force=force,
            stage=stage,
        )
        return await self._call(call)

    async def download(self, name: str, revision: str | None = None) -> AdapterFile:
        """As `Client.download`."""
        return await self._call(operations.download(name, revision))

    async def difference(
        self, name: str, before: str | None = None, after: str | None = None
    ) -> RevisionDifference:
        """As `Client.difference`."""
        return await self._call(operations.difference(name, before, after))

    async def card(self, name: str, revision: str | None = None) -> Card:
        """As `Client.card`."""
        return await self._call(operations.card(name, revision))

    async def set_card(
        self, name: str, text: str, revision: str | None = None, *, if_match: str | None = None
    ) -> str:
        """As `Client.set_card`."""
        return await self._call(operations.set_card(name, text, revision, if_match=if_match))

    async def unload(self, name: str) -> None:
        """As `Client.unload`."""
        await self._call(operations.unload(name))

    async def load(self, name: str) -> None:
        """As `Client.load`."""
        await self._call(operations.load(name))

    async def rollback(
        self,
        name: str,
        revision: str | None = None,
        *,
        if_match: str | None = None,
        wait: Wait | None = None,
    ) -> Published:
        """As `Client.rollback`."""
        return await self._call(operations.rollback(name, revision, if_match=if_match, wait=wait))

    async def delete(
        self, name: str, *, if_match: str | None = None, wait: Wait | None = None
    ) -> None:
        """As `Client.delete`."""
        await self._call(operations.delete(name, if_match=if_match, wait=wait))

    async def delete_revision(
        self,
        name: str,
        revision: str,
        *,
        if_match: str | None = None,
        wait: Wait | None = None,
    ) -> None:
        """As `Client.delete_revision`."""
        await self._call(operations.delete_revision(name, revision, if_match=if_match, wait=wait))

    async def set_traffic(
        self,
        name: str,
        revision: str,
        percent: float,
        *,
        shadow: bool = False,
        rule: Rule | None = None,
        if_match: str | None = None,
        wait: Wait | None = None,
    ) -> TrafficDetail:
        """As `Client.set_traffic`."""
        return await self._call(
            operations.set_traffic(
                name, revision, percent, shadow=shadow, rule=rule, if_match=if_match, wait=wait
            )
        )

    async def traffic(self, name: str) -> TrafficDetail:
        """As `Client.traffic`."""
        return await self._call(operations.traffic(name))

    async def end_traffic(
        self, name: str, *, if_match: str | None = None, wait: Wait | None = None
    ) -> None:
        """As `Client.end_traffic`."""
        await self._call(operations.end_traffic(name, if_match=if_match, wait=wait))

    async def promote(
        self, name: str, *, if_match: str | None = None, wait: Wait | None = None
    ) -> Published:
        """As `Client.promote`."""
        return await self._call(operations.promote(name, if_match=if_match, wait=wait))

    async def drift(self, name: str, revision: str | None = None) -> Drift:
        """As `Client.drift`."""
        return await self._call(operations.drift(name, revision))

    async def uncertain(self, name: str) -> tuple[UncertainText, ...]:
        """As `Client.uncertain`."""
        return await self._call(operations.uncertain(name))

    async def uncertain_file(self, name: str, format: Literal["jsonl", "csv"]) -> bytes:
        """As `Client.uncertain_file`."""
        return await self._call(operations.uncertain_file(name, format))

    async def forget_uncertain(self, name: str) -> None:
        """As `Client.forget_uncertain`."""
        await self._call(operations.forget_uncertain(name))

    async def health(self) -> Health:
        """As `Client.health`."""
        return await self._probe("/healthz")

    async def ready(self) -> Health:
        """As `Client.ready`."""
        return await self._probe("/readyz")

    async def metrics(self, names: Sequence[str] = ()) -> str:
        """As `Client.metrics`."""
        return await self._call(operations.metrics(names))

    async def _call(self, call: Call[T]) -> T:
        return await self._transport.run(self._exchanger(call))

    async def _probe(self, path: str) -> Health:
        exchange = replace(self._exchanger, retries=ONCE)(operations.probe(path))
        return await self._transport.run(exchange)

    def _lines(self, adapter: str | None, options: Options) -> Lines:
        params, headers = operations.stream_params(adapter, options)
        return Lines(
            [self._address.longer(STREAM_SECONDS)],
            params=params,
            headers=headers,
            retries=self._exchanger.retries,
            timeouts_final="timeout_ms" in options,
        )

    async def _streamed(
        self, inputs: Iterable[Text] | AsyncIterable[Text], lines: Lines
    ) -> AsyncGenerator[Result | Unanswered, None]:
        feeding = asyncio.create_task(_feed(inputs, lines))
        try:
            async with aclosing(lines.answers()) as answers:
                async for some in answers:
                    for answer in some:
                        yield operations.stream_answer(answer)
            # Its error, if the inputs have ended with one.
            await feeding
        finally:
            feeding.cancel()
            await asyncio.gather(feeding, return_exceptions=True)

    async def _classified(
        self,
        chunks: AsyncIterator[Chunk | Exception],
        in_flight: int,
        adapter: str | None,
        adapters: Sequence[str] | None,
        options: Options,
    ) -> AsyncGenerator[Result, None]:

        async def predict(chunk: Chunk | Exception) -> Iterator[Result]:
            if isinstance(chunk, Exception):
                raise chunk
            try:
                call = operations.predict(chunk.inputs, adapter, options, adapters)
                return results_of(await self._call(call), chunk.first)
            except Refused as error:
                raise renumbered(error, chunk.first) from None

        pending: deque[asyncio.Task[Iterator[Result]]] = deque()
        try:
            async for chunk in chunks:
                pending.append(asyncio.create_task(predict(chunk)))
                while pending and (len(pending) == in_flight or pending[0].done()):
                    for result in await pending.popleft():
                        yield result
            while pending:
                for result in await pending.popleft():
                    yield result
        finally:
            for task in pending:
                task.cancel()
            await asyncio.gather(*pending, return_exceptions=True)


async def _feed(inputs: Iterable[Text] | AsyncIterable[Text], lines: Lines) -> None:
    """Put inputs as far as there is room. An error of theirs ends them."""
    try:
        async for text in one_by_one(inputs):
            lines.put([operations.stream_line(text)])
            await lines.until_room()
    finally:
        lines.close()
