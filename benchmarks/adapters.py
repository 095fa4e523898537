"""Thousands of stored adapters over few slots: Zipf traffic, and how long a cold adapter takes.

Every request names one adapter, the k-th most popular with a probability proportional to 1/k. With
`--per-request 1` every text names its own, which takes many more loads.

Two engines take turns over the same store: one reads images (`service.engine.images`), the other
one every adapter's file.
"""

import asyncio
import os
from argparse import ArgumentParser, Namespace
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack, suppress
from itertools import cycle
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import uvloop

from adapters.adapter import prepare
from adapters.backbone.model import random_adapter
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
from benchmarks.turns import Measure, ratio, take_turns
from service.engine.engine import LocalEngine
from service.engine.interface import AdapterKey, Entry
from service.engine.observer import ImageEvent, Observer, Tier
from service.engine.settings import EngineSettings

RESIDENT = "traffic over the active adapters alone"
ZIPF = "traffic over all stored adapters"
CHURN = "a new adapter for every text"
# How an engine gets its adapters, and the limit of its images in MiB.
WAYS = {"images": "65536", "files": "0"}
# Requests at a time when every text names a new adapter.
_CHURNING = 64
_TEXTS = 2048
# Requests that are drawn beforehand and repeated.
_REQUESTS = 20_000
# Texts in flight, as a multiple of those that keep the device busy: some wait for their adapter.
_IN_FLIGHT = 2
# Between two requests for cold adapters under load.
_PROBE_SECONDS = 0.1


