"""Texts/s of the engine over the number of adapters, beside what one would do without it.

Everything is measured in turns in one run: the engine through `LocalEngine.predict`, its backbone's
packed forward pass without adapters, padded `transformers` with one batch per adapter, and PEFT
LoRA with `adapter_names`. Rivals are given as many texts at a time as are in flight in the engine.
"""

import random
from argparse import ArgumentParser
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from pathlib import Path
from statistics import mean
from typing import Any

from adapters.backbone.tokenizer import Encoding
from benchmarks.arguments import at_least, counts, duration
from benchmarks.ceilings import Ceilings, flops_of, measure_ceilings
from benchmarks.loop import (
    closed_loop,
    entries_of,
    in_flight_for,
    preload,
    requests_of,
    run_async,
    settings_for,
    started,
)
from benchmarks.packed import PackedForward
from benchmarks.report import Report, spread
from benchmarks.rivals import LORA, PADDED, PADDED_PLAIN, Rivals
from benchmarks.stock import stocked
from benchmarks.subject import MEAN_TOKENS, Subject, add_backbone_arguments, subject
from benchmarks.texts import make_encodings
from benchmarks.turns import Measure, ratio, take_turns
from service.engine.engine import LocalEngine
from service.engine.interface import AdapterKey, Entry
from service.engine.settings import EngineSettings

PACKED = "packed forward, no adapter"
_WARM_UP_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class Plan:
    """adapters: the numbers of them to measure. rivals: how many those get; 0 leaves them out."""

    adapters: Sequence[int]
    rivals: int
    texts: int
    per_request: int
    distinct: int
    seconds: float
    rounds: int

    @property
    def counts(self) -> list[int]:
        """What the engine is measured with: also what the rivals are compared at."""
        return sorted({*self.adapters, self.rivals} - {0})


def add_arguments(parser: ArgumentParser) -> None:
    add_backbone_arguments(parser)
    parser.add_argument("--adapters", type=counts, default=[1, 64, 256, 1024], help="1,64,256")
    parser.add_argument(
        "--rivals", type=at_least(0), default=64, help="adapters that the rivals get; 0: no rivals"
    )
    parser.add_argument("--texts", type=at_least(32), default=4096, help="different ones")
    parser.add_argument(
        "--per-request", type=at_least(1), default=32, help="texts of one predict call"
    )
    parser.add_argument(
        "--distinct", type=at_least(1), default=256, help="adapter files that differ"
    )
    parser.add_argument("--seconds", type=duration, default=3.0, help="of every figure and round")
    parser.add_argument("--rounds", type=at_least(1), default=3)


def run(*, backbone: str, device: str, dtype: str, **plan: Any) -> Report:
    chosen = Plan(**plan)
    with (
        subject(backbone=backbone, device=device, dtype=dtype) as found,
        stocked(found.backbone, names=max(chosen.counts), distinct=chosen.distinct) as (
            store,
            keys,
        ),
    ):
        return run_async(_run(found, chosen, store, keys))


async def _run(found: Subject, plan: Plan, store: Path, keys: Sequence[AdapterKey]) -> Report:
    encodings = make_encodings(
        found.backbone.encoder, found.words, count=plan.texts, mean_tokens=MEAN_TOKENS
    )
    settings = settings_for(str(found.backbone.device), MAX_ACTIVE_ADAPTERS=str(max(plan.counts)))
    measure = partial(
        measure_ceilings,
        found.backbone,
        tokens=settings.max_batch_tokens,
        seconds=min(0.5, plan.seconds / 4),
    )
    ceilings = measure()
    traffic = {count: _traffic(found, encodings, keys[:count]) for count in plan.counts}
    in_flight = in_flight_for(settings, traffic[plan.counts[0]])
    packed = PackedForward(found.backbone, encodings, max_tokens=settings.max_batch_tokens)
    checked: Mapping[str, float] = {}
    missing: Mapping[str, str] = {}
    async with started(found.backbone, store, settings) as engine:
        await preload(engine, keys)
        measures = {
            _ours(count): _measure(engine, entries, plan, in_flight)
            for count, entries in traffic.items()
        }
        measures[PACKED] = _measure_packed(packed, plan.seconds)
        if plan.rivals:
            chosen = traffic[plan.rivals]
            numbers = {key: number for number, key in enumerate(keys)}
            rivals = Rivals(
                found,
                store,
                keys[: plan.rivals],
                [(numbers[entry.adapter], entry.encoding) for entry in chosen],
                at_once=in_flight,
                max_tokens=settings.max_batch_tokens,
            )
            checked = await rivals.check(engine, [entry.cost for entry in chosen])
            rivals.warm_up(_WARM_UP_SECONDS)
            measures |= rivals.measures(plan.seconds, checked)
            missing = rivals.left_out(checked)
        measured = await take_turns(measures, rounds=plan.rounds)
    ceilings = ceilings.best(measure())
    conditions = found.conditions | _conditions(plan, settings, ceilings, encodings, in_flight)
    conditions |= missing
    flops = flops_of(found.backbone, encodings) / len(encodings) / ceilings.flops
    return _report(found, plan, measured, conditions, checked, flops_share=flops)


