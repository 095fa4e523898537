"""Thousands of stored adapters over few slots: Zipf traffic, and how long a cold adapter takes.

Every request names one adapter, the k-th most popular with a probability proportional to 1/k. With
`--per-request 1` every text does, which asks for many more loads.
"""

import asyncio
import os
from argparse import ArgumentParser
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np

from adapters.backbone.tokenizer import Encoding
from benchmarks.arguments import at_least, duration
from benchmarks.loop import (
    closed_loop,
    entries_of,
    in_flight_for,
    percentiles_ms,
    run_async,
    settings_for,
    started,
)
from benchmarks.memory import device_mib, resident_mib
from benchmarks.report import BenchmarkFailed, Report, progress, spread
from benchmarks.stock import stocked
from benchmarks.subject import MEAN_TOKENS, Subject, add_backbone_arguments, subject
from benchmarks.texts import make_encodings
from benchmarks.turns import ratio, take_turns
from service.engine.engine import LocalEngine
from service.engine.interface import AdapterKey, Entry
from service.engine.observer import Observer, Tier

RESIDENT = "traffic over the active adapters alone"
ZIPF = "traffic over all stored adapters"
_TEXTS = 2048
# Requests that are drawn beforehand, and taken over and over.
_REQUESTS = 20_000
# Texts in flight, over those that keep the device busy: some of them wait for their adapter.
_LOADS = 2
# Between two requests for cold adapters under load.
_PROBE_SECONDS = 0.1


