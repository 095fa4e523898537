"""Texts/s of the engine by the kind of adapter: prompts, vectors, LoRA, heads, and all mixed.

Every kind is measured through one engine, in turns in one run: each text under an adapter of the
kind at random. The first kind, the prompt alone, is what the others are compared with.
"""

from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import uvloop

from adapters.backbone.model import Backbone, random_adapter
from adapters.format.spec import (
    AdapterSpec,
    FirstTokenPrompt,
    LoraTuning,
    RoutedPrompt,
    Site,
    StaticPrompt,
    VectorTuning,
)
from adapters.tokenizer import Encoding
from benchmarks.arguments import add_model_arguments, at_least, duration
from benchmarks.loop import (
    entries_at_random,
    in_flight_for,
    measure_of,
    preload,
    settings_for,
    started,
)
from benchmarks.report import Report, rate_cells, spread
from benchmarks.stock import stocked_of
from benchmarks.subject import MEAN_TOKENS, Subject, loaded_subject
from benchmarks.texts import make_encodings
from benchmarks.turns import ratio, take_turns
from service.engine.interface import AdapterKey
from service.engine.settings import EngineSettings

PROMPT = "prompt"
MIXED = "all kinds mixed"
_MAX_ACTIVE_MIB = 32768
_CAPTURING_TURNS = 2


def specs_of(backbone: Backbone) -> dict[str, AdapterSpec]:
    """The spec of each kind; the first is that of `train fit`."""
    usual = random_adapter(backbone).spec
    layers, f = (0, backbone.layers), backbone.intermediate_size
    vectors = VectorTuning(layers=layers, intermediate_size=f)
    lora = LoraTuning(
        layers=layers, intermediate_size=f, rank=8, scaling=2.0, sites=(Site.QUERY, Site.VALUE)
    )
    m = backbone.layers // 2
    changes: dict[str, dict[str, Any]] = {
        PROMPT: {},
        "prompt and vectors": {"tuning": vectors},
        "vectors": {"prompt": None, "tuning": vectors},
        "LoRA r=8, q and v": {"prompt": None, "tuning": lora},
        "LPT": {"prompt": FirstTokenPrompt(length=10, layer=m, bottleneck=64)},
        "SMoP": {"prompt": RoutedPrompt(length=5, prompts=4)},
        "prompt tuning": {"prompt": StaticPrompt(length=10)},
        "head": {"prompt": None},
    }
    return {name: usual.model_copy(update=change) for name, change in changes.items()}


def add_arguments(parser: ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("--adapters", type=at_least(1), default=256, help="of each kind")
    parser.add_argument("--distinct", type=at_least(1), default=64, help="different files of each")
    parser.add_argument("--texts", type=at_least(32), default=4096, help="different texts")
    parser.add_argument("--per-request", type=at_least(1), default=32, help="texts of a request")
    parser.add_argument("--seconds", type=duration, default=3.0, help="of every figure and round")
    parser.add_argument("--rounds", type=at_least(1), default=3)


def run(options: Namespace) -> Report:
    with loaded_subject(options) as subject:
        specs = specs_of(subject.backbone)
        kinds = list(specs.values())
        # The kinds in turns: adapter i is of kind i modulo their number.
        with stocked_of(
            kinds,
            names=options.adapters * len(kinds),
            distinct=min(options.adapters, options.distinct) * len(kinds),
        ) as (store, keys):
            return uvloop.run(_run(subject, options, specs, store, keys))


async def _run(
    subject: Subject,
    options: Namespace,
    specs: Mapping[str, AdapterSpec],
    store: Path,
    keys: Sequence[AdapterKey],
) -> Report:
    encodings = make_encodings(
        subject.backbone.encoder, subject.words, count=options.texts, mean_tokens=MEAN_TOKENS
    )
    # All stay on the device: otherwise every kind's turn would start by loading what the others
    # have pushed out.
    settings = settings_for(
        str(subject.backbone.device),
        MAX_ACTIVE_ADAPTERS=str(len(keys)),
        MAX_ACTIVE_MIB=str(_MAX_ACTIVE_MIB),
    )
    by_kind = {name: keys[start :: len(specs)] for start, name in enumerate(specs)}
    owners = {key: specs[name] for name, members in by_kind.items() for key in members}
    # As many adapters as each kind has, of all kinds alike.
    by_kind[MIXED] = keys[: options.adapters]
    traffic = {
        name: entries_at_random(encodings, members, owners) for name, members in by_kind.items()
    }
    in_flight = in_flight_for(settings, traffic[PROMPT])
    async with started(subject.backbone, store, settings) as engine:
        await preload(engine, keys)
        measures = {
            name: measure_of(engine, entries, options, in_flight)
            for name, entries in traffic.items()
        }
        # Until the buckets of each kind have graphs.
        for measure in measures.values():
            for _ in range(_CAPTURING_TURNS):
                await measure()
        rates = await take_turns(measures, rounds=options.rounds)
    figures: list[dict[str, Any]] = [
        {
            "name": name,
            "texts_per_second": spread(rate),
            "over_prompt": ratio(rate, rates[PROMPT]),
        }
        for name, rate in rates.items()
    ]
    return Report(
        f"kinds: {subject.conditions['backbone']}, {options.adapters} adapters of each",
        ("", "texts/s", "range", "x prompt"),
        [
            [
                figure["name"],
                *rate_cells(figure["texts_per_second"]),
                f"{figure['over_prompt']:.3f}",
            ]
            for figure in figures
        ],
        figures,
        subject.conditions | _conditions(options, settings, encodings, in_flight),
    )


def _conditions(
    options: Namespace, settings: EngineSettings, encodings: Sequence[Encoding], in_flight: int
) -> dict[str, Any]:
    lengths = [len(encoding) for encoding in encodings]
    return {
        "texts": f"{len(lengths)}, mean {mean(lengths):.1f} tokens, longest {max(lengths)}",
        "traffic": f"{in_flight} texts in flight, {options.per_request} a request, each text under "
        "an adapter of the kind at random",
        "adapters": f"prompts t=10, m=L/2; at most {options.distinct} different files of each "
        "kind, all of all kinds active",
        "batches": f"at most {settings.max_batch_tokens} tokens",
        "rounds": f"{options.rounds} of {options.seconds:g} s, medians",
    }
