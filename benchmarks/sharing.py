"""One text for several adapters: its work over that of as many different texts.

The answers of one text share the layers below the first difference of their adapters. Two engines
take turns on the same backbone, one of them with sharing switched off. *Work* is the time of an
answer to one text under `--tasks` adapters, over that of an answer where every text is different.
"""

from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import uvloop

from adapters.backbone.model import Backbone, random_adapter
from adapters.format.spec import AdapterSpec, AttentionPrompt, VectorTuning
from adapters.tokenizer import Encoding
from benchmarks.arguments import add_model_arguments, at_least, counts, duration
from benchmarks.loop import (
    in_flight_for,
    measure_of,
    percentiles_ms,
    preload,
    settings_for,
    started,
)
from benchmarks.report import Report, progress, rate_cells, spread
from benchmarks.stock import stocked_of
from benchmarks.subject import Subject, loaded_subject
from benchmarks.texts import encodings_of_length
from benchmarks.turns import Measure, ratio, take_turns
from service.engine.engine import LocalEngine
from service.engine.interface import AdapterKey, Entry, cost_of

PROMPT, MIDDLE, HEAD, TUNED = "prompt at 2/3", "prompt at 1/2", "head", "prompt and vectors"
DIFFERENT, ONE, OFF = "different texts", "one text", "one text, sharing off"
# A bucket's graph is captured when 16 batches have needed it.
_WARM_UP_CALLS = 40


def specs_of(backbone: Backbone) -> dict[str, AdapterSpec]:
    """The spec of each kind.

    `train fit` makes the last one by default: a short prompt above two thirds of the layers, and
    vectors in all of them. Without vectors its prompt is longer, and above half of the layers.
    """
    usual = random_adapter(backbone).spec
    assert isinstance(usual.prompt, AttentionPrompt)
    prompt = usual.prompt.model_copy(
        update={"length": 5, "bottleneck": 16, "layer": round(2 / 3 * backbone.layers)}
    )
    vectors = VectorTuning(
        layers=(0, backbone.layers), intermediate_size=backbone.intermediate_size
    )
    return {
        PROMPT: usual.model_copy(update={"prompt": prompt}),
        MIDDLE: usual,
        HEAD: usual.model_copy(update={"prompt": None}),
        TUNED: usual.model_copy(update={"prompt": prompt, "tuning": vectors}),
    }


