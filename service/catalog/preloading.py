"""Adapters are loaded at a start: for some seconds before requests are answered, then beside them.

To load ten thousand takes longer than a service should be away, above all where its engine died.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from time import monotonic

from service.engine.interface import AdapterKey

# A start waits so long.
PRELOADING_SECONDS = 5.0
# What comes later takes this share of the time.
_SHARE = 0.25
_TOGETHER = 16


async def preload_all(
    keys: Sequence[AdapterKey], preload: Callable[[AdapterKey], Awaitable[None]]
) -> None:
    """Preload some at a time."""
    started = monotonic()
    for start in range(0, len(keys), _TOGETHER):
        began = monotonic()
        await asyncio.gather(*map(preload, keys[start : start + _TOGETHER]))
        if began - started > PRELOADING_SECONDS:
            await asyncio.sleep((monotonic() - began) * (1 / _SHARE - 1))


async def wait_at_most(seconds: float, task: asyncio.Future[None]) -> None:
    """Return when it has ended, or after this time, when it goes on; raises what it has raised."""
    done, _ = await asyncio.wait([task], timeout=seconds)
    if done:
        task.result()
