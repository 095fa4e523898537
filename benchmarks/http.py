"""The service over HTTP on one machine with its clients: 32 texts a request, one, and one alone."""

import random
from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from adapters.backbone.loading import load_backbone
from benchmarks.arguments import at_least, duration
from benchmarks.load import Figures, load, write_bodies
from benchmarks.report import Report, progress
from benchmarks.servers import Server, service
from benchmarks.shapes import described, located
from benchmarks.stock import stock
from benchmarks.subject import MEAN_TOKENS, add_backbone_arguments
from benchmarks.texts import make_texts, words_of


@dataclass(frozen=True, slots=True)
class Shape:
    """One kind of load."""

    name: str
    texts: int
    connections: int


def add_arguments(parser: ArgumentParser) -> None:
    add_backbone_arguments(parser)
    parser.add_argument("--workers", type=at_least(0), default=0, help="IDSPAM_WORKERS")
    parser.add_argument(
        "--adapters", type=at_least(1), default=64, help="that requests name at random"
    )
    parser.add_argument(
        "--connections", type=at_least(1), default=32, help="with one text a request"
    )
    parser.add_argument(
        "--bulk-connections", type=at_least(1), default=8, help="with 32 texts a request"
    )
    parser.add_argument("--clients", type=at_least(1), default=1, help="processes that send")
    parser.add_argument("--texts", type=at_least(32), default=8192, help="different ones")
    parser.add_argument("--seconds", type=duration, default=8.0, help="of every load")


def run(
    *,
    backbone: str,
    device: str,
    dtype: str,
    workers: int,
    adapters: int,
    connections: int,
    bulk_connections: int,
    clients: int,
    texts: int,
    seconds: float,
) -> Report:
    shapes = (
        Shape("32 texts a request", 32, bulk_connections),
        Shape("one text a request", 1, connections),
        Shape("one text, one idle client", 1, 1),
    )
    with TemporaryDirectory(prefix="idspam-http-") as temporary:
        folder = Path(temporary)
        source = located(backbone, folder)
        words = words_of(source)
        progress(f"storing {adapters} adapters")
        keys = stock(
            folder / "store", load_backbone(source, device="cpu"), names=adapters, distinct=adapters
        )
        names = [key.name for key in keys]
        made = make_texts(words, count=texts, mean_tokens=MEAN_TOKENS)
        settings = {
            "BACKBONE": source,
            "DEVICE": device,
            "DTYPE": dtype,
            "MAX_ACTIVE_ADAPTERS": str(max(adapters, 64)),
        }
        if workers:
            settings["WORKERS"] = str(workers)
        progress("starting the service")
        with service(folder / "store", log=folder / "service.log", **settings) as server:
            measured = [
                _measure(server, shape, made, names, folder, clients=clients, seconds=seconds)
                for shape in shapes
            ]
    conditions = {
        "backbone": described(backbone),
        "device": device,
        "dtype": dtype,
        "service": f"{workers} HTTP workers" if workers else "one process",
        "texts": f"{texts}, mean {MEAN_TOKENS:.0f} tokens, each under one of {adapters} adapters",
        "clients": f"benchmarks.client (asyncio and uvloop), {clients} processes, loopback",
        "seconds": seconds,
    }
    figures = [
        {"load": shape.name, "texts_per_request": shape.texts, "connections": shape.connections}
        | asdict(found)
        for shape, found in zip(shapes, measured, strict=True)
    ]
    return Report(
        f"http: {described(backbone)}",
        ("", "connections", "requests/s", "texts/s", "p50 ms", "p90 ms", "p99 ms", "client CPU"),
        [_row(shape, found) for shape, found in zip(shapes, measured, strict=True)],
        figures,
        conditions,
    )


def _measure(
    server: Server,
    shape: Shape,
    texts: Sequence[str],
    names: Sequence[str],
    folder: Path,
    *,
    clients: int,
    seconds: float,
) -> Figures:
    progress(shape.name)
    rng = random.Random(0)
    bodies: list[Any] = [
        body_of(texts[start : start + shape.texts], names, rng)
        for start in range(0, len(texts) - shape.texts + 1, shape.texts)
    ]
    return load(
        f"{server.url}/v1/predict",
        write_bodies(folder / f"{shape.texts}.jsonl", bodies),
        texts_per_request=shape.texts,
        connections=shape.connections,
        seconds=seconds,
        warm_up=seconds / 4,
        processes=clients,
    )


def body_of(texts: Sequence[str], names: Sequence[str], rng: random.Random) -> Any:
    """A request for texts, each under an adapter at random."""
    if len(texts) == 1:
        return {"adapter": rng.choice(names), "inputs": texts[0]}
    return {"inputs": [{"text": text, "adapter": rng.choice(names)} for text in texts]}


def _row(shape: Shape, found: Figures) -> list[str]:
    return [
        shape.name,
        str(shape.connections),
        f"{found.requests_per_second:,.0f}",
        f"{found.texts_per_second:,.0f}",
        f"{found.p50_ms:.2f}",
        f"{found.p90_ms:.2f}",
        f"{found.p99_ms:.2f}",
        f"{found.client_cpu:.2f}",
    ]