def add_arguments(parser: ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("--tasks", type=at_least(2), default=8, help="adapters of a text")
    parser.add_argument("--texts", type=at_least(64), default=1024, help="different texts")
    parser.add_argument(
        "--tokens",
        type=counts,
        default=[39, 200],
        help="of every text, special ones included: the first number under load, all of them alone",
    )
    parser.add_argument("--per-request", type=at_least(1), default=4, help="texts of a request")
    parser.add_argument("--calls", type=at_least(1), default=200, help="single requests")
    parser.add_argument("--seconds", type=duration, default=1.0, help="of every figure and round")
    parser.add_argument("--rounds", type=at_least(1), default=2)


def run(options: Namespace) -> Report:
    with loaded_subject(options) as subject:
        specs = specs_of(subject.backbone)
        kinds = list(specs.values())
        # The kinds in turns: adapter i is of kind i modulo their number.
        with stocked_of(
            kinds,
            names=options.tasks * len(kinds),
            distinct=options.tasks * len(kinds),
        ) as (store, keys):
            return uvloop.run(_run(subject, options, specs, store, keys))


async def _run(
    subject: Subject,
    options: Namespace,
    specs: Mapping[str, AdapterSpec],
    store: Path,
    keys: Sequence[AdapterKey],
) -> Report:
    settings = settings_for(str(subject.backbone.device), MAX_ACTIVE_ADAPTERS=str(len(keys)))
    by_kind = {name: keys[start :: len(specs)] for start, name in enumerate(specs)}
    texts = {
        tokens: encodings_of_length(
            subject.backbone.encoder, subject.words, count=options.texts, tokens=tokens
        )
        for tokens in options.tokens
    }
    async with AsyncExitStack() as stack:
        engines = {}
        for sharing in (True, False):
            engines[sharing] = await stack.enter_async_context(
                started(subject.backbone, store, replace(settings, sharing=sharing))
            )
            await preload(engines[sharing], keys)
        rates: dict[str, list[float]] = {}
        in_flight = 0
        load = texts[options.tokens[0]]
        for kind, members in by_kind.items():
            traffic = {
                way: _traffic(load, members, specs[kind], different=way == DIFFERENT)
                for way in _ways(kind)
            }
            in_flight = in_flight_for(settings, traffic[ONE])
            # A request has all answers of its texts.
            of_request = Namespace(
                per_request=options.per_request * options.tasks, seconds=options.seconds
            )
            measures: dict[str, Measure] = {
                f"{kind}: {way}": measure_of(engines[way != OFF], entries, of_request, in_flight)
                for way, entries in traffic.items()
            }
            rates |= await take_turns(measures, rounds=options.rounds)
        seconds: dict[tuple[str, int], dict[str, list[float]]] = {}
        for tokens, encodings in texts.items():
            for kind, members in by_kind.items():
                ways = {
                    way: (
                        engines[way != OFF],
                        _traffic(encodings, members, specs[kind], different=way == DIFFERENT),
                    )
                    for way in _ways(kind)
                }
                progress(f"{options.calls} requests of {options.tasks} answers: {kind}, {tokens}")
                seconds[kind, tokens] = await _alone(ways, options)
    figures = [
        _under_load(kind, {way: rates[f"{kind}: {way}"] for way in _ways(kind)}) for kind in by_kind
    ]
    figures += [_single(kind, tokens, taken) for (kind, tokens), taken in seconds.items()]
    return Report(
        f"sharing: {subject.conditions['backbone']}, {options.tasks} adapters of one text",
        ("", DIFFERENT, ONE, OFF, "work"),
        [_row(figure) for figure in figures],
        figures,
        subject.conditions | _conditions(options, settings.max_batch_tokens, specs, in_flight),
    )


def _ways(kind: str) -> tuple[str, ...]:
    return (DIFFERENT, ONE, OFF) if kind == PROMPT else (DIFFERENT, ONE)


def _traffic(
    encodings: Sequence[Encoding],
    keys: Sequence[AdapterKey],
    spec: AdapterSpec,
    *,
    different: bool,
) -> list[Entry]:
    """Every text under every adapter, text by text.

    different: the adapters read far apart from each other, so that no batch has a text twice.
    """
    apart = len(encodings) // len(keys) if different else 0
    pairs = [
        (key, encodings[(start + index * apart) % len(encodings)])
        for start in range(len(encodings))
        for index, key in enumerate(keys)
    ]
    return [Entry(key, encoding, cost_of(encoding, spec)) for key, encoding in pairs]


async def _alone(
    ways: Mapping[str, tuple[LocalEngine, Sequence[Entry]]], options: Namespace
) -> dict[str, list[float]]:
    """Seconds of single requests, in turns."""
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    warm_up = min(_WARM_UP_CALLS, options.calls)
    for number in range(warm_up + options.calls):
        for way, (engine, entries) in ways.items():
            start = number * options.tasks % len(entries)
            sent = perf_counter()
            await engine.predict(entries[start : start + options.tasks])
            if number >= warm_up:
                seconds[way].append(perf_counter() - sent)
    return seconds


def _under_load(kind: str, rates: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    return {
        "name": f"{kind}, answers/s under load",
        "answers_per_second": {way: spread(rate) for way, rate in rates.items()},
        "work": ratio(rates[DIFFERENT], rates[ONE]),
    }


def _single(kind: str, tokens: int, seconds: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    return {
        "name": f"{kind}, one request of {tokens} tokens, p50 ms",
        "milliseconds": {way: percentiles_ms(taken) for way, taken in seconds.items()},
        "work": median(seconds[ONE]) / median(seconds[DIFFERENT]),
    }


def _row(figure: Mapping[str, Any]) -> list[str]:
    if "milliseconds" in figure:
        cells = {way: f"{each['p50_ms']:.2f}" for way, each in figure["milliseconds"].items()}
    else:
        cells = {way: rate_cells(rate)[0] for way, rate in figure["answers_per_second"].items()}
    ways = (DIFFERENT, ONE, OFF)
    return [figure["name"], *(cells.get(way, "") for way in ways), f"{figure['work']:.2f}"]


def _conditions(
    options: Namespace, batch: int, specs: Mapping[str, AdapterSpec], in_flight: int
) -> dict[str, Any]:
    prompts = {kind: specs[kind].prompt for kind in (PROMPT, MIDDLE)}
    return {
        "texts": f"{options.texts} of {options.tokens[0]} tokens under load",
        "traffic": f"{in_flight} answers in flight, {options.per_request * options.tasks} a "
        f"request: {options.per_request} texts under {options.tasks} adapters",
        "prompts": ", ".join(
            f"{kind}: t={prompt.length}, before layer {prompt.layer}"
            for kind, prompt in prompts.items()
            if prompt is not None
        ),
        "batches": f"at most {batch} tokens",
        "rounds": f"{options.rounds} of {options.seconds:g} s, medians; {options.calls} single "
        "requests each, in turns",
        "work": "an answer's time with one text over its time with different texts",
    }
