"""Thousands of stored adapters over few slots: Zipf traffic, and how long a cold adapter takes.

Every request names one adapter, the k-th most popular with a probability proportional to 1/k. With
`--per-request 1` every text names its own, which takes many more loads.
"""

import asyncio
import os
from argparse import ArgumentParser, Namespace
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from statistics import median
from time import perf_counter

import numpy as np
import uvloop

from adapters.tokenizer import Encoding
from benchmarks.arguments import add_model_arguments, at_least, duration
from benchmarks.loop import (
    closed_loop,
    entries_of,
    in_flight_for,
    percentiles_ms,
    settings_for,
    started,
)
from benchmarks.memory import device_mib, resident_mib
from benchmarks.report import BenchmarkFailed, Report, progress, spread
from benchmarks.stock import stocked
from benchmarks.subject import MEAN_TOKENS, Subject, loaded_subject
from benchmarks.texts import make_encodings
from benchmarks.turns import ratio, take_turns
from service.engine.engine import LocalEngine
from service.engine.interface import AdapterKey, Entry
from service.engine.observer import Observer, Tier

RESIDENT = "traffic over the active adapters alone"
ZIPF = "traffic over all stored adapters"
_TEXTS = 2048
# Requests that are drawn beforehand and repeated.
_REQUESTS = 20_000
# Texts in flight, as a multiple of those that keep the device busy: some wait for their adapter.
_IN_FLIGHT = 2
# Between two requests for cold adapters under load.
_PROBE_SECONDS = 0.1


