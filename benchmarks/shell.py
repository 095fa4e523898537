"""`python -m service predict` on a file, beside the engine alone on the same texts, in turns.

The engine is given the requests that the command makes, as many at a time: as tokens, or as texts,
of which it makes tokens as the service does. The command is the real one, from the start of its
process to its end, with its bar on a terminal, and asks a service in a process of its own. Everyone
answers the whole file once a round.
"""

import asyncio
import os
import pty
import subprocess
import sys
import threading
from argparse import ArgumentParser
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory
from termios import tcsetwinsize
from time import perf_counter
from typing import Any

from adapters.backbone.loading import DEFAULT_BACKBONE, load_backbone
from adapters.backbone.model import Backbone
from adapters.backbone.tokenizer import Encoding
from adapters.format.files import Adapter, load_adapter, serialize
from adapters.format.store import AdapterStore
from benchmarks.arguments import at_least
from benchmarks.loop import preload, run_async, settings_for, started
from benchmarks.report import BenchmarkFailed, Report, spread
from benchmarks.servers import service
from benchmarks.texts import make_texts, words_of
from benchmarks.turns import Measure, ratio, take_turns
from service.client.batching import IN_FLIGHT, PER_REQUEST
from service.engine.engine import LocalEngine
from service.engine.interface import AdapterKey, Entry, cost_of
from service.settings import TREE

TOKENS_READY = "engine, tokens ready"
TOKENISING = "engine, tokenising too"
COMMAND = "python -m service predict"
_LIMIT_SECONDS = 300.0


@dataclass(frozen=True, slots=True)
class File:
    """The texts, where they stand a line each, their tokens, and whose answer they get.

    per_request, in_flight: how they are asked for, by everyone.
    """

    path: Path
    texts: Sequence[str]
    encodings: Sequence[Encoding]
    key: AdapterKey
    adapter: Adapter
    per_request: int
    in_flight: int

    def entries(self, encodings: Sequence[Encoding]) -> list[Entry]:
        return [Entry(self.key, item, cost_of(item, self.adapter.spec)) for item in encodings]


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", choices=["auto", "float32", "bfloat16"], default="auto")
    parser.add_argument("--adapter", default="sms-spam", help="of the zoo")
    parser.add_argument("--texts", type=at_least(64), default=10_000, help="lines of the file")
    parser.add_argument("--mean-tokens", type=at_least(4), default=26)
    parser.add_argument(
        "--per-request", type=at_least(1), default=PER_REQUEST, help="texts of one request"
    )
    parser.add_argument(
        "--in-flight", type=at_least(1), default=IN_FLIGHT, help="requests at a time"
    )
    parser.add_argument("--workers", type=at_least(0), default=0, help="IDSPAM_WORKERS")
    parser.add_argument("--rounds", type=at_least(1), default=3)


def run(
    *,
    device: str,
    dtype: str,
    adapter: str,
    texts: int,
    mean_tokens: int,
    per_request: int,
    in_flight: int,
    workers: int,
    rounds: int,
) -> Report:
    path = TREE / "adapters" / "zoo" / f"{adapter}.safetensors"
    if not path.is_file():
        raise BenchmarkFailed(f"--adapter {adapter}: there is no {path.name} in the zoo")
    settings = {"DEVICE": device, "DTYPE": dtype}
    if workers:
        settings["WORKERS"] = str(workers)
    with TemporaryDirectory(prefix="idspam-shell-") as temporary:
        folder = Path(temporary)
        backbone = load_backbone(DEFAULT_BACKBONE, device=device, dtype=dtype)
        made = make_texts(words_of(DEFAULT_BACKBONE), count=texts, mean_tokens=mean_tokens)
        file = _write(
            folder,
            made,
            load_adapter(path),
            adapter,
            backbone,
            per_request=per_request,
            in_flight=in_flight,
        )
        with service(folder / "served", log=folder / "log", ZOO_DIR="tree", **settings) as server:
            command = _command(server.url, file)
            measured = run_async(
                _measured(backbone, folder / "store", file, command, rounds=rounds)
            )
    conditions = {
        "backbone": f"{DEFAULT_BACKBONE}: its own weights",
        "device": str(backbone.device),
        "dtype": str(backbone.dtype).removeprefix("torch."),
        "adapter": f"{adapter}, of the zoo",
        "texts": f"{texts}, mean {mean(map(len, file.encodings)):.1f} tokens",
        "requests": f"{per_request} texts in each, {in_flight} at a time",
        "command": "from the start of its process to its end, its bar on a terminal",
        "service": f"{workers} HTTP workers" if workers else "one process",
        "rounds": f"{rounds} in turns, medians",
    }
    return _report(measured, conditions)