def _traffic(
    found: Subject, encodings: Sequence[Encoding], keys: Sequence[AdapterKey]
) -> list[Entry]:
    rng = random.Random(0)
    return entries_of(encodings, [rng.choice(keys) for _ in encodings], found.spec)


def _measure(engine: LocalEngine, entries: Sequence[Entry], plan: Plan, in_flight: int) -> Measure:
    requests: Iterator[list[Entry]] = cycle(requests_of(entries, plan.per_request))
    clients = max(1, round(in_flight / plan.per_request))

    async def measure() -> float:
        load = await closed_loop(
            engine, requests, clients=clients, seconds=plan.seconds, warm_up=plan.seconds / 5
        )
        return load.texts_per_second

    return measure


def _measure_packed(packed: PackedForward, seconds: float) -> Measure:
    async def measure() -> float:
        return packed.texts_per_second(seconds)

    return measure


def _conditions(
    plan: Plan,
    settings: EngineSettings,
    ceilings: Ceilings,
    encodings: Sequence[Encoding],
    in_flight: int,
) -> dict[str, Any]:
    lengths = [len(item) for item in encodings]
    return {
        "texts": f"{len(lengths)}, mean {mean(lengths):.1f} tokens, longest {max(lengths)}",
        "traffic": f"{in_flight} texts in flight, {plan.per_request} a request, each text under an "
        "adapter at random; rivals get as many at a time",
        "adapters": f"t=10, m=L/2, at most {plan.distinct} different files, all active",
        "batches": f"at most {settings.max_batch_tokens} tokens",
        "rounds": f"{plan.rounds} of {plan.seconds:g} s, medians",
        "ceiling, matmul TFLOP/s": {name: round(rate, 2) for name, rate in ceilings.matmul.items()},
        "ceiling, copy GB/s": round(ceilings.copy, 1),
    }


def _report(
    found: Subject,
    plan: Plan,
    measured: Mapping[str, list[float]],
    conditions: Mapping[str, Any],
    checked: Mapping[str, float],
    *,
    flops_share: float,
) -> Report:
    one = measured[_ours(plan.counts[0])]
    figures, rows = [], []
    for name, rates in measured.items():
        figure: dict[str, Any] = {
            "name": name,
            "texts_per_second": spread(rates),
            "over_packed_forward": ratio(rates, measured[PACKED]),
            "over_fewest_adapters": ratio(rates, one),
        }
        if name != LORA:  # which does other work
            figure["flops_utilisation"] = spread(rates)["median"] * flops_share
        if name in (PADDED, PADDED_PLAIN, LORA):
            figure["engine_is_times_faster"] = ratio(measured[_ours(plan.rivals)], rates)
            figure["adapters"] = plan.rivals
        if name in checked:
            figure["checked_difference"] = checked[name]
        figures.append(figure)
        rows.append(_row(figure))
    columns = ("", "texts/s", "range", "x packed", "x fewest adapters", "MFU", "engine is x faster")
    return Report(f"engine: {found.conditions['backbone']}", columns, rows, figures, conditions)


def _row(figure: Mapping[str, Any]) -> list[str]:
    rate = figure["texts_per_second"]
    faster, utilisation = figure.get("engine_is_times_faster"), figure.get("flops_utilisation")
    return [
        figure["name"],
        f"{rate['median']:,.0f}",
        f"{rate['least']:,.0f}..{rate['most']:,.0f}",
        f"{figure['over_packed_forward']:.3f}",
        f"{figure['over_fewest_adapters']:.3f}",
        "" if utilisation is None else f"{utilisation:.3f}",
        "" if faster is None else f"{faster:.1f}",
    ]


def _ours(count: int) -> str:
    return f"engine, {count} adapter{'s' if count > 1 else ''}"