class Traffic(Observer):
    """Counts what goes between the tiers."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def adapter_loaded(self, key: AdapterKey, tier: Tier, seconds: float) -> None:  # noqa: ARG002
        self.counts[f"loads, {tier}"] += 1

    def adapter_evicted(
        self,
        key: AdapterKey,  # noqa: ARG002
        tier: Tier,
        age_seconds: float,  # noqa: ARG002
    ) -> None:
        self.counts[f"evictions, {tier}"] += 1


@dataclass(frozen=True, slots=True)
class Plan:
    stored: int
    slots: int
    distinct: int
    per_request: int
    cold: int
    seconds: float
    rounds: int


def add_arguments(parser: ArgumentParser) -> None:
    add_backbone_arguments(parser)
    parser.add_argument(
        "--stored", type=at_least(1), default=10_000, help="adapters, by hard links"
    )
    parser.add_argument("--slots", type=at_least(1), default=512, help="IDSPAM_MAX_ACTIVE_ADAPTERS")
    parser.add_argument(
        "--distinct", type=at_least(1), default=256, help="adapter files that differ"
    )
    parser.add_argument(
        "--per-request", type=at_least(1), default=32, help="texts of one predict call"
    )
    parser.add_argument(
        "--cold", type=at_least(1), default=200, help="cold adapters asked for, idle"
    )
    parser.add_argument("--seconds", type=duration, default=5.0, help="of every round")
    parser.add_argument("--rounds", type=at_least(1), default=3)


def run(*, backbone: str, device: str, dtype: str, **plan: Any) -> Report:
    chosen = Plan(**plan)
    if chosen.stored < chosen.slots + 2 * chosen.cold:
        raise BenchmarkFailed("fewer adapters are stored than slots and cold ones ask for")
    with subject(backbone=backbone, device=device, dtype=dtype) as found:
        progress(f"storing {chosen.stored} adapters")
        with stocked(found.backbone, names=chosen.stored, distinct=chosen.distinct) as (
            store,
            keys,
        ):
            return run_async(_run(found, chosen, store, keys))


async def _run(found: Subject, plan: Plan, store: Path, keys: Sequence[AdapterKey]) -> Report:
    device = str(found.backbone.device)
    encodings = make_encodings(
        found.backbone.encoder, found.words, count=_TEXTS, mean_tokens=MEAN_TOKENS
    )
    settings = settings_for(device, MAX_ACTIVE_ADAPTERS=str(plan.slots))
    traffic = Traffic()
    # Nobody asks for the last ones but who wants to see what a cold adapter takes.
    popular, cold = keys[: -2 * plan.cold], keys[-2 * plan.cold :]
    memory = {"before": _memory()}
    async with started(found.backbone, store, settings, traffic) as engine:
        bench = _Bench(found, plan, engine, encodings, traffic)
        await bench.touch(popular[: plan.slots])
        memory["with all slots taken"] = _memory()
        idle = [await bench.answer(key) for key in cold[: plan.cold]]
        bench.cold = iter(cold[plan.cold :])
        texts = _LOADS * in_flight_for(settings, bench.entries(popular[:1]))
        clients = max(1, round(texts / plan.per_request))
        measured = await take_turns(
            {
                RESIDENT: lambda: bench.resident(popular[: plan.slots], clients),
                ZIPF: lambda: bench.zipf(popular, clients),
            },
            rounds=plan.rounds,
        )
        memory["in the end"] = _memory()
    return _report(found, plan, bench, measured, idle, memory)


class _Bench:
    """One engine, and what was counted while all stored adapters were asked for."""

    def __init__(
        self,
        found: Subject,
        plan: Plan,
        engine: LocalEngine,
        encodings: Sequence[Encoding],
        traffic: Traffic,
    ) -> None:
        self._found, self._plan, self._engine = found, plan, engine
        self._encodings, self._traffic = encodings, traffic
        self.cold: Iterator[AdapterKey] = iter(())
        self.cold_seconds: list[float] = []
        self.moved: Counter[str] = Counter()
        self.seconds = 0.0

    def entries(self, keys: Sequence[AdapterKey]) -> list[Entry]:
        """All texts, each under one of these adapters, in turns."""
        owners = [keys[index % len(keys)] for index in range(len(self._encodings))]
        return entries_of(self._encodings, owners, self._found.spec)

    async def touch(self, keys: Sequence[AdapterKey]) -> None:
        """Have all of them active, as far as they fit."""
        for key in keys:
            await self.answer(key)

    async def answer(self, key: AdapterKey) -> float:
        """Seconds until a short text is answered under this adapter."""
        entries = entries_of(self._encodings[:1], [key], self._found.spec)
        sent = perf_counter()
        await self._engine.predict(entries)
        return perf_counter() - sent

    async def resident(self, keys: Sequence[AdapterKey], clients: int) -> float:
        """Texts/s when nothing has to be loaded."""
        await self.touch(keys)
        return await self._load(keys, clients)

    async def zipf(self, keys: Sequence[AdapterKey], clients: int) -> float:
        """Texts/s over all of them, while cold ones are asked for now and then."""
        before, begun = Counter(self._traffic.counts), perf_counter()
        probing = asyncio.create_task(self._probe())
        try:
            return await self._load(keys, clients)
        finally:
            probing.cancel()
            with suppress(asyncio.CancelledError):
                await probing
            self.moved += self._traffic.counts - before
            self.seconds += perf_counter() - begun

    async def _load(self, keys: Sequence[AdapterKey], clients: int) -> float:
        load = await closed_loop(
            self._engine,
            self._requests(keys),
            clients=clients,
            seconds=self._plan.seconds,
            warm_up=self._plan.seconds / 2,
        )
        return load.texts_per_second

    async def _probe(self) -> None:
        for key in self.cold:
            self.cold_seconds.append(await self.answer(key))
            await asyncio.sleep(_PROBE_SECONDS)

    def _requests(self, keys: Sequence[AdapterKey]) -> Iterator[list[Entry]]:
        """Requests of some texts under one adapter, drawn by popularity."""
        size = self._plan.per_request
        rng = np.random.default_rng(0)
        shares = 1 / np.arange(1, len(keys) + 1)
        drawn = rng.choice(len(keys), size=_REQUESTS, p=shares / shares.sum())
        for number in range(10**9):
            key = keys[drawn[number % _REQUESTS]]
            start = number * size % (len(self._encodings) - size + 1)
            chosen = self._encodings[start : start + size]
            yield entries_of(chosen, [key] * size, self._found.spec)


def _report(
    found: Subject,
    plan: Plan,
    bench: _Bench,
    measured: dict[str, list[float]],
    idle: Sequence[float],
    memory: dict[str, dict[str, float]],
) -> Report:
    share = ratio(measured[ZIPF], measured[RESIDENT])
    moved = {f"{name} a second": count / bench.seconds for name, count in bench.moved.items()}
    cold = {"idle": percentiles_ms(idle), "under load": percentiles_ms(bench.cold_seconds)}
    rows = [
        [f"{ZIPF}, texts/s", f"{median(measured[ZIPF]):,.0f}"],
        [f"{RESIDENT}, texts/s", f"{median(measured[RESIDENT]):,.0f}"],
        ["the first over the second", f"{share:.3f}"],
        *([f"{name}", f"{rate:,.1f}"] for name, rate in sorted(moved.items())),
        *(
            [
                f"cold adapter to answer, {when}, p50 / p99 ms",
                f"{ms['p50_ms']:.1f} / {ms['p99_ms']:.1f}",
            ]
            for when, ms in cold.items()
        ),
        *(
            [f"host / device MiB, {when}", f"{mib['host']:,.0f} / {mib['device']:,.0f}"]
            for when, mib in memory.items()
        ),
    ]
    figures = {
        "texts_per_second": {name: spread(rates) for name, rates in measured.items()},
        "over_all_resident": share,
        "moved": moved,
        "cold": cold,
        "memory_mib": memory,
    }
    conditions = found.conditions | {
        "adapters": f"{plan.stored} stored, {min(plan.stored, plan.distinct)} different files "
        f"under them by hard links, {plan.slots} slots; name and revision make an adapter, so each "
        "is read, prepared and given a slot of its own; files are in the page cache",
        "traffic": f"{plan.per_request} texts a request under one adapter, Zipf(1.0), six batches "
        f"in flight; while a cold one is asked for every {_PROBE_SECONDS * 1e3:.0f} ms",
        "rounds": f"{plan.rounds} of {plan.seconds:g} s, medians",
    }
    title = f"adapters: {plan.stored} stored, {plan.slots} slots, {found.conditions['backbone']}"
    return Report(title, ("", "figure"), rows, figures, conditions)


def _memory() -> dict[str, float]:
    return {"host": resident_mib(os.getpid()), "device": device_mib()}
