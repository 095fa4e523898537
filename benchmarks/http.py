"""The service over HTTP on one machine with its clients: 32 texts a request, one, and one alone."""

import random
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from adapters.backbone.loading import load_backbone
from benchmarks.arguments import add_model_arguments, add_workers_argument, at_least, duration
from benchmarks.load import Figures, load, write_bodies
from benchmarks.processors import Used
from benchmarks.report import Report, progress
from benchmarks.servers import Server, processes_of, service, settings_of
from benchmarks.shapes import described, located
from benchmarks.stock import stock
from benchmarks.subject import MEAN_TOKENS
from benchmarks.texts import make_texts, words_of


@dataclass(frozen=True, slots=True)
class Shape:
    """One kind of load."""

    name: str
    texts: int
    connections: int


def add_arguments(parser: ArgumentParser) -> None:
    add_model_arguments(parser)
    add_workers_argument(parser)
    parser.add_argument("--adapters", type=at_least(1), default=64, help="that requests name")
    parser.add_argument("--connections", type=at_least(1), default=32, help="one text a request")
    parser.add_argument(
        "--bulk-connections", type=at_least(1), default=8, help="32 texts a request"
    )
    parser.add_argument("--clients", type=at_least(1), default=1, help="client processes")
    parser.add_argument("--texts", type=at_least(32), default=8192, help="different texts")
    parser.add_argument("--seconds", type=duration, default=8.0, help="of every load")


def run(options: Namespace) -> Report:
    shapes = (
        Shape("32 texts a request", 32, options.bulk_connections),
        Shape("one text a request", 1, options.connections),
        Shape("one text, one idle client", 1, 1),
    )
    adapters = options.adapters
    with TemporaryDirectory(prefix="idspam-http-") as temporary:
        folder = Path(temporary)
        source = located(options.backbone, folder)
        progress(f"storing {adapters} adapters")
        backbone = load_backbone(source, device="cpu")
        keys = stock(folder / "store", backbone, names=adapters, distinct=adapters)
        del backbone
        texts = make_texts(words_of(source), count=options.texts, mean_tokens=MEAN_TOKENS)
        settings = settings_of(options) | {
            "BACKBONE": source,
            "MAX_ACTIVE_ADAPTERS": str(max(adapters, 64)),
        }
        progress("starting the service")
        with service(folder / "store", log=folder / "service.log", **settings) as server:
            names = [key.name for key in keys]
            measured = [_measure(server, shape, texts, names, folder, options) for shape in shapes]
    conditions = {
        "backbone": described(options.backbone),
        "device": options.device,
        "dtype": options.dtype,
        "service": processes_of(options),
        "texts": f"{options.texts}, mean {MEAN_TOKENS:.0f} tokens, each under one of {adapters} "
        "adapters",
        "clients": f"benchmarks.client (asyncio, uvloop), {options.clients} processes, loopback",
        "seconds": options.seconds,
    }
    rows, figures = [], []
    for shape, (loaded, used) in zip(shapes, measured, strict=True):
        rates = (loaded.requests_per_second, loaded.texts_per_second)
        others = (loaded.p50_ms, loaded.p90_ms, loaded.p99_ms, loaded.client_cpu)
        cells = [f"{rate:,.0f}" for rate in rates] + [f"{value:.2f}" for value in others]
        # A single process does the work of both.
        per_text = [used.get("engine", used.get("service", 0.0)), used.get("worker", 0.0)]
        costs = [f"{each / shape.texts:,.1f}" if each else "" for each in per_text]
        rows.append([shape.name, str(shape.connections), *cells, *costs])
        load_of = {"load": shape.name, "texts_per_request": shape.texts}
        figures.append(
            load_of
            | {"connections": shape.connections}
            | asdict(loaded)
            | {"processor_us_per_request": used}
        )
    columns = ("", "connections", "requests/s", "texts/s", "p50 ms", "p90 ms", "p99 ms")
    costs_of = ("client CPU", "engine us/text", "workers us/text")
    title = f"http: {described(options.backbone)}"
    return Report(title, (*columns, *costs_of), rows, figures, conditions)


def body_of(texts: Sequence[str], names: Sequence[str], rng: random.Random) -> Any:
    """The body of a request for texts, each under an adapter at random."""
    if len(texts) == 1:
        return {"adapter": rng.choice(names), "inputs": texts[0]}
    return {"inputs": [{"text": text, "adapter": rng.choice(names)} for text in texts]}


def _measure(
    server: Server,
    shape: Shape,
    texts: Sequence[str],
    names: Sequence[str],
    folder: Path,
    options: Namespace,
) -> tuple[Figures, dict[str, float]]:
    """The figures of a load, and the processor time of a request by kind of process."""
    progress(shape.name)
    rng = random.Random(0)
    starts = range(0, len(texts) - shape.texts + 1, shape.texts)
    bodies = [body_of(texts[start : start + shape.texts], names, rng) for start in starts]
    before = Used.now(server.url, server.pid)
    figures = load(
        f"{server.url}/v1/predict",
        write_bodies(folder / f"{shape.texts}.jsonl", bodies),
        texts_per_request=shape.texts,
        connections=shape.connections,
        seconds=options.seconds,
        warm_up=options.seconds / 4,
        processes=options.clients,
    )
    return figures, Used.now(server.url, server.pid).per_request(before)