def _write(
    folder: Path,
    texts: Sequence[str],
    adapter: Adapter,
    name: str,
    backbone: Backbone,
    *,
    per_request: int,
    in_flight: int,
) -> File:
    path = folder / "texts.txt"
    path.write_text("".join(f"{text}\n" for text in texts))
    revision = AdapterStore(folder / "store").put(name, serialize(adapter)).revision
    encodings = backbone.encoder.encode_batch(
        [(text, None) for text in texts], max_length=adapter.spec.max_length
    )
    key = AdapterKey(name, revision)
    return File(path, texts, encodings, key, adapter, per_request, in_flight)


async def _measured(
    backbone: Backbone, store: Path, file: File, command: Sequence[str], *, rounds: int
) -> dict[str, list[float]]:
    settings = settings_for(str(backbone.device))
    async with started(backbone, store, settings) as engine:
        await preload(engine, [file.key])
        measures: dict[str, Measure] = {
            TOKENS_READY: lambda: _engine_alone(engine, file),
            TOKENISING: lambda: _tokenising(engine, backbone, file),
            COMMAND: lambda: asyncio.to_thread(_typed, command, file),
        }
        return await take_turns(measures, rounds=rounds)


async def _engine_alone(engine: LocalEngine, file: File) -> float:
    entries = file.entries(file.encodings)
    requests = iter(range(0, len(entries), file.per_request))

    async def client() -> None:
        for start in requests:
            await engine.predict(entries[start : start + file.per_request])

    began = perf_counter()
    await asyncio.gather(*(client() for _ in range(file.in_flight)))
    return len(entries) / (perf_counter() - began)


async def _tokenising(engine: LocalEngine, backbone: Backbone, file: File) -> float:
    requests = iter(range(0, len(file.texts), file.per_request))

    async def client() -> None:
        for start in requests:
            texts = [(text, None) for text in file.texts[start : start + file.per_request]]
            # As the service does it, beside its event loop.
            encodings = await asyncio.to_thread(
                backbone.encoder.encode_batch, texts, max_length=file.adapter.spec.max_length
            )
            await engine.predict(file.entries(encodings))

    began = perf_counter()
    await asyncio.gather(*(client() for _ in range(file.in_flight)))
    return len(file.texts) / (perf_counter() - began)


def _command(url: str, file: File) -> list[str]:
    return [
        *(sys.executable, "-m", "service", "predict", str(file.path)),
        *("--adapter", file.key.name, "--url", url, "--output", str(_output(file))),
        *("--per-request", str(file.per_request), "--in-flight", str(file.in_flight)),
    ]


def _output(file: File) -> Path:
    return file.path.with_suffix(".jsonl")


def _typed(command: Sequence[str], file: File) -> float:
    """
    Raises:
        BenchmarkFailed: it failed, showed no bar, or did not answer every line.
    """
    _output(file).unlink(missing_ok=True)
    environment = dict(os.environ) | {"TERM": "xterm-256color"}
    with _terminal() as (end, shown):
        began = perf_counter()
        done = subprocess.run(
            command, cwd=TREE, env=environment, stderr=end, timeout=_LIMIT_SECONDS, check=False
        )
        seconds = perf_counter() - began
    screen = shown.decode("utf-8", "replace")
    if done.returncode:
        raise BenchmarkFailed(f"{COMMAND} ended with {done.returncode}: {screen[-300:]}")
    # The bar hides the cursor while it moves; "left" is only in the bar.
    if "left" not in screen:
        raise BenchmarkFailed(f"{COMMAND} showed no bar: {screen[-300:]}")
    answers = _output(file).read_bytes().count(b"\n")
    if answers != len(file.texts):
        raise BenchmarkFailed(f"{COMMAND} answered {answers} of {len(file.texts)} lines")
    return len(file.texts) / seconds


@contextmanager
def _terminal() -> Iterator[tuple[int, bytearray]]:
    """A terminal to write to, and what was written on it once the block ends."""
    screen, end = pty.openpty()
    tcsetwinsize(end, (24, 100))
    shown = bytearray()

    def look() -> None:
        while True:
            try:
                found = os.read(screen, 65536)
            except OSError:
                # The last who could write is gone.
                return
            if not found:
                return
            shown.extend(found)

    looking = threading.Thread(target=look)
    looking.start()
    try:
        yield end, shown
    finally:
        os.close(end)
        looking.join()
        os.close(screen)


def _report(measured: Mapping[str, Sequence[float]], conditions: Mapping[str, Any]) -> Report:
    rows, figures = [], []
    for name, rates in measured.items():
        rate = spread(rates)
        over = {base: ratio(rates, measured[base]) for base in (TOKENS_READY, TOKENISING)}
        rows.append(
            [
                name,
                f"{rate['median']:,.0f}",
                f"{rate['least']:,.0f}..{rate['most']:,.0f}",
                *(f"{value:.3f}" for value in over.values()),
            ]
        )
        figures.append({"name": name, "texts_per_second": rate, "over": over})
    columns = ("", "texts/s", "range", f"x {TOKENS_READY}", f"x {TOKENISING}")
    return Report("shell: a file from the command line", columns, rows, figures, conditions)
