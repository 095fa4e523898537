"""`python -m service predict` on a file, beside the engine alone on the same texts, in turns.

The engine gets the requests that the command makes, as many at a time: once as tokens, once as
texts, which it tokenises as the service does. The command runs from the start of its process to its
end, with its progress bar on a terminal, and asks a service in another process. Each answers the
whole file once a round.
"""

import asyncio
import os
import pty
import subprocess
import sys
import threading
from argparse import ArgumentParser, Namespace
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory
from termios import tcsetwinsize
from time import perf_counter
from typing import Any

import uvloop

from adapters.backbone.loading import DEFAULT_BACKBONE, load_backbone
from adapters.backbone.model import Backbone
from adapters.format.files import Adapter, load_adapter, serialize
from adapters.format.store import AdapterStore
from adapters.tokenizer import Encoding
from benchmarks.arguments import add_device_arguments, add_workers_argument, at_least
from benchmarks.loop import entries_of, preload, settings_for, started
from benchmarks.report import BenchmarkFailed, Report, rate_cells, spread
from benchmarks.servers import processes_of, service, settings_of
from benchmarks.texts import make_texts, words_of
from benchmarks.turns import Measure, ratio, take_turns
from service.client.batch import IN_FLIGHT, PER_REQUEST
from service.engine.engine import LocalEngine
from service.engine.interface import AdapterKey, Entry
from service.settings import TREE

TOKENS_READY = "engine, tokens ready"
TOKENISING = "engine, tokenising too"
COMMAND = "python -m service predict"
_LIMIT_SECONDS = 300.0


@dataclass(frozen=True, slots=True)
class File:
    """Texts, the file with one of them per line, their tokens, and the adapter that answers.

    per_request, in_flight: texts of a request, and requests at a time.
    """

    path: Path
    texts: Sequence[str]
    encodings: Sequence[Encoding]
    key: AdapterKey
    adapter: Adapter
    per_request: int
    in_flight: int

    def entries(self, encodings: Sequence[Encoding]) -> list[Entry]:
        return entries_of(encodings, [self.key] * len(encodings), self.adapter.spec)


def add_arguments(parser: ArgumentParser) -> None:
    add_device_arguments(parser)
    add_workers_argument(parser)
    parser.add_argument("--adapter", default="sms-spam", help="of the zoo")
    parser.add_argument("--texts", type=at_least(64), default=10_000, help="lines of the file")
    parser.add_argument("--mean-tokens", type=at_least(4), default=26)
    parser.add_argument(
        "--per-request", type=at_least(1), default=PER_REQUEST, help="texts of one request"
    )
    parser.add_argument(
        "--in-flight", type=at_least(1), default=IN_FLIGHT, help="requests at a time"
    )
    parser.add_argument("--rounds", type=at_least(1), default=3)


def run(options: Namespace) -> Report:
    path = TREE / "adapters" / "zoo" / f"{options.adapter}.safetensors"
    if not path.is_file():
        raise BenchmarkFailed(f"--adapter {options.adapter}: there is no {path.name} in the zoo")
    with TemporaryDirectory(prefix="idspam-shell-") as temporary:
        folder = Path(temporary)
        backbone = load_backbone(DEFAULT_BACKBONE, device=options.device, dtype=options.dtype)
        file = _write(folder, load_adapter(path), backbone, options)
        settings = settings_of(options) | {"ZOO_DIR": "tree"}
        with service(folder / "served", log=folder / "log", **settings) as server:
            measured = _measured(backbone, folder / "store", file, server.url, options.rounds)
            rates = uvloop.run(measured)
    conditions = {
        "backbone": f"{DEFAULT_BACKBONE}: its own weights",
        "device": str(backbone.device),
        "dtype": backbone.computes,
        "adapter": f"{options.adapter}, of the zoo",
        "texts": f"{options.texts}, mean {mean(map(len, file.encodings)):.1f} tokens",
        "requests": f"{options.per_request} texts in each, {options.in_flight} at a time",
        "command": "from the start of its process to its end, its bar on a terminal",
        "service": processes_of(options),
        "rounds": f"{options.rounds} in turns, medians",
    }
    return _report(rates, conditions)


def _write(folder: Path, adapter: Adapter, backbone: Backbone, options: Namespace) -> File:
    texts = make_texts(
        words_of(DEFAULT_BACKBONE), count=options.texts, mean_tokens=options.mean_tokens
    )
    path = folder / "texts.txt"
    path.write_text("".join(f"{text}\n" for text in texts))
    stored = AdapterStore(folder / "store").put(options.adapter, serialize(adapter))
    encodings = _encode(backbone, texts, adapter)
    key = AdapterKey(options.adapter, stored.revision)
    return File(path, texts, encodings, key, adapter, options.per_request, options.in_flight)


