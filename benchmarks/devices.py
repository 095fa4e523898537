"""One service on one device and on several, in turns with the same load."""

import json
import os
import random
import shutil
import signal
import time
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from threading import Thread
from urllib.request import urlopen

from adapters.backbone.loading import load_backbone
from benchmarks.arguments import add_backbone_argument, at_least, duration
from benchmarks.http import Shape, body_of
from benchmarks.load import Figures, load, write_bodies
from benchmarks.report import Report, progress
from benchmarks.servers import Server, service
from benchmarks.shapes import described, located
from benchmarks.stock import stock
from benchmarks.subject import MEAN_TOKENS
from benchmarks.texts import make_texts, words_of
from benchmarks.turns import ratio
from service.devices import device_list

# A killed engine has compiled kernels to load, graphs to capture and adapters to read.
_BACK_SECONDS = 60.0


def _several(value: str) -> str:
    try:
        devices = device_list(value)
    except ValueError as error:
        raise ArgumentTypeError(f"{value!r}: {error}") from None
    if "," not in devices:
        raise ArgumentTypeError(f"{value!r}: expected at least two devices, as cuda:0,cuda:1")
    return devices


def add_arguments(parser: ArgumentParser) -> None:
    add_backbone_argument(parser)
    parser.add_argument("--dtype", choices=["auto", "float32", "bfloat16"], default="auto")
    parser.add_argument(
        "--devices", type=_several, default="cuda:0,cuda:1", help="the first is also measured alone"
    )
    parser.add_argument("--workers", type=at_least(1), default=24, help="IDSPAM_WORKERS of both")
    parser.add_argument("--adapters", type=at_least(1), default=64, help="that requests name")
    parser.add_argument("--connections", type=at_least(1), default=128, help="one text a request")
    parser.add_argument(
        "--bulk-connections", type=at_least(1), default=128, help="32 texts a request"
    )
    parser.add_argument("--clients", type=at_least(1), default=6, help="client processes")
    parser.add_argument("--texts", type=at_least(32), default=8192, help="different texts")
    parser.add_argument("--seconds", type=duration, default=6.0, help="of every load")
    parser.add_argument("--rounds", type=at_least(1), default=2)
    parser.add_argument(
        "--kill", action="store_true", help="at the end, kill -9 one of the engines under load"
    )


def run(options: Namespace) -> Report:
    shapes = (
        Shape("32 texts a request", 32, options.bulk_connections),
        Shape("one text a request", 1, options.connections),
    )
    devices = (options.devices.split(",")[0], options.devices)
    measured: dict[tuple[str, str], list[Figures]] = {}
    with TemporaryDirectory(prefix="idspam-devices-") as temporary, ExitStack() as stack:
        folder = Path(temporary)
        source = located(options.backbone, folder)
        progress(f"storing {options.adapters} adapters")
        backbone = load_backbone(source, device="cpu")
        first = folder / "store-0"
        keys = stock(first, backbone, names=options.adapters, distinct=options.adapters)
        del backbone
        names = [key.name for key in keys]
        texts = make_texts(words_of(source), count=options.texts, mean_tokens=MEAN_TOKENS)
        bodies = {}
        for shape in shapes:
            rng = random.Random(0)
            starts = range(0, len(texts) - shape.texts + 1, shape.texts)
            requests = [body_of(texts[at : at + shape.texts], names, rng) for at in starts]
            bodies[shape] = write_bodies(folder / f"{shape.texts}.jsonl", requests)
        servers: dict[str, Server] = {}
        for index, setting in enumerate(devices):
            store = folder / f"store-{index}"
            if index:
                shutil.copytree(first, store, copy_function=_linked)
            progress(f"starting the service on {setting}")
            servers[setting] = stack.enter_context(
                service(
                    store,
                    log=folder / f"service-{index}.log",
                    DEVICE=setting,
                    DTYPE=options.dtype,
                    WORKERS=str(options.workers),
                    BACKBONE=source,
                    MAX_ACTIVE_ADAPTERS=str(max(options.adapters, 64)),
                )
            )
        for shape in shapes:
            for number in range(options.rounds):
                for setting in devices:
                    figures = load(
                        f"{servers[setting].url}/v1/predict",
                        bodies[shape],
                        texts_per_request=shape.texts,
                        connections=shape.connections,
                        seconds=options.seconds,
                        warm_up=options.seconds / 4,
                        processes=options.clients,
                    )
                    measured.setdefault((shape.name, setting), []).append(figures)
                    rate = f"{figures.texts_per_second:,.0f} texts/s"
                    progress(
                        f"round {number + 1}/{options.rounds}: {shape.name}: {setting}: {rate}"
                    )
        killed = None
        if options.kill:
            killed = _killed(servers[devices[1]], bodies[shapes[0]], shapes[0], options)
    return _report(options, shapes, devices, measured, killed)


