"""Thousands of stored adapters over few slots: Zipf traffic, and how long a cold adapter takes.

Every request names one adapter, the k-th most popular with a probability proportional to 1/k. With
`--per-request 1` every text names its own, which takes many more loads.

Two engines take turns over the same store: one reads images (`service.engine.images`), the other
one every adapter's file.

How long an answer takes under load depends on how much is asked at a time. Three batches keep the
device busy; with more, all answers wait for those before them, whether their adapters are loaded or
not.
"""

import asyncio
import os
from argparse import ArgumentParser, Namespace
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import cycle
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import uvloop

from adapters.adapter import prepare
from adapters.backbone.model import Backbone, random_of
from adapters.format.spec import AdapterSpec, AttentionPrompt
from benchmarks.arguments import add_model_arguments, at_least, counts, duration
from benchmarks.kinds import PROMPT, specs_of
from benchmarks.loop import (
    BATCHES,
    closed_loop,
    entries_of,
    in_flight_for,
    percentiles_ms,
    settings_for,
    started,
)
from benchmarks.memory import device_mib, resident_mib
from benchmarks.report import BenchmarkFailed, Report, progress, spread
from benchmarks.stock import stocked_of
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
# As `train fit --method idspam+vectors` makes them.
FIT = "fit"
KINDS = (PROMPT, FIT, "vectors", "head")
# How an engine gets its adapters, and the limit of its images in MiB.
WAYS = {"images": "65536", "files": "0"}
# Requests at a time when every text names a new adapter.
_CHURNING = 64
_TEXTS = 2048
# Requests that are drawn beforehand and repeated.
_REQUESTS = 20_000
# Adapters at a time that are made active before the clock starts.
_TOUCHES = 32
# Of the time until a cold adapter answers.
_PARTS = ("until it is loaded", "then until its batch starts", "then until that ends", "the rest")
# Between two requests for cold adapters under load.
_PROBE_SECONDS = 0.1


class Traffic(Observer):
    """Counts loads and evictions by tier, and images.

    loaded: when an adapter that is being watched was on the device, of `perf_counter`.
    """

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.loaded: dict[AdapterKey, float] = {}
        self.watched: AdapterKey | None = None

    def adapter_loaded(self, key: AdapterKey, tier: Tier, seconds: float) -> None:  # noqa: ARG002
        self.counts[f"loads, {tier}"] += 1
        if key == self.watched and tier == "active":
            self.loaded[key] = perf_counter()

    def adapter_evicted(self, key: AdapterKey, tier: Tier, age_seconds: float) -> None:  # noqa: ARG002
        self.counts[f"evictions, {tier}"] += 1

    def adapter_image(self, event: ImageEvent) -> None:
        self.counts[f"images, {event}"] += 1