class Traffic(Observer):
    """Counts loads and evictions by tier, and images."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def adapter_loaded(self, key: AdapterKey, tier: Tier, seconds: float) -> None:  # noqa: ARG002
        self.counts[f"loads, {tier}"] += 1

    def adapter_evicted(self, key: AdapterKey, tier: Tier, age_seconds: float) -> None:  # noqa: ARG002
        self.counts[f"evictions, {tier}"] += 1

    def adapter_image(self, event: ImageEvent) -> None:
        self.counts[f"images, {event}"] += 1


def add_arguments(parser: ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("--stored", type=at_least(1), default=10_000, help="adapters (hard links)")
    parser.add_argument("--slots", type=at_least(1), default=512, help="IDSPAM_MAX_ACTIVE_ADAPTERS")
    parser.add_argument("--distinct", type=at_least(1), default=256, help="different files")
    parser.add_argument("--per-request", type=at_least(1), default=32, help="texts of a request")
    parser.add_argument("--ways", choices=("both", *WAYS), default="both", help="what is measured")
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
    ways = list(WAYS) if options.ways == "both" else [options.ways]
    memory = {"before": _memory()}
    async with AsyncExitStack() as stack:
        benches = {}
        for way in ways:
            settings, traffic = _settings(subject, options, way), Traffic()
            engine = await stack.enter_async_context(
                started(subject.backbone, store, settings, traffic)
            )
            benches[way] = _Bench(subject, options, engine, settings, traffic, keys)
            progress(f"cold adapters, from {way}")
            await benches[way].begin()
        memory["with all slots taken"] = _memory()
        measures: dict[str, Measure] = {}
        for way, bench in benches.items():
            measures |= {
                _of(way, RESIDENT): bench.resident,
                _of(way, ZIPF): bench.zipf,
                _of(way, CHURN): bench.churn,
            }
        rates = await take_turns(measures, rounds=options.rounds)
        memory["in the end"] = _memory()
    return _report(subject, options, benches, rates, memory)


def _settings(subject: Subject, options: Namespace, way: str) -> EngineSettings:
    """Every slot can be taken, by adapters of this size."""
    nbytes = prepare(random_adapter(subject.backbone), subject.backbone).nbytes
    return settings_for(
        str(subject.backbone.device),
        MAX_ACTIVE_ADAPTERS=str(options.slots),
        MAX_ACTIVE_MIB=str((options.slots + 1) * nbytes // 2**20 + 1),
        IMAGES_MIB=WAYS[way],
        # A slow minute of the machine must not refuse anything.
        MAX_WAITING_TOKENS=str(2**22),
    )


def _of(way: str, what: str) -> str:
    return f"{what}, from {way}"


class _Bench:
    """One engine under load, and what was counted while all stored adapters were asked for."""

    def __init__(
        self,
        subject: Subject,
        options: Namespace,
        engine: LocalEngine,
        settings: EngineSettings,
        traffic: Traffic,
        keys: Sequence[AdapterKey],
    ) -> None:
        self._subject, self._options, self._engine = subject, options, engine
        self._traffic = traffic
        self._encodings = make_encodings(
            subject.backbone.encoder, subject.words, count=_TEXTS, mean_tokens=MEAN_TOKENS
        )
        # The last ones are asked for only to measure a cold adapter.
        self._popular, self._cold = keys[: -2 * options.cold], keys[-2 * options.cold :]
        self._active = self._popular[: options.slots]
        first = entries_of(self._encodings, [keys[0]] * len(self._encodings), subject.spec)
        texts = _IN_FLIGHT * in_flight_for(settings, first)
        self._clients = max(1, round(texts / options.per_request))
        # The least popular first: those are not in host memory.
        self._churned = cycle(reversed(self._popular))
        self._probes = iter(self._cold[options.cold :])
        self.idle_seconds: list[float] = []
        self.cold_seconds: list[float] = []
        self.moved: Counter[str] = Counter()
        self.seconds = 0.0

    @property
    def images(self) -> Counter[str]:
        """What happened to images up to now."""
        return Counter(
            {name: count for name, count in self._traffic.counts.items() if "images" in name}
        )

    async def begin(self) -> None:
        """Fill the slots, and ask for cold adapters while nothing else is asked.

        Every file has been read once before, as after its upload.
        """
        await self.touch(self._popular[: self._options.distinct])
        await self.touch(self._active)
        self.idle_seconds = [await self.answer(key) for key in self._cold[: self._options.cold]]

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

    async def resident(self) -> float:
        """Texts/s when nothing has to be loaded."""
        await self.touch(self._active)
        return await self._load(self._active)

    async def churn(self) -> float:
        """Texts/s, and so loads/s, when every text names an adapter that is not in memory."""
        seconds = self._options.seconds
        texts = cycle(self._encodings)
        requests = (
            entries_of([text], [key], self._subject.spec)
            for text, key in zip(texts, self._churned, strict=False)
        )
        return await closed_loop(
            self._engine, requests, clients=_CHURNING, seconds=seconds, warm_up=seconds / 5
        )

    async def zipf(self) -> float:
        """Texts/s over all of them, with a request for a cold one now and then."""
        before, began = Counter(self._traffic.counts), perf_counter()
        probing = asyncio.create_task(self._probe())
        try:
            return await self._load(self._popular)
        finally:
            probing.cancel()
            with suppress(asyncio.CancelledError):
                await probing
            self.moved += self._traffic.counts - before
            self.seconds += perf_counter() - began

    async def _load(self, keys: Sequence[AdapterKey]) -> float:
        seconds = self._options.seconds
        return await closed_loop(
            self._engine,
            self._requests(keys),
            clients=self._clients,
            seconds=seconds,
            warm_up=seconds / 2,
        )

    async def _probe(self) -> None:
        for key in self._probes:
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
    benches: dict[str, _Bench],
    rates: dict[str, list[float]],
    memory: dict[str, dict[str, float]],
) -> Report:
    figures: dict[str, Any] = {
        "texts_per_second": {name: spread(values) for name, values in rates.items()},
        "memory_mib": memory,
    }
    columns = {way: _figures_of(bench, rates, way) for way, bench in benches.items()}
    figures |= {way: of_way for way, (_, of_way) in columns.items()}
    names = list(dict.fromkeys(name for rows, _ in columns.values() for name in rows))
    rows = [[name, *(rows.get(name, "") for rows, _ in columns.values())] for name in names]
    for when, mib in memory.items():
        cells = f"{mib['host']:,.0f} / {mib['device']:,.0f}"
        rows.append([f"host / device MiB, {when}", *([cells] * len(columns))])
    conditions = subject.conditions | {
        "adapters": f"{options.stored} stored, {min(options.stored, options.distinct)} different "
        f"files (hard links), {options.slots} slots; an adapter is a name and a revision, so each "
        "is read and given its own slot; files are in the page cache, and every file was loaded "
        "before, so it has an image",
        "traffic": f"{options.per_request} texts a request under one adapter, Zipf(1.0), six "
        f"batches in flight; a cold one is asked for every {_PROBE_SECONDS * 1e3:.0f} ms. A new "
        f"adapter for every text: {_CHURNING} texts at a time",
        "rounds": f"{options.rounds} of {options.seconds:g} s, medians",
    }
    backbone = subject.conditions["backbone"]
    title = f"adapters: {options.stored} stored, {options.slots} slots, {backbone}"
    return Report(title, ("", *(f"from {way}" for way in columns)), rows, figures, conditions)


def _figures_of(
    bench: _Bench, rates: dict[str, list[float]], way: str
) -> tuple[dict[str, str], dict[str, Any]]:
    """The rows of one way, by their names, and the same as figures."""
    zipf, resident, churn = (rates[_of(way, what)] for what in (ZIPF, RESIDENT, CHURN))
    share = ratio(zipf, resident)
    moved = {f"{name} a second": count / bench.seconds for name, count in bench.moved.items()}
    cold = {
        "idle": percentiles_ms(bench.idle_seconds),
        "under load": percentiles_ms(bench.cold_seconds),
    }
    rows = {
        f"{ZIPF}, texts/s": f"{median(zipf):,.0f}",
        f"{RESIDENT}, texts/s": f"{median(resident):,.0f}",
        "the first over the second": f"{share:.3f}",
        f"{CHURN}, loads/s": f"{median(churn):,.0f}",
    }
    rows |= {name: f"{rate:,.1f}" for name, rate in sorted(moved.items())}
    for when, ms in cold.items():
        rows[f"cold adapter to answer, {when}, p50 / p99 ms"] = (
            f"{ms['p50_ms']:.1f} / {ms['p99_ms']:.1f}"
        )
    rows |= {name: f"{count:,}" for name, count in sorted(bench.images.items())}
    figures = {
        "over_all_resident": share,
        "loads_per_second_alone": spread(churn),
        "moved": moved,
        "cold": cold,
        "images": dict(bench.images),
    }
    return rows, figures


def _memory() -> dict[str, float]:
    return {"host": resident_mib(os.getpid()), "device": device_mib()}
