"""The service beside Infinity and LitServe: same weights, texts and load, in turns, on a CPU.

They serve the default backbone with a classifier of two labels; this service serves it with one
adapter, or with many that requests name at random. Our texts have prompt tokens; theirs do not.
"""

import random
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from adapters.backbone.loading import DEFAULT_BACKBONE, load_backbone
from benchmarks.arguments import at_least, duration
from benchmarks.contest import Contender, bodies_of, report_of, rounds_of
from benchmarks.http import body_of
from benchmarks.report import BenchmarkFailed, Report, progress
from benchmarks.servers import infinity, litserve, service, write_classifier
from benchmarks.stock import stock
from benchmarks.texts import make_texts, words_of

MEAN_TOKENS = 26
TEXTS = 4096
BASELINE = "infinity float32"
DTYPES = ("float32", "bfloat16")
OUR_DTYPES = ("float32", "auto")


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
    parser.add_argument(
        "--rival-types",
        choices=DTYPES,
        nargs="+",
        default=DTYPES,
        help="that theirs compute in; float32 is what all are compared with, so it is always there",
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
            *_theirs(stack, folder, options.python, texts, options.rival_types),
            *_ours(stack, folder, texts, options.counts, options.types),
        ]
        measured = rounds_of(contenders, seconds=options.seconds, rounds=options.rounds)
    conditions = {
        "backbone": f"{DEFAULT_BACKBONE}: its own weights",
        "device": "cpu",
        "texts": f"{TEXTS}, mean {MEAN_TOKENS} tokens",
        "clients": "benchmarks.client, one process on the same cores",
        "rounds": f"{options.rounds} of {options.seconds:g} s in turns, medians",
    }
    return report_of("peers, CPU", measured, conditions, baseline=BASELINE)


def _theirs(
    stack: ExitStack,
    folder: Path,
    python: Path,
    texts: Sequence[str],
    types: Sequence[str],
) -> Iterator[Contender]:
    classifier = folder / "classifier"
    write_classifier(classifier)
    bodies = bodies_of(
        folder, "classifier", texts, lambda few: {"input": few, "model": "classifier"}
    )
    servers = (("infinity", infinity, "classify"), ("litserve", litserve, "predict"))
    for dtype in dict.fromkeys(["float32", *types]):
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
            bodies = bodies_of(folder, f"ours-{count}", texts, body)
            yield Contender(f"ours {dtype}, {count} {noun}", f"{server.url}/v1/predict", bodies)
