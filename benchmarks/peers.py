"""The service beside Infinity and LitServe: same weights, texts and load, in turns, on a CPU.

They serve the default backbone with a classifier of two labels; this service serves it with one
adapter, or with many that requests name at random. Our texts have prompt tokens; theirs do not.
"""

import random
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeAlias

from adapters.backbone.loading import DEFAULT_BACKBONE, load_backbone
from benchmarks.arguments import at_least, duration
from benchmarks.http import body_of
from benchmarks.load import Figures, load, write_bodies
from benchmarks.report import BenchmarkFailed, Report, progress, rate_cells, spread
from benchmarks.servers import infinity, litserve, service, write_classifier
from benchmarks.stock import stock
from benchmarks.texts import make_texts, words_of
from benchmarks.turns import ratio

MEAN_TOKENS = 26
TEXTS = 4096
# (texts a request, connections)
SHAPES = ((1, 32), (32, 4))
WARM_UP_SECONDS = 3.0
BASELINE = "infinity float32"
DTYPES = ("float32", "bfloat16")
OUR_DTYPES = ("float32", "auto")

Measured: TypeAlias = dict[tuple[str, int], list[Figures]]


@dataclass(frozen=True, slots=True)
class Contender:
    """One server under one load: where to post, and the file of bodies for each request size."""

    name: str
    url: str
    bodies: Mapping[int, Path]


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--python",
        type=Path,
        default=Path("runs/peers/bin/python"),
        help="of an environment with infinity-emb[server,torch] and litserve (make bench-peers)",
    )
    parser.add_argument(
        "--counts", type=at_least(1), nargs="+", default=[1, 64], help="our adapters"
    )
    parser.add_argument(
        "--types",
        choices=["float32", "bfloat16", "int8", "auto"],
        nargs="+",
        default=OUR_DTYPES,
        help="that ours computes in",
    )
    parser.add_argument("--seconds", type=duration, default=10.0, help="of every load")
    parser.add_argument("--rounds", type=at_least(1), default=3)


def run(options: Namespace) -> Report:
    if not options.python.exists():
        raise BenchmarkFailed(f"there is no {options.python}: run `make bench-peers`")
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="idspam-peers-")))
        texts = make_texts(words_of(DEFAULT_BACKBONE), count=TEXTS, mean_tokens=MEAN_TOKENS)
        contenders = [
            *_theirs(stack, folder, options.python, texts),
            *_ours(stack, folder, texts, options.counts, options.types),
        ]
        measured = _rounds(contenders, seconds=options.seconds, rounds=options.rounds)
    conditions = {
        "backbone": f"{DEFAULT_BACKBONE}: its own weights",
        "device": "cpu",
        "texts": f"{TEXTS}, mean {MEAN_TOKENS} tokens",
        "clients": "benchmarks.client, one process on the same cores",
        "rounds": f"{options.rounds} of {options.seconds:g} s in turns, medians",
    }
    return _report(measured, conditions)


def _theirs(
    stack: ExitStack, folder: Path, python: Path, texts: Sequence[str]
) -> Iterator[Contender]:
    classifier = folder / "classifier"
    write_classifier(classifier)
    bodies = _bodies(folder, "classifier", texts, lambda few: {"input": few, "model": "classifier"})
    servers = (("infinity", infinity, "classify"), ("litserve", litserve, "predict"))
    for dtype in DTYPES:
        for name, start, path in servers:
            progress(f"starting {name} {dtype}")
            log = folder / f"{name}-{dtype}.log"
            server = stack.enter_context(start(python, classifier, dtype=dtype, log=log))
            yield Contender(f"{name} {dtype}", f"{server.url}/{path}", bodies)


def _ours(
    stack: ExitStack,
    folder: Path,
    texts: Sequence[str],
    counts: Sequence[int],
    types: Sequence[str],
) -> Iterator[Contender]:
    backbone = load_backbone(device="cpu")
    for dtype in types:
        progress(f"starting ours {dtype}")
        store, log, most = folder / dtype, folder / f"{dtype}.log", max(counts)
        names = [key.name for key in stock(store, backbone, names=most, distinct=most)]
        server = stack.enter_context(service(store, log=log, DEVICE="cpu", DTYPE=dtype))
        for count in counts:
            noun = "adapter" if count == 1 else "adapters"
            body = partial(body_of, names=names[:count], rng=random.Random(0))
            bodies = _bodies(folder, f"ours-{count}", texts, body)
            yield Contender(f"ours {dtype}, {count} {noun}", f"{server.url}/v1/predict", bodies)


def _bodies(
    folder: Path, name: str, texts: Sequence[str], body: Callable[[Sequence[str]], Any]
) -> dict[int, Path]:
    return {
        size: write_bodies(
            folder / f"{name}-{size}.jsonl",
            [body(texts[start : start + size]) for start in range(0, len(texts), size)],
        )
        for size, _ in SHAPES
    }


def _rounds(contenders: Sequence[Contender], *, seconds: float, rounds: int) -> Measured:
    """Every server once a round (`benchmarks.turns`)."""
    measured: Measured = {}
    for number in range(rounds + 1):
        for contender in contenders:
            for size, connections in SHAPES:
                figures = load(
                    contender.url,
                    contender.bodies[size],
                    texts_per_request=size,
                    connections=connections,
                    seconds=seconds if number else WARM_UP_SECONDS,
                )
                if number:
                    measured.setdefault((contender.name, size), []).append(figures)
                    rate = f"{figures.texts_per_second:,.0f} texts/s"
                    progress(f"round {number}/{rounds}: {contender.name}, {size} a request: {rate}")
    return measured


def _report(measured: Measured, conditions: Mapping[str, Any]) -> Report:
    rows, figures = [], []
    for (name, size), loads in measured.items():
        rates = [load.texts_per_second for load in loads]
        rate = spread(rates)
        times = ratio(rates, [load.texts_per_second for load in measured[BASELINE, size]])
        p50, p99 = spread([load.p50_ms for load in loads]), spread([load.p99_ms for load in loads])
        cells = [f"{times:.2f}", f"{p50['median']:.1f}", f"{p99['median']:.1f}"]
        rows.append([name, str(size), *rate_cells(rate), *cells])
        figures.append(
            {
                "server": name,
                "texts_per_request": size,
                "texts_per_second": rate,
                f"over_{BASELINE.replace(' ', '_')}": times,
                "p50_ms": p50,
                "p99_ms": p99,
            }
        )
    columns = ("server", "texts a request", "texts/s", "range", f"x {BASELINE}", "p50 ms", "p99 ms")
    return Report("peers, CPU", columns, rows, figures, conditions)
