"""Round trip of small requests through an idle engine, one at a time, and where its time goes."""

from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import cycle
from statistics import median
from time import perf_counter
from typing import Any

from benchmarks.arguments import at_least
from benchmarks.loop import entries_of, percentiles_ms, preload, run_async, settings_for, started
from benchmarks.report import Report, progress
from benchmarks.stock import stocked
from benchmarks.subject import Subject, add_backbone_arguments, subject
from benchmarks.texts import encodings_of_length
from service.engine.engine import LocalEngine
from service.engine.interface import Entry
from service.engine.observer import BatchReport, Observer

ADAPTERS = 64
_DIFFERENT_TEXTS = 256
_WARM_UP_CALLS = 50


@dataclass(slots=True)
class Stages(Observer):
    """What the engine reports of its batches, in seconds."""

    batches: list[BatchReport] = field(default_factory=list)

    def batch_done(self, report: BatchReport) -> None:
        self.batches.append(report)


def add_arguments(parser: ArgumentParser) -> None:
    add_backbone_arguments(parser)
    parser.add_argument(
        "--tokens", type=at_least(1), default=32, help="of every text, special ones too"
    )
    parser.add_argument(
        "--sizes", type=at_least(1), nargs="+", default=[1, 8, 32], help="texts of a request"
    )
    parser.add_argument("--calls", type=at_least(1), default=500)


def run(
    *, backbone: str, device: str, dtype: str, tokens: int, sizes: Sequence[int], calls: int
) -> Report:
    with (
        subject(backbone=backbone, device=device, dtype=dtype) as found,
        stocked(found.backbone, names=ADAPTERS, distinct=ADAPTERS) as (store, keys),
    ):
        encodings = encodings_of_length(
            found.backbone.encoder, found.words, count=_DIFFERENT_TEXTS, tokens=tokens
        )
        turns = cycle(keys)
        entries = entries_of(encodings, [next(turns) for _ in encodings], found.spec)

        async def measure() -> list[dict[str, Any]]:
            stages = Stages()
            settings = settings_for(str(found.backbone.device), MAX_ACTIVE_ADAPTERS=str(ADAPTERS))
            async with started(found.backbone, store, settings, stages) as engine:
                await preload(engine, keys)
                return [await _calls(engine, stages, entries, size, calls) for size in sizes]

        figures = run_async(measure())
    return _report(found, figures, tokens=tokens, calls=calls)


async def _calls(
    engine: LocalEngine, stages: Stages, entries: Sequence[Entry], size: int, calls: int
) -> dict[str, Any]:
    progress(f"{calls} calls of {size} texts")
    turns = cycle(entries)
    rounds, queue, inference = [], [], []
    for number in range(_WARM_UP_CALLS + calls):
        if number == _WARM_UP_CALLS:
            stages.batches.clear()
        request = [next(turns) for _ in range(size)]
        sent = perf_counter()
        completion = await engine.predict(request)
        took = perf_counter() - sent
        if number >= _WARM_UP_CALLS:
            rounds.append(took)
            queue.append(completion.queue_seconds)
            inference.append(completion.inference_seconds)
    return (
        {"texts": size}
        | percentiles_ms(rounds)
        | {
            "queue_ms": median(queue) * 1e3,
            "inference_ms": median(inference) * 1e3,
            "generator_ms": _median_ms([batch.generator_seconds for batch in stages.batches]),
            "backbone_ms": _median_ms([batch.backbone_seconds for batch in stages.batches]),
        }
    )


def _median_ms(seconds: Sequence[float | None]) -> float | None:
    """None where the engine does not tell its stages apart."""
    told = [item for item in seconds if item is not None]
    return median(told) * 1e3 if told else None


def _report(
    found: Subject, figures: Sequence[dict[str, Any]], *, tokens: int, calls: int
) -> Report:
    names = ("p50", "p90", "p99", "queue", "inference", "generator", "backbone")
    conditions = found.conditions | {
        "requests": f"{calls} calls one after the other, texts of {tokens} tokens under {ADAPTERS} "
        "adapters in turns",
        "stages": "medians; inference is all that the device thread spends on a batch, generator "
        "and backbone as the engine reports them (on CUDA: launch time)",
    }
    rows = [
        [str(figure["texts"]), *(_shown(figure[f"{name}_ms"]) for name in names)]
        for figure in figures
    ]
    columns = ("texts", *(f"{name} ms" for name in names))
    title = f"latency of an idle engine: {found.conditions['backbone']}"
    return Report(title, columns, rows, figures, conditions)


def _shown(milliseconds: float | None) -> str:
    return "-" if milliseconds is None else f"{milliseconds:.2f}"
