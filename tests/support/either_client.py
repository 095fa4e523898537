"""Both clients through one interface, for tests that run with each."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any, cast

from service.client import AsyncClient, Client


class _Awaited:
    """An AsyncClient whose methods can be called like those of a Client."""

    def __init__(self, url: str, **options: Any) -> None:
        self._runner = asyncio.Runner()
        self._client = AsyncClient(url, **options)

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._client, "aclose" if name == "close" else name)

        def call(*arguments: Any, **options: Any) -> Any:
            return self._runner.run(self._result(method(*arguments, **options)))

        return call

    async def _result(self, awaited: Any) -> Any:
        if isinstance(awaited, AsyncIterator):
            return [result async for result in awaited]
        return await awaited

    def end(self) -> None:
        self._runner.run(self._client.aclose())
        self._runner.close()


@contextmanager
def either(kind: str, url: str) -> Iterator[Client]:
    """A `blocking` or an `awaited` client, until the block ends."""
    if kind == "blocking":
        with Client(url) as client:
            yield client
        return
    awaited = _Awaited(url)
    try:
        yield cast(Client, awaited)
    finally:
        awaited.end()