class Traffic(Observer):
    """Counts loads and evictions by tier."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def adapter_loaded(self, key: AdapterKey, tier: Tier, seconds: float) -> None:  # noqa: ARG002
        self.counts[f"loads, {tier}"] += 1

    def adapter_evicted(self, key: AdapterKey, tier: Tier, age_seconds: float) -> None:  # noqa: ARG002
        self.counts[f"evictions, {tier}"] += 1


def add_arguments(parser: ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("--stored", type=at_least(1), default=10_000, help="adapters (hard links)")
    parser.add_argument("--slots", type=at_least(1), default=512, help="IDSPAM_MAX_ACTIVE_ADAPTERS")
    parser.add_argument("--distinct", type=at_least(1), default=256, help="different files")
    parser.add_argument("--per-request", type=at_least(1), default=32, help="texts of a request")
    parser.add_argument("--cold", type=at_least(1), default=200, help="cold adapters, when idle")
    parser.add_argument("--seconds", type=duration, default=5.0, help="of every round")
    parser.add_argument("--rounds", type=at_least(1), default=3)


def run(options: Namespace) -> Report:
    if options.stored < options.slots + 2 * options.cold:
        raise BenchmarkFailed("fewer adapters are stored than slots and cold requests need")
    with loaded_subject(options) as subject:
        progress(f"storing {options.stored} adapters")
        with stocked(subject.backbone, names=options.stored, distinct=options.distinct) as (
            store,
            keys,
        ):
            return uvloop.run(_run(subject, options, store, keys))


async def _run(
    subject: Subject, options: Namespace, store: Path, keys: Sequence[AdapterKey]
) -> Report:
    encodings = make_encodings(
        subject.backbone.encoder, subject.words, count=_TEXTS, mean_tokens=MEAN_TOKENS
    )
    settings = settings_for(str(subject.backbone.device), MAX_ACTIVE_ADAPTERS=str(options.slots))
    traffic = Traffic()
    # The last ones are asked for only to measure a cold adapter.
    popular, cold = keys[: -2 * options.cold], keys[-2 * options.cold :]
    active = popular[: options.slots]
    memory = {"before": _memory()}
    async with started(subject.backbone, store, settings, traffic) as engine:
        bench = _Bench(subject, options, engine, encodings, traffic)
        await bench.touch(active)
        memory["with all slots taken"] = _memory()
        idle = [await bench.answer(key) for key in cold[: options.cold]]
        bench.cold = iter(cold[options.cold :])
        first = entries_of(encodings, [popular[0]] * len(encodings), subject.spec)
        texts = _IN_FLIGHT * in_flight_for(settings, first)
        clients = max(1, round(texts / options.per_request))
        rates = await take_turns(
            {
                RESIDENT: lambda: bench.resident(active, clients),
                ZIPF: lambda: bench.zipf(popular, clients),
            },
            rounds=options.rounds,
        )
        memory["in the end"] = _memory()
    return _report(subject, options, bench, rates, idle, memory)


class _Bench:
    """One engine under load, and what was counted while all stored adapters were asked for."""

    def __init__(
        self,
        subject: Subject,
        options: Namespace,
        engine: LocalEngine,
        encodings: Sequence[Encoding],
        traffic: Traffic,
    ) -> None:
        self._subject, self._options, self._engine = subject, options, engine
        self._encodings, self._traffic = encodings, traffic
        self.cold: Iterator[AdapterKey] = iter(())
        self.cold_seconds: list[float] = []
        self.moved: Counter[str] = Counter()
        self.seconds = 0.0

    async def touch(self, keys: Sequence[AdapterKey]) -> None:
        """Make these adapters active, as far as they fit."""
        for key in keys:
            await self.answer(key)

    async def answer(self, key: AdapterKey) -> float:
        """Seconds until a short text is answered under this adapter."""
        entries = entries_of(self._encodings[:1], [key], self._subject.spec)
        sent = perf_counter()
        await self._engine.predict(entries)
        return perf_counter() - sent

    async def resident(self, keys: Sequence[AdapterKey], clients: int) -> float:
        """Texts/s when nothing has to be loaded."""
        await self.touch(keys)
        return await self._load(keys, clients)

    async def zipf(self, keys: Sequence[AdapterKey], clients: int) -> float:
        """Texts/s over all of them, with a request for a cold one now and then."""
        before, began = Counter(self._traffic.counts), perf_counter()
        probing = asyncio.create_task(self._probe())
        try:
            return await self._load(keys, clients)
        finally:
            probing.cancel()
            with suppress(asyncio.CancelledError):
                await probing
            self.moved += self._traffic.counts - before
            self.seconds += perf_counter() - began

    async def _load(self, keys: Sequence[AdapterKey], clients: int) -> float:
        seconds = self._options.seconds
        return await closed_loop(
            self._engine,
            self._requests(keys),
            clients=clients,
            seconds=seconds,
            warm_up=seconds / 2,
        )

    async def _probe(self) -> None:
        for key in self.cold:
            self.cold_seconds.append(await self.answer(key))
            await asyncio.sleep(_PROBE_SECONDS)

    def _requests(self, keys: Sequence[AdapterKey]) -> Iterator[list[Entry]]:
        """Requests of some texts under one adapter, drawn by popularity."""
        size = self._options.per_request
        rng = np.random.default_rng(0)
        shares = 1 / np.arange(1, len(keys) + 1)
        drawn = rng.choice(len(keys), size=_REQUESTS, p=shares / shares.sum())
        for number in range(10**9):
            key = keys[drawn[number % _REQUESTS]]
            start = number * size % (len(self._encodings) - size + 1)
            texts = self._encodings[start : start + size]
            yield entries_of(texts, [key] * size, self._subject.spec)


def _report(
    subject: Subject,
    options: Namespace,
    bench: _Bench,
    rates: dict[str, list[float]],
    idle: Sequence[float],
    memory: dict[str, dict[str, float]],
) -> Report:
    share = ratio(rates[ZIPF], rates[RESIDENT])
    moved = {f"{name} a second": count / bench.seconds for name, count in bench.moved.items()}
    cold = {"idle": percentiles_ms(idle), "under load": percentiles_ms(bench.cold_seconds)}
    rows = [
        [f"{ZIPF}, texts/s", f"{median(rates[ZIPF]):,.0f}"],
        [f"{RESIDENT}, texts/s", f"{median(rates[RESIDENT]):,.0f}"],
        ["the first over the second", f"{share:.3f}"],
    ]
    rows += [[name, f"{rate:,.1f}"] for name, rate in sorted(moved.items())]
    for when, ms in cold.items():
        cells = f"{ms['p50_ms']:.1f} / {ms['p99_ms']:.1f}"
        rows.append([f"cold adapter to answer, {when}, p50 / p99 ms", cells])
    for when, mib in memory.items():
        cells = f"{mib['host']:,.0f} / {mib['device']:,.0f}"
        rows.append([f"host / device MiB, {when}", cells])
    figures = {
        "texts_per_second": {name: spread(values) for name, values in rates.items()},
        "over_all_resident": share,
        "moved": moved,
        "cold": cold,
        "memory_mib": memory,
    }
    conditions = subject.conditions | {
        "adapters": f"{options.stored} stored, {min(options.stored, options.distinct)} different "
        f"files (hard links), {options.slots} slots; an adapter is a name and a revision, so each "
        "is read, prepared and given its own slot; files are in the page cache",
        "traffic": f"{options.per_request} texts a request under one adapter, Zipf(1.0), six "
        f"batches in flight; a cold one is asked for every {_PROBE_SECONDS * 1e3:.0f} ms",
        "rounds": f"{options.rounds} of {options.seconds:g} s, medians",
    }
    backbone = subject.conditions["backbone"]
    title = f"adapters: {options.stored} stored, {options.slots} slots, {backbone}"
    return Report(title, ("", "figure"), rows, figures, conditions)


def _memory() -> dict[str, float]:
    return {"host": resident_mib(os.getpid()), "device": device_mib()}