async def _measured(
    backbone: Backbone, store: Path, file: File, url: str, rounds: int
) -> dict[str, list[float]]:
    async with started(backbone, store, settings_for(str(backbone.device))) as engine:
        await preload(engine, [file.key])
        measures: dict[str, Measure] = {
            TOKENS_READY: lambda: _tokens_ready(engine, file),
            TOKENISING: lambda: _tokenising(engine, backbone, file),
            COMMAND: lambda: asyncio.to_thread(_run_command, url, file),
        }
        return await take_turns(measures, rounds=rounds)


async def _tokens_ready(engine: LocalEngine, file: File) -> float:
    entries = file.entries(file.encodings)

    async def predict(part: slice) -> None:
        await engine.predict(entries[part])

    return await _whole_file(file, predict)


async def _tokenising(engine: LocalEngine, backbone: Backbone, file: File) -> float:
    async def predict(part: slice) -> None:
        # In a thread beside the event loop, as in the service.
        encodings = await asyncio.to_thread(_encode, backbone, file.texts[part], file.adapter)
        await engine.predict(file.entries(encodings))

    return await _whole_file(file, predict)


async def _whole_file(file: File, predict: Callable[[slice], Awaitable[None]]) -> float:
    """Texts/s of all requests, so many at a time."""
    starts = iter(range(0, len(file.texts), file.per_request))

    async def client() -> None:
        for start in starts:
            await predict(slice(start, start + file.per_request))

    began = perf_counter()
    await asyncio.gather(*(client() for _ in range(file.in_flight)))
    return len(file.texts) / (perf_counter() - began)


def _encode(backbone: Backbone, texts: Sequence[str], adapter: Adapter) -> list[Encoding]:
    pairs = [(text, None) for text in texts]
    return backbone.encoder.encode_batch(pairs, max_length=adapter.spec.max_length)


def _run_command(url: str, file: File) -> float:
    """Texts/s of the command.

    Raises:
        BenchmarkFailed: it failed, showed no bar, or did not answer every line.
    """
    output = file.path.with_suffix(".jsonl")
    output.unlink(missing_ok=True)
    command = [
        *(sys.executable, "-m", "service", "predict", str(file.path)),
        *("--adapter", file.key.name, "--url", url, "--output", str(output)),
        *("--per-request", str(file.per_request), "--in-flight", str(file.in_flight)),
    ]
    environment = dict(os.environ) | {"TERM": "xterm-256color"}
    with _terminal() as (end, written):
        began = perf_counter()
        done = subprocess.run(
            command, cwd=TREE, env=environment, stderr=end, timeout=_LIMIT_SECONDS, check=False
        )
        seconds = perf_counter() - began
    screen = written.decode("utf-8", "replace")
    if done.returncode:
        raise BenchmarkFailed(f"{COMMAND} ended with {done.returncode}: {screen[-300:]}")
    # "left" is written only by the bar.
    if "left" not in screen:
        raise BenchmarkFailed(f"{COMMAND} showed no bar: {screen[-300:]}")
    answers = output.read_bytes().count(b"\n")
    if answers != len(file.texts):
        raise BenchmarkFailed(f"{COMMAND} answered {answers} of {len(file.texts)} lines")
    return len(file.texts) / seconds


@contextmanager
def _terminal() -> Iterator[tuple[int, bytearray]]:
    """A terminal to write to; after the block the buffer holds all that was written."""
    screen, end = pty.openpty()
    tcsetwinsize(end, (24, 100))
    written = bytearray()

    def read() -> None:
        while True:
            try:
                data = os.read(screen, 65536)
            except OSError:
                # The last writer has closed it.
                return
            if not data:
                return
            written.extend(data)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        yield end, written
    finally:
        os.close(end)
        reader.join()
        os.close(screen)


def _report(rates: Mapping[str, Sequence[float]], conditions: Mapping[str, Any]) -> Report:
    rows, figures = [], []
    for name, values in rates.items():
        rate = spread(values)
        over = {base: ratio(values, rates[base]) for base in (TOKENS_READY, TOKENISING)}
        rows.append([name, *rate_cells(rate), *(f"{value:.3f}" for value in over.values())])
        figures.append({"name": name, "texts_per_second": rate, "over": over})
    columns = ("", "texts/s", "range", f"x {TOKENS_READY}", f"x {TOKENISING}")
    return Report("shell: a file from the command line", columns, rows, figures, conditions)