def add_arguments(parser: ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("--stored", type=at_least(1), default=10_000, help="adapters (hard links)")
    parser.add_argument("--slots", type=at_least(1), default=512, help="IDSPAM_MAX_ACTIVE_ADAPTERS")
    parser.add_argument("--distinct", type=at_least(1), default=256, help="different files")
    parser.add_argument(
        "--kind", choices=KINDS, default=KINDS[0], help="what the adapters are (benchmarks kinds)"
    )
    parser.add_argument("--per-request", type=at_least(1), default=32, help="texts of a request")
    parser.add_argument(
        "--in-flight", type=counts, default=[3, 6], help="batches in flight, separated by commas"
    )
    parser.add_argument("--ways", choices=("both", *WAYS), default="both", help="what is measured")
    parser.add_argument(
        "--cold", type=at_least(1), default=200, help="cold adapters: idle, and under each load"
    )
    parser.add_argument("--seconds", type=duration, default=5.0, help="of every round")
    parser.add_argument("--rounds", type=at_least(1), default=3)


def run(options: Namespace) -> Report:
    if options.stored < 2 * _number_of_cold(options):
        raise BenchmarkFailed("fewer adapters are stored than cold requests need, twice over")
    with loaded_subject(options) as subject:
        subject = replace(subject, spec=_spec_of(subject.backbone, options.kind))
        progress(f"storing {options.stored} adapters")
        with stocked_of(
            [subject.spec],
            names=options.stored,
            distinct=options.distinct,
        ) as (store, keys):
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
            for load in bench.loads:
                measures[_of(way, RESIDENT, load.batches)] = partial(bench.resident, load)
                measures[_of(way, ZIPF, load.batches)] = partial(bench.zipf, load)
            if bench.evicts:
                measures[_of(way, CHURN)] = bench.churn
        rates = await take_turns(measures, rounds=options.rounds)
        memory["in the end"] = _memory()
    return _report(subject, options, benches, rates, memory)


def _spec_of(backbone: Backbone, kind: str) -> AdapterSpec:
    """The spec that all adapters share."""
    specs = specs_of(backbone)
    if kind == FIT:
        prompt = specs[PROMPT].prompt
        assert isinstance(prompt, AttentionPrompt)
        change = {"length": 5, "bottleneck": 16, "layer": round(backbone.layers * 2 / 3)}
        tuned = specs["prompt and vectors"]
        return tuned.model_copy(update={"prompt": prompt.model_copy(update=change)})
    return specs[kind]


def _settings(subject: Subject, options: Namespace, way: str) -> EngineSettings:
    """Every slot can be taken, by adapters of this size."""
    nbytes = prepare(random_of(subject.spec), subject.backbone).nbytes
    return settings_for(
        str(subject.backbone.device),
        MAX_ACTIVE_ADAPTERS=str(options.slots),
        MAX_ACTIVE_MIB=str((options.slots + 1) * nbytes // 2**20 + 1),
        IMAGES_MIB=WAYS[way],
        # A slow minute of the machine must not refuse anything.
        MAX_WAITING_TOKENS=str(2**22),
    )


def _of(way: str, what: str, batches: int | None = None) -> str:
    return f"{what}, from {way}" if batches is None else f"{what}, {batches} batches, from {way}"


def _number_of_cold(options: Namespace) -> int:
    """Adapters that are asked for only to see how long they take: idle, and under each load."""
    return int(options.cold * (1 + len(options.in_flight)))


@dataclass(slots=True)
class _Load:
    """So many batches in flight, and what was seen under them.

    clients: requests at a time. probes: cold adapters. moved: what was counted while all adapters
    were asked for, which took so many seconds. parts: of the time until a cold adapter answers:
    until it is loaded, then until its batch starts, then until that is done.
    """

    batches: int
    clients: int
    probes: Iterator[AdapterKey]
    cold_seconds: list[float] = field(default_factory=list)
    parts: dict[str, list[float]] = field(default_factory=lambda: {part: [] for part in _PARTS})
    moved: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0


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
        number = _number_of_cold(options)
        # The last ones are asked for only to measure a cold adapter.
        self._popular, cold = keys[:-number], keys[-number:]
        self._active = self._popular[: options.slots]
        first = entries_of(self._encodings, [keys[0]] * len(self._encodings), subject.spec)
        # The least popular first: those are not in host memory.
        self._churned = cycle(reversed(self._popular))
        self._cold, *probed = (
            cold[start : start + options.cold] for start in range(0, number, options.cold)
        )
        self.loads = []
        for batches, probes in zip(options.in_flight, probed, strict=True):
            texts = in_flight_for(settings, first) * batches / BATCHES
            clients = max(1, round(texts / options.per_request))
            self.loads.append(_Load(batches, clients, iter(probes)))
        self.idle_seconds: list[float] = []

    @property
    def images(self) -> Counter[str]:
        """What happened to images up to now."""
        return Counter(
            {name: count for name, count in self._traffic.counts.items() if "images" in name}
        )

    @property
    def evicts(self) -> bool:
        """Whether there are more adapters than slots, so that loading one never ends."""
        return bool(len(self._popular) > self._options.slots)

    async def begin(self) -> None:
        """Fill the slots, and ask for cold adapters while nothing else is asked.

        Every file has been read once before, as after its upload.
        """
        await self.touch(self._popular[: self._options.distinct])
        await self.touch(self._active)
        self.idle_seconds = [await self.answer(key) for key in self._cold]

    async def touch(self, keys: Sequence[AdapterKey]) -> None:
        """Make these adapters active, as far as they fit."""
        limit = asyncio.Semaphore(_TOUCHES)

        async def one(key: AdapterKey) -> None:
            async with limit:
                await self.answer(key)

        await asyncio.gather(*(one(key) for key in keys))

    async def answer(self, key: AdapterKey) -> float:
        """Seconds until a short text is answered under this adapter."""
        entries = entries_of(self._encodings[:1], [key], self._subject.spec)
        sent = perf_counter()
        await self._engine.predict(entries)
        return perf_counter() - sent

    async def resident(self, load: _Load) -> float:
        """Texts/s when nothing has to be loaded."""
        await self.touch(self._active)
        return await self._run(self._active, load)

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

    async def zipf(self, load: _Load) -> float:
        """Texts/s over all of them, with a request for a cold one now and then."""
        before, began = Counter(self._traffic.counts), perf_counter()
        probing = asyncio.create_task(self._probe(load))
        try:
            return await self._run(self._popular, load)
        finally:
            probing.cancel()
            with suppress(asyncio.CancelledError):
                await probing
            load.moved += self._traffic.counts - before
            load.seconds += perf_counter() - began

    async def _run(self, keys: Sequence[AdapterKey], load: _Load) -> float:
        seconds = self._options.seconds
        return await closed_loop(
            self._engine,
            self._requests(keys),
            clients=load.clients,
            seconds=seconds,
            warm_up=seconds / 2,
        )

    async def _probe(self, load: _Load) -> None:
        for key in load.probes:
            entries = entries_of(self._encodings[:1], [key], self._subject.spec)
            self._traffic.watched = key
            sent = perf_counter()
            completion = await self._engine.predict(entries)
            seconds = perf_counter() - sent
            until_loaded = self._traffic.loaded.pop(key) - sent
            until_run = completion.queue_seconds
            until_done = until_run + completion.inference_seconds
            load.cold_seconds.append(seconds)
            for part, took in zip(
                _PARTS,
                (
                    until_loaded,
                    until_run - until_loaded,
                    until_done - until_run,
                    seconds - until_done,
                ),
                strict=True,
            ):
                load.parts[part].append(took)
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
        "adapters": f"{options.stored} stored, of the kind {options.kind!r}, "
        f"{min(options.stored, options.distinct)} different files (hard links), {options.slots} "
        "slots; an adapter is a name and a revision, so each is read and given its own slot; files "
        "are in the page cache, and every file was loaded before, so it has an image",
        "traffic": f"{options.per_request} texts a request under one adapter, Zipf(1.0); a cold "
        f"one is asked for every {_PROBE_SECONDS * 1e3:.0f} ms, {options.cold} times at most under "
        f"each load. A new adapter for every text: {_CHURNING} texts at a time",
        "rounds": f"{options.rounds} of {options.seconds:g} s, medians",
    }
    backbone = subject.conditions["backbone"]
    title = f"adapters: {options.stored} stored, {options.slots} slots, {backbone}"
    return Report(title, ("", *(f"from {way}" for way in columns)), rows, figures, conditions)


def _figures_of(
    bench: _Bench, rates: dict[str, list[float]], way: str
) -> tuple[dict[str, str], dict[str, Any]]:
    """The rows of one way, by their names, and the same as figures."""
    idle = percentiles_ms(bench.idle_seconds)
    rows: dict[str, str] = {}
    loads: dict[str, Any] = {}
    for load in bench.loads:
        of_load, loads[str(load.batches)] = _under(load, rates, way)
        rows |= of_load
    if (churn := rates.get(_of(way, CHURN))) is not None:
        rows[f"{CHURN}, loads/s"] = f"{median(churn):,.0f}"
    rows["cold adapter to answer, idle, p50 / p99 ms"] = _shown(idle)
    rows |= {name: f"{count:,}" for name, count in sorted(bench.images.items())}
    figures = {
        "in_flight": loads,
        "loads_per_second_alone": None if churn is None else spread(churn),
        "cold_idle": idle,
        "images": dict(bench.images),
    }
    return rows, figures


def _under(
    load: _Load, rates: dict[str, list[float]], way: str
) -> tuple[dict[str, str], dict[str, Any]]:
    """The rows of so many batches in flight, and the same as figures."""
    zipf, resident = (rates[_of(way, what, load.batches)] for what in (ZIPF, RESIDENT))
    share = ratio(zipf, resident)
    moved = {f"{name} a second": count / load.seconds for name, count in load.moved.items()}
    cold = percentiles_ms(load.cold_seconds)
    parts = {part: percentiles_ms(seconds) for part, seconds in load.parts.items()}
    when = f"{load.batches} batches in flight: "
    rows = {
        f"{when}{ZIPF}, texts/s": f"{median(zipf):,.0f}",
        f"{when}{RESIDENT}, texts/s": f"{median(resident):,.0f}",
        f"{when}the first over the second": f"{share:.3f}",
        f"{when}cold adapter to answer, p50 / p99 ms": _shown(cold),
    }
    rows |= {f"{when}{part}": _shown(ms) for part, ms in parts.items()}
    rows |= {f"{when}{name}": f"{rate:,.1f}" for name, rate in sorted(moved.items())}
    figures = {
        "over_all_resident": share,
        "cold": cold,
        "cold_parts": parts,
        "moved": moved,
        "clients": load.clients,
    }
    return rows, figures


def _shown(ms: dict[str, float]) -> str:
    return f"{ms['p50_ms']:.1f} / {ms['p99_ms']:.1f}"


def _memory() -> dict[str, float]:
    return {"host": resident_mib(os.getpid()), "device": device_mib()}
