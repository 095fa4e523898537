"""Turns for other requests during long work on the event loop.

Thousands of labels for hundreds of texts take a second to write. A thread would not help: Python
runs one at a time.
"""

import asyncio
from collections.abc import AsyncGenerator, Iterable
from time import perf_counter
from typing import TypeVar

T = TypeVar("T")

TURN_SECONDS = 0.005


async def in_turns(items: Iterable[T]) -> AsyncGenerator[T, None]:
    """The items. When making and using them has taken `TURN_SECONDS`, other requests get a turn."""
    since = perf_counter()
    for item in items:
        yield item
        if perf_counter() - since > TURN_SECONDS:
            await asyncio.sleep(0)
            since = perf_counter()
