"""Texts/s of the engine over the number of adapters, beside the alternatives to it.

Everything is measured in turns in one run: the engine through `LocalEngine.predict`, its backbone's
packed forward pass without adapters, padded `transformers` with one batch per adapter, and PEFT
LoRA with `adapter_names`. Rivals get as many texts at a time as are in flight in the engine.
"""

import random
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import uvloop

from adapters.tokenizer import Encoding
from benchmarks.arguments import add_model_arguments, at_least, counts, duration
from benchmarks.ceilings import Ceilings, PackedForward, flops_of, measure_ceilings
from benchmarks.loop import (
    entries_of,
    in_flight_for,
    measure_of,
    preload,
    settings_for,
    started,
)
from benchmarks.report import Report, rate_cells, spread
from benchmarks.rivals import LORA, PADDED, PADDED_PLAIN, Rivals
from benchmarks.stock import stocked
from benchmarks.subject import MEAN_TOKENS, Subject, loaded_subject
from benchmarks.texts import make_encodings
from benchmarks.turns import ratio, take_turns
from service.engine.interface import AdapterKey, Entry
from service.engine.settings import EngineSettings

PACKED = "packed forward, no adapter"
_WARM_UP_SECONDS = 30.0


def add_arguments(parser: ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument(
        "--adapters", type=counts, default=[1, 64, 256, 1024], help="numbers of them, as 1,64,256"
    )
    parser.add_argument(
        "--rivals", type=at_least(0), default=64, help="adapters of the rivals; 0: no rivals"
    )
    parser.add_argument("--texts", type=at_least(32), default=4096, help="different texts")
    parser.add_argument("--per-request", type=at_least(1), default=32, help="texts of a request")
    parser.add_argument("--distinct", type=at_least(1), default=256, help="different files")
    parser.add_argument("--seconds", type=duration, default=3.0, help="of every figure and round")
    parser.add_argument("--rounds", type=at_least(1), default=3)


def run(options: Namespace) -> Report:
    names = max(*options.adapters, options.rivals)
    with (
        loaded_subject(options) as subject,
        stocked(subject.backbone, names=names, distinct=options.distinct) as (store, keys),
    ):
        return uvloop.run(_run(subject, options, store, keys))


async def _run(
    subject: Subject, options: Namespace, store: Path, keys: Sequence[AdapterKey]
) -> Report:
    encodings = make_encodings(
        subject.backbone.encoder, subject.words, count=options.texts, mean_tokens=MEAN_TOKENS
    )
    settings = settings_for(str(subject.backbone.device), MAX_ACTIVE_ADAPTERS=str(len(keys)))
    ceilings_now = partial(
        measure_ceilings,
        subject.backbone,
        tokens=settings.max_batch_tokens,
        seconds=min(0.5, options.seconds / 4),
    )
    ceilings = ceilings_now()
    # The engine is also measured with as many adapters as the rivals have.
    numbers = sorted({*options.adapters, options.rivals} - {0})
    traffic = {number: _traffic(subject, encodings, keys[:number]) for number in numbers}
    in_flight = in_flight_for(settings, traffic[numbers[0]])
    packed = PackedForward(subject.backbone, encodings, max_tokens=settings.max_batch_tokens)
    differences: Mapping[str, float] = {}
    left_out: Mapping[str, str] = {}
    async with started(subject.backbone, store, settings) as engine:
        await preload(engine, keys)
        measures = {
            _ours(number): measure_of(engine, entries, options, in_flight)
            for number, entries in traffic.items()
        }
        measures[PACKED] = partial(packed.texts_per_second, options.seconds)
        if options.rivals:
            entries = traffic[options.rivals]
            index = {key: number for number, key in enumerate(keys)}
            rivals = Rivals(
                subject,
                store,
                keys[: options.rivals],
                [(index[entry.adapter], entry.encoding) for entry in entries],
                at_once=in_flight,
                max_tokens=settings.max_batch_tokens,
            )
            differences = await rivals.check(engine, [entry.cost for entry in entries])
            rivals.warm_up(_WARM_UP_SECONDS)
            measures |= rivals.measures(options.seconds, differences)
            left_out = rivals.left_out(differences)
        rates = await take_turns(measures, rounds=options.rounds)
    ceilings = ceilings.best(ceilings_now())
    conditions = subject.conditions | _conditions(options, settings, ceilings, encodings, in_flight)
    per_text = flops_of(subject.backbone, encodings) / len(encodings)
    figures = [
        _figure(name, rates, options.rivals, numbers[0], per_text / ceilings.flops)
        | ({"checked_difference": differences[name]} if name in differences else {})
        for name in rates
    ]
    columns = ("", "texts/s", "range", "x packed", "x fewest adapters", "MFU", "engine is x faster")
    return Report(
        f"engine: {subject.conditions['backbone']}",
        columns,
        [_row(figure) for figure in figures],
        figures,
        {**conditions, **left_out},
    )


def _traffic(
    subject: Subject, encodings: Sequence[Encoding], keys: Sequence[AdapterKey]
) -> list[Entry]:
    rng = random.Random(0)
    return entries_of(encodings, [rng.choice(keys) for _ in encodings], subject.spec)


def _conditions(
    options: Namespace,
    settings: EngineSettings,
    ceilings: Ceilings,
    encodings: Sequence[Encoding],
    in_flight: int,
) -> dict[str, Any]:
    lengths = [len(encoding) for encoding in encodings]
    return {
        "texts": f"{len(lengths)}, mean {mean(lengths):.1f} tokens, longest {max(lengths)}",
        "traffic": f"{in_flight} texts in flight, {options.per_request} a request, each text under "
        "an adapter at random; rivals get as many at a time",
        "adapters": f"t=10, m=L/2, at most {options.distinct} different files, all active",
        "batches": f"at most {settings.max_batch_tokens} tokens",
        "rounds": f"{options.rounds} of {options.seconds:g} s, medians",
        "ceiling, matmul TFLOP/s": {name: round(rate, 2) for name, rate in ceilings.matmul.items()},
        "ceiling, copy GB/s": round(ceilings.copy, 1),
    }


def _figure(
    name: str, rates: Mapping[str, list[float]], rivals: int, fewest: int, flops_share: float
) -> dict[str, Any]:
    """flops_share: share of the ceiling that one text/s makes up."""
    rate = spread(rates[name])
    figure: dict[str, Any] = {
        "name": name,
        "texts_per_second": rate,
        "over_packed_forward": ratio(rates[name], rates[PACKED]),
        "over_fewest_adapters": ratio(rates[name], rates[_ours(fewest)]),
    }
    if name != LORA:  # its work is another
        figure["flops_utilisation"] = rate["median"] * flops_share
    if name in (PADDED, PADDED_PLAIN, LORA):
        figure["engine_is_times_faster"] = ratio(rates[_ours(rivals)], rates[name])
        figure["adapters"] = rivals
    return figure


def _row(figure: Mapping[str, Any]) -> list[str]:
    faster, utilisation = figure.get("engine_is_times_faster"), figure.get("flops_utilisation")
    return [
        figure["name"],
        *rate_cells(figure["texts_per_second"]),
        f"{figure['over_packed_forward']:.3f}",
        f"{figure['over_fewest_adapters']:.3f}",
        "" if utilisation is None else f"{utilisation:.3f}",
        "" if faster is None else f"{faster:.1f}",
    ]


def _ours(number: int) -> str:
    return f"engine, {number} adapter{'s' if number > 1 else ''}"
