"""The engine by the type that its backbone computes in: texts/s, one text's latency, scores.

An engine for each type, all in one run and in turns; the first type is what the others are compared
with. Each answers texts under one adapter, under many with prompts, and under many of all kinds
(`benchmarks kinds`). At the end every type's scores of the same texts are compared.
"""

from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from itertools import cycle, islice
from pathlib import Path
from statistics import mean
from time import perf_counter
from typing import Any

import numpy as np
import uvloop

from adapters.backbone.loading import TYPES, check_type, load_backbone, resolve_device
from adapters.backbone.model import Backbone
from adapters.format.spec import AdapterSpec
from adapters.tokenizer import Encoding
from benchmarks.arguments import add_backbone_argument, at_least, duration
from benchmarks.kinds import specs_of
from benchmarks.loop import (
    entries_at_random,
    in_flight_for,
    measure_of,
    percentiles_ms,
    preload,
    settings_for,
    started,
)
from benchmarks.report import Report, progress, rate_cells, spread
from benchmarks.stock import stocked_of
from benchmarks.subject import MEAN_TOKENS, Subject, loaded_subject
from benchmarks.texts import encodings_of_length, make_encodings
from benchmarks.turns import ratio, take_turns
from service.engine.engine import LocalEngine
from service.engine.interface import AdapterKey, Entry

ONE, PROMPTS, MIXED = "1 adapter", "{} adapters", "{} of all kinds"
_MAX_ACTIVE_MIB = 32768
# Until the buckets of each mixture have graphs.
_CAPTURING_TURNS = 2
_TOKENS = 32
_COMPARED = 1024


def add_arguments(parser: ArgumentParser) -> None:
    add_backbone_argument(parser)
    parser.add_argument("--device", default="auto")
    parser.add_argument(
        "--types", choices=TYPES, nargs="+", default=["bfloat16", "float8"], help="the usual first"
    )
    parser.add_argument("--adapters", type=at_least(1), default=64)
    parser.add_argument("--distinct", type=at_least(1), default=16, help="different files a kind")
    parser.add_argument("--texts", type=at_least(32), default=4096, help="different texts")
    parser.add_argument("--per-request", type=at_least(1), default=32, help="texts of a request")
    parser.add_argument("--calls", type=at_least(1), default=300, help="of one text, a round")
    parser.add_argument("--seconds", type=duration, default=3.0, help="of every figure and round")
    parser.add_argument("--rounds", type=at_least(1), default=3)


def run(options: Namespace) -> Report:
    """
    Raises:
        UnusableBackbone: a type needs another device.
    """
    options.dtype = options.types[0]
    target = resolve_device(options.device)
    for dtype in options.types:
        check_type(dtype, target)
    with loaded_subject(options) as subject:
        backbones = {options.types[0]: subject.backbone}
        for dtype in options.types[1:]:
            progress(f"loading it in {dtype}")
            backbones[dtype] = load_backbone(subject.source, device=options.device, dtype=dtype)
        kinds = list(specs_of(subject.backbone).values())
        # The kinds in turns: adapter i is of kind i modulo their number.
        with stocked_of(
            kinds,
            names=options.adapters * len(kinds),
            distinct=min(options.adapters, options.distinct) * len(kinds),
        ) as (store, keys):
            return uvloop.run(_run(subject, backbones, options, kinds, store, keys))


