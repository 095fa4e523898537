"""A real engine in a closed loop: a fixed number of clients, each with one request in flight.

Without HTTP; texts are tokenised before the clock starts.
"""

import asyncio
import random
from argparse import Namespace
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from itertools import cycle
from pathlib import Path
from time import perf_counter

from adapters.backbone.model import Backbone
from adapters.format.spec import AdapterSpec
from adapters.format.store import AdapterStore
from adapters.tokenizer import Encoding
from benchmarks.report import BenchmarkFailed
from benchmarks.turns import Measure
from service.engine.engine import LocalEngine
from service.engine.interface import AdapterKey, Entry, cost_of
from service.engine.observer import Observer
from service.engine.settings import EngineSettings
from service.local import engine_settings
from service.settings import read_settings
from service.start import freeze_loaded_objects

# Full batches in flight: one runs, one waits, one is being answered.
BATCHES = 3
# Adapters that are loaded at a time before a benchmark starts.
_LOADS = 8


def settings_for(device: str, **overrides: str) -> EngineSettings:
    """The settings that an engine's process has on this device; overrides without prefix."""
    environ = {f"IDSPAM_{key}": value for key, value in {"DEVICE": device, **overrides}.items()}
    return engine_settings(read_settings(environ), alone=True)


@asynccontextmanager
async def started(
    backbone: Backbone, store: Path, settings: EngineSettings, observer: Observer | None = None
) -> AsyncIterator[LocalEngine]:
    """A warm engine; stopped after the block."""
    engine = LocalEngine(lambda: backbone, AdapterStore(store), settings, observer)
    try:
        await engine.start()
        freeze_loaded_objects()
        yield engine
    finally:
        await engine.stop()


async def preload(engine: LocalEngine, keys: Sequence[AdapterKey]) -> None:
    """Activate as many of these adapters as fit."""
    limit = asyncio.Semaphore(_LOADS)

    async def one(key: AdapterKey) -> None:
        async with limit:
            await engine.preload(key)

    await asyncio.gather(*(one(key) for key in keys))


def entries_of(
    encodings: Sequence[Encoding], keys: Sequence[AdapterKey], spec: AdapterSpec
) -> list[Entry]:
    """An entry for each text, with the adapter at its index. spec: the adapters' common one."""
    return [
        Entry(key, encoding, cost_of(encoding, spec))
        for key, encoding in zip(keys, encodings, strict=True)
    ]


def entries_at_random(
    encodings: Sequence[Encoding],
    keys: Sequence[AdapterKey],
    specs: Mapping[AdapterKey, AdapterSpec],
) -> list[Entry]:
    """Each text under one of the adapters at random."""
    rng = random.Random(0)
    drawn = [rng.choice(keys) for _ in encodings]
    return [
        Entry(key, encoding, cost_of(encoding, specs[key]))
        for key, encoding in zip(drawn, encodings, strict=True)
    ]


def requests_of(entries: Sequence[Entry], size: int) -> list[list[Entry]]:
    """Requests of `size` texts each; a smaller rest is left out."""
    starts = range(0, len(entries) - size + 1, size)
    return [list(entries[start : start + size]) for start in starts]


async def closed_loop(
    engine: LocalEngine,
    requests: Iterator[Sequence[Entry]],
    *,
    clients: int,
    seconds: float,
    warm_up: float = 0.0,
) -> float:
    """Texts/s of so many clients, of which each sends its next request when one is answered.

    Only the `seconds` after the warm-up count; a request that lies partly inside them counts by the
    share of its time inside.

    Raises:
        BenchmarkFailed: a request failed. There are no figures with failures.
    """
    opens = perf_counter() + warm_up
    closes = opens + seconds
    texts = 0.0

    async def client() -> None:
        nonlocal texts
        while (sent := perf_counter()) < closes:
            entries = next(requests)
            await engine.predict(entries)
            done = perf_counter()
            inside = min(done, closes) - max(sent, opens)
            if inside > 0:
                texts += len(entries) * inside / (done - sent)

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(clients):
                group.create_task(client())
    except ExceptionGroup as group:
        raise BenchmarkFailed(f"a request failed: {group.exceptions[0]!r}") from group
    return texts / seconds


def measure_of(
    engine: LocalEngine, entries: Sequence[Entry], options: Namespace, in_flight: int
) -> Measure:
    """Measures texts/s of these entries, over and over.

    Args:
        options: `per_request`, `seconds`.
        in_flight: texts at a time.
    """
    return partial(
        closed_loop,
        engine,
        cycle(requests_of(entries, options.per_request)),
        clients=max(1, round(in_flight / options.per_request)),
        seconds=options.seconds,
        warm_up=options.seconds / 5,
    )


def in_flight_for(settings: EngineSettings, entries: Sequence[Entry]) -> int:
    """Texts of so many full batches as keep the device busy."""
    mean = sum(entry.cost for entry in entries) / len(entries)
    return max(1, round(BATCHES * settings.max_batch_tokens / mean))


def percentiles_ms(seconds: Sequence[float]) -> dict[str, float]:
    """p50, p90 and p99 in milliseconds, by nearest rank.

    Raises:
        BenchmarkFailed: there are no values.
    """
    ranked = sorted(seconds)
    if not ranked:
        raise BenchmarkFailed("nothing was answered in time")
    last = len(ranked) - 1
    return {
        f"p{share}_ms": ranked[min(last, len(ranked) * share // 100)] * 1e3
        for share in (50, 90, 99)
    }
