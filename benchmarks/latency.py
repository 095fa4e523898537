"""Round trip of small requests through an idle engine, one at a time, and where the time goes."""

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import cycle, islice
from statistics import median
from time import perf_counter
from typing import Any

import uvloop

from benchmarks.arguments import add_model_arguments, at_least
from benchmarks.loop import entries_of, percentiles_ms, preload, settings_for, started
from benchmarks.report import Report, progress
from benchmarks.stock import stocked
from benchmarks.subject import Subject, loaded_subject
from benchmarks.texts import encodings_of_length
from service.engine.engine import LocalEngine
from service.engine.interface import Entry
from service.engine.observer import BatchReport, Observer

ADAPTERS = 64
_TEXTS = 256
_WARM_UP_CALLS = 50


@dataclass(slots=True)
class Stages(Observer):
    """Keeps the engine's report of every batch."""

    batches: list[BatchReport] = field(default_factory=list)

    def batch_done(self, report: BatchReport) -> None:
        self.batches.append(report)


def add_arguments(parser: ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument(
        "--tokens", type=at_least(1), default=32, help="of every text, special ones included"
    )
    parser.add_argument(
        "--sizes", type=at_least(1), nargs="+", default=[1, 8, 32], help="texts of a request"
    )
    parser.add_argument("--calls", type=at_least(1), default=500)


def run(options: Namespace) -> Report:
    with (
        loaded_subject(options) as subject,
        stocked(subject.backbone, names=ADAPTERS, distinct=ADAPTERS) as (store, keys),
    ):
        encodings = encodings_of_length(
            subject.backbone.encoder, subject.words, count=_TEXTS, tokens=options.tokens
        )
        entries = entries_of(encodings, list(islice(cycle(keys), _TEXTS)), subject.spec)

        async def measure() -> list[dict[str, Any]]:
            stages = Stages()
            settings = settings_for(str(subject.backbone.device), MAX_ACTIVE_ADAPTERS=str(ADAPTERS))
            async with started(subject.backbone, store, settings, stages) as engine:
                await preload(engine, keys)
                return [
                    await _calls(engine, stages, entries, size, options.calls)
                    for size in options.sizes
                ]

        return _report(subject, uvloop.run(measure()), options)


async def _calls(
    engine: LocalEngine, stages: Stages, entries: Sequence[Entry], size: int, calls: int
) -> dict[str, Any]:
    progress(f"{calls} calls of {size} texts")
    turns = cycle(entries)
    round_trips, queue, inference = [], [], []
    for number in range(_WARM_UP_CALLS + calls):
        if number == _WARM_UP_CALLS:
            stages.batches.clear()
        request = [next(turns) for _ in range(size)]
        sent = perf_counter()
        completion = await engine.predict(request)
        seconds = perf_counter() - sent
        if number >= _WARM_UP_CALLS:
            round_trips.append(seconds)
            queue.append(completion.queue_seconds)
            inference.append(completion.inference_seconds)
    return {
        "texts": size,
        **percentiles_ms(round_trips),
        "queue_ms": median(queue) * 1e3,
        "inference_ms": median(inference) * 1e3,
        "generator_ms": _median_ms([batch.generator_seconds for batch in stages.batches]),
        "backbone_ms": _median_ms([batch.backbone_seconds for batch in stages.batches]),
    }


def _median_ms(seconds: Sequence[float | None]) -> float | None:
    """None if the engine does not report the stage."""
    reported = [value for value in seconds if value is not None]
    return median(reported) * 1e3 if reported else None


def _report(subject: Subject, figures: Sequence[dict[str, Any]], options: Namespace) -> Report:
    names = ("p50", "p90", "p99", "queue", "inference", "generator", "backbone")
    conditions = subject.conditions | {
        "requests": f"{options.calls} calls one after the other, texts of {options.tokens} tokens "
        f"under {ADAPTERS} adapters in turns",
        "stages": "medians; inference is all the time that the device thread spends on a batch, "
        "generator and backbone as the engine reports them (on CUDA: launch time)",
    }
    rows = [
        [str(figure["texts"]), *(_cell(figure[f"{name}_ms"]) for name in names)]
        for figure in figures
    ]
    columns = ("texts", *(f"{name} ms" for name in names))
    title = f"latency of an idle engine: {subject.conditions['backbone']}"
    return Report(title, columns, rows, figures, conditions)


def _cell(milliseconds: float | None) -> str:
    return "-" if milliseconds is None else f"{milliseconds:.2f}"