async def _run(
    subject: Subject,
    backbones: Mapping[str, Backbone],
    options: Namespace,
    kinds: Sequence[AdapterSpec],
    store: Path,
    keys: Sequence[AdapterKey],
) -> Report:
    encoder = subject.backbone.encoder
    encodings = make_encodings(encoder, subject.words, count=options.texts, mean_tokens=MEAN_TOKENS)
    specs = {key: kinds[index % len(kinds)] for index, key in enumerate(keys)}
    number = options.adapters
    prompts, mixed = keys[:: len(kinds)], keys[:number]
    traffic = {ONE: prompts[:1]}
    if number > 1:
        traffic |= {PROMPTS.format(number): prompts, MIXED.format(number): mixed}
    entries = {name: entries_at_random(encodings, those, specs) for name, those in traffic.items()}
    used = list(dict.fromkeys((*prompts, *mixed)))
    settings = settings_for(
        str(subject.backbone.device),
        MAX_ACTIVE_ADAPTERS=str(len(used)),
        MAX_ACTIVE_MIB=str(_MAX_ACTIVE_MIB),
    )
    in_flight = in_flight_for(settings, entries[ONE])
    short = encodings_of_length(encoder, subject.words, count=_COMPARED // 4, tokens=_TOKENS)
    singles = entries_at_random(short, prompts, specs)
    async with AsyncExitStack() as stack:
        engines: dict[str, LocalEngine] = {}
        for dtype, backbone in backbones.items():
            progress(f"starting an engine in {dtype}")
            engine = await stack.enter_async_context(started(backbone, store, settings))
            await preload(engine, used)
            engines[dtype] = engine
        measures = {
            f"{dtype}, {name}": measure_of(engine, texts, options, in_flight)
            for name, texts in entries.items()
            for dtype, engine in engines.items()
        }
        progress("capturing graphs")
        for measure in measures.values():
            for _ in range(_CAPTURING_TURNS):
                await measure()
        rates = await take_turns(measures, rounds=options.rounds)
        latencies = await _latencies(engines, singles, options)
        everything = [entry for texts in entries.values() for entry in texts[: _COMPARED // 2]]
        scores = {dtype: await _scores(engine, everything) for dtype, engine in engines.items()}
    first = options.types[0]
    figures: list[dict[str, Any]] = [
        {
            "name": f"{dtype}, {name}",
            "texts_per_second": spread(rates[f"{dtype}, {name}"]),
            "over_first_type": ratio(rates[f"{dtype}, {name}"], rates[f"{first}, {name}"]),
        }
        for name in entries
        for dtype in engines
    ]
    for dtype in engines:
        figures.append({"name": f"{dtype}, one text", **percentiles_ms(latencies[dtype])})
    columns = ("", "texts/s", "range", f"x {first}", "p50 ms", "p99 ms")
    conditions = subject.conditions | {
        "dtype": ", ".join(f"{dtype} ({each.computes})" for dtype, each in backbones.items()),
        "changed scores": {
            dtype: _change(scores[dtype], scores[first]) for dtype in options.types[1:]
        },
        **_conditions(options, encodings, in_flight, settings.max_batch_tokens, len(everything)),
    }
    title = f"types: {subject.conditions['backbone']}"
    return Report(title, columns, [_row(figure) for figure in figures], figures, conditions)


async def _latencies(
    engines: Mapping[str, LocalEngine], entries: Sequence[Entry], options: Namespace
) -> dict[str, list[float]]:
    """Seconds of calls with one text each, an engine after the other in each round.

    The first round warms up and is thrown away.
    """
    seconds: dict[str, list[float]] = {dtype: [] for dtype in engines}
    for number in range(options.rounds + 1):
        for dtype, engine in engines.items():
            for entry in islice(cycle(entries), options.calls):
                sent = perf_counter()
                await engine.predict([entry])
                if number:
                    seconds[dtype].append(perf_counter() - sent)
    return seconds


async def _scores(engine: LocalEngine, entries: Sequence[Entry]) -> list[np.ndarray[Any, Any]]:
    size = 32
    scores: list[np.ndarray[Any, Any]] = []
    for start in range(0, len(entries), size):
        completion = await engine.predict(list(entries[start : start + size]))
        scores += [row.scores for row in completion.rows]
    return scores


def _change(scores: Sequence[np.ndarray[Any, Any]], others: Sequence[np.ndarray[Any, Any]]) -> str:
    """Of every text the score that changes most."""
    changes = [float(np.abs(one - other).max()) for one, other in zip(scores, others, strict=True)]
    return f"mean {mean(changes):.4f}, largest {max(changes):.3f}"


def _conditions(
    options: Namespace,
    encodings: Sequence[Encoding],
    in_flight: int,
    max_tokens: int,
    compared: int,
) -> dict[str, Any]:
    lengths = [len(encoding) for encoding in encodings]
    return {
        "texts": f"{len(lengths)}, mean {mean(lengths):.1f} tokens, longest {max(lengths)}; "
        f"{compared} compared; one text: {_TOKENS} tokens, {options.calls} calls a round",
        "traffic": f"{in_flight} texts in flight, {options.per_request} a request, each text under "
        "an adapter at random",
        "adapters": "random; prompts t=10, m=L/2; all active",
        "batches": f"at most {max_tokens} tokens",
        "rounds": f"{options.rounds} of {options.seconds:g} s, medians",
    }


def _row(figure: Mapping[str, Any]) -> list[str]:
    if "texts_per_second" not in figure:
        return [figure["name"], "", "", "", f"{figure['p50_ms']:.2f}", f"{figure['p99_ms']:.2f}"]
    rate = rate_cells(figure["texts_per_second"])
    return [figure["name"], *rate, f"{figure['over_first_type']:.3f}", "", ""]