@dataclass(frozen=True, slots=True)
class Killed:
    """A load in which an engine was killed: no request failed. Seconds: until it was back."""

    figures: Figures
    seconds_missing: float


def _killed(server: Server, bodies: Path, shape: Shape, options: Namespace) -> Killed:
    """
    Raises:
        BenchmarkFailed: a request failed.
    """
    progress(f"{shape.name}: an engine is killed")
    took: list[float] = []

    def kill() -> None:
        time.sleep(options.seconds / 2)
        killed = _further_engine(server.pid)
        assert killed is not None
        os.kill(killed, signal.SIGKILL)
        began = time.monotonic()
        missing = True
        while missing and time.monotonic() < began + _BACK_SECONDS:
            time.sleep(0.1)
            with urlopen(f"{server.url}/readyz", timeout=5) as response:
                missing = bool(json.loads(response.read())["details"]["devices_missing"])
            missing = missing or _further_engine(server.pid) in (None, killed)
        took.append(time.monotonic() - began)

    thread = Thread(target=kill)
    thread.start()
    try:
        figures = load(
            f"{server.url}/v1/predict",
            bodies,
            texts_per_request=shape.texts,
            connections=shape.connections,
            seconds=2 * options.seconds,
            processes=options.clients,
        )
    finally:
        thread.join()
    return Killed(figures, took[0])


def _further_engine(supervisor: int) -> int | None:
    """The process of the second engine, if there is one."""
    for folder in Path("/proc").iterdir():
        with suppress(OSError, ValueError):
            _, _, fields = (folder / "stat").read_text().rpartition(")")
            if int(fields.split()[1]) == supervisor and _name(folder) == "idspam-engine1":
                return int(folder.name)
    return None


def _name(folder: Path) -> str:
    return (folder / "comm").read_text().strip()


def _linked(source: str, target: str) -> str:
    """A store of its own without gigabytes of copies: the adapters' files never change."""
    if not source.endswith(".safetensors"):
        return shutil.copy2(source, target)
    os.link(source, target)
    return target


def _report(
    options: Namespace,
    shapes: tuple[Shape, ...],
    devices: tuple[str, ...],
    measured: dict[tuple[str, str], list[Figures]],
    killed: Killed | None,
) -> Report:
    rows, figures = [], []
    for shape in shapes:
        alone = [each.texts_per_second for each in measured[shape.name, devices[0]]]
        for setting in devices:
            loads = measured[shape.name, setting]
            rates = [each.texts_per_second for each in loads]
            times = ratio(rates, alone)
            latencies = [
                median(each.p50_ms for each in loads),
                median(each.p99_ms for each in loads),
            ]
            cells = [f"{median(rates):,.0f}", f"{times:.2f}"]
            cells += [f"{value:.2f}" for value in latencies]
            cells.append(f"{median(each.client_cpu for each in loads):.2f}")
            rows.append([shape.name, setting, str(shape.connections), *cells])
            figures.append(
                {
                    "load": shape.name,
                    "devices": setting,
                    "texts_per_request": shape.texts,
                    "connections": shape.connections,
                    "times_one_device": times,
                    "rounds": [asdict(each) for each in loads],
                }
            )
    if killed is not None:
        loaded = killed.figures
        cells = [f"{loaded.texts_per_second:,.0f}", "-", f"{loaded.p50_ms:.2f}"]
        cells += [f"{loaded.p99_ms:.2f}", f"{loaded.client_cpu:.2f}"]
        label = f"an engine killed, back after {killed.seconds_missing:.1f} s, 0 failed"
        rows.append([label, devices[1], str(options.bulk_connections), *cells])
        figures.append({"load": "an engine killed", "devices": devices[1], **asdict(killed)})
    conditions = {
        "backbone": described(options.backbone),
        "dtype": options.dtype,
        "service": f"{options.workers} HTTP workers on each number of devices, taken in turns; the "
        "other service is idle meanwhile",
        "texts": f"{options.texts}, mean {MEAN_TOKENS:.0f} tokens, each under one of "
        f"{options.adapters} adapters",
        "clients": f"benchmarks.client (asyncio, uvloop), {options.clients} processes, loopback",
        "seconds": options.seconds,
        "rounds": options.rounds,
    }
    columns = ("", "devices", "connections", "texts/s", "times one", "p50 ms", "p99 ms")
    title = f"devices: {described(options.backbone)}"
    return Report(title, (*columns, "client CPU"), rows, figures, conditions)
