"""A real engine under a bounded closed loop: so many requests are in flight, always.

Knows no HTTP: entries are tokenised before the clock starts.
"""

import asyncio
from collections.abc import AsyncIterator, Coroutine, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, TypeVar

import uvloop

from adapters.backbone.model import Backbone
from adapters.backbone.tokenizer import Encoding
from adapters.format.spec import AdapterSpec
from adapters.format.store import AdapterStore
from benchmarks.report import BenchmarkFailed
from service.engine.engine import LocalEngine
from service.engine.interface import AdapterKey, Entry, cost_of
from service.engine.observer import Observer
from service.engine.settings import EngineSettings
from service.local import engine_settings
from service.settings import read_settings
from service.start import freeze_loaded_objects

T = TypeVar("T")

# What loads at once before a benchmark starts.
_LOADS = 8


@dataclass(slots=True)
class Load:
    """What a closed loop did within its window of so many seconds.

    texts: those of a request that is only partly inside count by the share of its time that is.
    """

    seconds: float
    texts: float = 0.0

    @property
    def texts_per_second(self) -> float:
        return self.texts / self.seconds


def run_async(work: Coroutine[Any, Any, T]) -> T:
    """On the event loop that the service has."""
    return uvloop.run(work)


def settings_for(device: str, **overrides: str) -> EngineSettings:
    """The limits that the service would give its engine on this device; overrides by setting."""
    environ = {"DEVICE": device} | overrides
    return engine_settings(
        read_settings({f"IDSPAM_{key}": value for key, value in environ.items()})
    )


@asynccontextmanager
async def started(
    backbone: Backbone,
    store: Path,
    settings: EngineSettings,
    observer: Observer | None = None,
) -> AsyncIterator[LocalEngine]:
    """A warm engine, stopped in the end."""
    engine = LocalEngine(lambda: backbone, AdapterStore(store), settings, observer)
    try:
        await engine.start()
        freeze_loaded_objects()
        yield engine
    finally:
        await engine.stop()


async def preload(engine: LocalEngine, keys: Sequence[AdapterKey]) -> None:
    """Activate adapters, as far as there is room."""
    limit = asyncio.Semaphore(_LOADS)

    async def one(key: AdapterKey) -> None:
        async with limit:
            await engine.preload(key)

    await asyncio.gather(*(one(key) for key in keys))


def entries_of(
    encodings: Sequence[Encoding], keys: Sequence[AdapterKey], spec: AdapterSpec
) -> list[Entry]:
    """Each text under its adapter; both are given one a text. spec: what the adapters share."""
    return [
        Entry(key, encoding, cost_of(encoding, spec))
        for key, encoding in zip(keys, encodings, strict=True)
    ]


def requests_of(entries: Sequence[Entry], size: int) -> list[list[Entry]]:
    """Cut into requests of `size` texts; a rest that is smaller is left out."""
    return [
        list(entries[start : start + size]) for start in range(0, len(entries) - size + 1, size)
    ]


async def closed_loop(
    engine: LocalEngine,
    requests: Iterator[Sequence[Entry]],
    *,
    clients: int,
    seconds: float,
    warm_up: float = 0.0,
) -> Load:
    """Send the next request as soon as one is answered, for so many clients at once.

    Only what is done in the `seconds` behind the warm-up counts.

    Raises:
        BenchmarkFailed: a request did: figures with failures in them are none.
    """
    load = Load(seconds)
    opens = perf_counter() + warm_up
    closes = opens + seconds

    async def client() -> None:
        while (sent := perf_counter()) < closes:
            entries = next(requests)
            await engine.predict(entries)
            done = perf_counter()
            inside = min(done, closes) - max(sent, opens)
            if inside > 0:
                load.texts += len(entries) * inside / (done - sent)

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(clients):
                group.create_task(client())
    except ExceptionGroup as group:
        raise BenchmarkFailed(f"a request failed: {group.exceptions[0]!r}") from group
    return load


def in_flight_for(settings: EngineSettings, entries: Sequence[Entry]) -> int:
    """Texts of three full batches: one runs, one waits behind it, one is being answered."""
    mean = sum(entry.cost for entry in entries) / len(entries)
    return max(1, round(3 * settings.max_batch_tokens / mean))


def percentiles_ms(seconds: Sequence[float]) -> dict[str, float]:
    """p50, p90 and p99 in milliseconds, by nearest rank.

    Raises:
        BenchmarkFailed: there is nothing to rank.
    """
    ranked = sorted(seconds)
    if not ranked:
        raise BenchmarkFailed("nothing was answered within the time")
    last = len(ranked) - 1
    places = {share: min(last, len(ranked) * share // 100) for share in (50, 90, 99)}
    return {f"p{share}_ms": ranked[place] * 1e3 for share, place in places.items()}
