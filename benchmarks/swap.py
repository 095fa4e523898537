"""Uploads of alternating adapters under one name while clients predict, against a real service.

Counts what must be zero: failed requests, answers that differ from those that their revision gives
alone, and answers by the old revision to the request that follows an upload. Samples the memory of
all the service's processes, which must not grow with the uploads.
"""

import hashlib
import json
import threading
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from http.client import HTTPConnection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from adapters.backbone.loading import load_backbone
from adapters.backbone.model import random_adapter
from adapters.format.files import serialize
from benchmarks.arguments import add_model_arguments, add_workers_argument, at_least, duration
from benchmarks.loop import percentiles_ms
from benchmarks.memory import Progress, Samples, sampled
from benchmarks.report import BenchmarkFailed, Report, progress
from benchmarks.servers import processes_of, service, settings_of
from benchmarks.shapes import described, located

NAME = "swapped"
TEXTS = ("win a free ticket now", "my card was charged twice", "", "a warm, funny film " * 8)
# Batch-mates change a score by less (docs/exactness.md, for the default backbone). Random weights
# get more room; two revisions differ by more than that.
BOUNDS = {"float32": 1e-5, "bfloat16": 0.05}
# Memory may grow until this many uploads are done.
SETTLED = 100
_PATIENCE_SECONDS = 60.0


class Connection:
    """One HTTP connection to the service, used by one thread."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        assert parts.hostname is not None
        self._http = HTTPConnection(parts.hostname, parts.port, timeout=_PATIENCE_SECONDS)

    def close(self) -> None:
        self._http.close()

    def predict(self, adapter: str, text: str) -> tuple[int, Any]:
        """Status and JSON of the response."""
        body = json.dumps({"adapter": adapter, "inputs": text}).encode()
        return self._send("POST", "/v1/predict", body, "application/json")

    def result(self, adapter: str, text: str) -> dict[str, Any]:
        """The prediction for one text.

        Raises:
            BenchmarkFailed: the request failed.
        """
        status, content = self.predict(adapter, text)
        if status != 200:
            raise BenchmarkFailed(f"asking {adapter!r}: {content}")
        (result,) = content["results"]
        prediction: dict[str, Any] = result
        return prediction

    def upload(self, name: str, data: bytes) -> None:
        """
        Raises:
            BenchmarkFailed: the upload was refused.
        """
        kind = "application/octet-stream"
        status, content = self._send("PUT", f"/v1/adapters/{name}", data, kind)
        if status not in (200, 201):
            raise BenchmarkFailed(f"publishing {name!r}: {content}")

    def _send(self, method: str, path: str, body: bytes, kind: str) -> tuple[int, Any]:
        self._http.request(method, path, body, {"Content-Type": kind})
        response = self._http.getresponse()
        return response.status, json.loads(response.read())


@dataclass(slots=True)
class Tally:
    """What came back under one load. Only `answers` and `seconds` may grow."""

    answers: int = 0
    failed: int = 0
    different: int = 0
    stale: int = 0
    seconds: list[float] = field(default_factory=list)


def add_arguments(parser: ArgumentParser) -> None:
    add_model_arguments(parser, dtype="float32", narrow=False)
    add_workers_argument(parser)
    parser.add_argument("--uploads", type=at_least(1), default=200)
    parser.add_argument("--revisions", type=at_least(1), default=2, help="that take turns")
    parser.add_argument("--clients", type=at_least(1), default=16)
    parser.add_argument(
        "--quiet", type=duration, default=10.0, help="seconds without uploads, first"
    )


def run(options: Namespace) -> Report:
    uploads, bound = options.uploads, BOUNDS.get(options.dtype, BOUNDS["bfloat16"])
    with TemporaryDirectory(prefix="idspam-swap-") as temporary:
        folder = Path(temporary)
        source = located(options.backbone, folder)
        backbone = load_backbone(source, device="cpu")
        files = [serialize(random_adapter(backbone, seed=n)) for n in range(options.revisions)]
        del backbone
        settings = settings_of(options) | {"BACKBONE": source}
        with service(folder / "store", log=folder / "service.log", **settings) as server:
            bench = _Bench(server.url, files, options.clients, bound)
            bench.prepare()
            progress(f"{options.quiet:g} s without uploads")
            bench.under_load(bench.quiet, lambda: time.sleep(options.quiet))
            progress(f"{uploads} uploads")
            began = time.perf_counter()
            with sampled(server.pid, bench.uploaded, every=0.2) as samples:
                bench.under_load(bench.busy, lambda: bench.upload(uploads))
            seconds = time.perf_counter() - began
    conditions = {
        "backbone": described(options.backbone),
        "device": options.device,
        "dtype": options.dtype,
        "service": processes_of(options),
        "clients": f"{options.clients} threads of this process, one text a request",
        "uploads": f"{uploads}, {uploads / seconds:.1f} a second, {options.revisions} revisions in "
        "turns",
        "bound of a score": bound,
        "memory": "RSS of all the service's processes, and the device's, after the first "
        f"{min(SETTLED, uploads // 2)} uploads",
    }
    return _report(bench, samples, uploads, conditions)


class _Bench:
    """The clients, the uploads, and what came back."""

    def __init__(self, url: str, files: Sequence[bytes], clients: int, bound: float) -> None:
        self._url, self._files, self._clients, self._bound = url, files, clients, bound
        self._revisions = [hashlib.sha256(data).hexdigest() for data in files]
        # Each revision's scores for each text when nothing else is asked.
        self._alone: dict[str, list[list[float]]] = {}
        self.quiet, self.busy = Tally(), Tally()
        self.uploaded = Progress()

    def prepare(self) -> None:
        """Upload every revision, and ask each alone."""
        with closing(Connection(self._url)) as connection:
            for data in reversed(self._files):
                connection.upload(NAME, data)
            for revision in self._revisions:
                results = [connection.result(f"{NAME}@{revision}", text) for text in TEXTS]
                self._alone[revision] = [_by_label(result) for result in results]

    def upload(self, count: int) -> None:
        with closing(Connection(self._url)) as connection:
            for number in range(1, count + 1):
                connection.upload(NAME, self._files[number % len(self._files)])
                # There is no other upload meanwhile, so only this revision may answer.
                revision = connection.result(NAME, TEXTS[0])["revision"]
                self.busy.stale += revision != self._revisions[number % len(self._files)]
                self.uploaded.value = number

    def under_load(self, tally: Tally, work: Callable[[], None]) -> None:
        """Do some work while the clients predict."""
        over, lock = threading.Event(), threading.Lock()

        def client(number: int) -> None:
            with closing(Connection(self._url)) as connection:
                while not over.is_set():
                    number += 1
                    text = number % len(TEXTS)
                    sent = time.perf_counter()
                    status, content = connection.predict(NAME, TEXTS[text])
                    seconds = time.perf_counter() - sent
                    with lock:
                        tally.answers += 1
                        tally.seconds.append(seconds)
                        tally.failed += status != 200
                        tally.different += status == 200 and self._differs(content, text)

        with ThreadPoolExecutor(self._clients) as pool:
            futures = [pool.submit(client, number) for number in range(self._clients)]
            try:
                work()
            finally:
                over.set()
            for future in futures:
                future.result()

    def _differs(self, content: Any, text: int) -> bool:
        (result,) = content["results"]
        alone = np.array(self._alone[result["revision"]][text])
        return bool(np.abs(_by_label(result) - alone).max() > self._bound)


def _report(bench: _Bench, samples: Samples, uploads: int, conditions: dict[str, Any]) -> Report:
    rows: list[list[str]] = []
    figures: list[dict[str, Any]] = []
    for name, tally in (("no uploads", bench.quiet), (f"{uploads} uploads", bench.busy)):
        latency = percentiles_ms(tally.seconds)
        counts = {
            "answers": tally.answers,
            "failed": tally.failed,
            "not_their_revisions": tally.different,
            "stale": tally.stale,
        }
        cells = [f"{latency['p50_ms']:.1f}", f"{latency['p99_ms']:.1f}"]
        rows.append([name, *map(str, counts.values()), *cells])
        figures.append({"load": name} | counts | latency)
    ratio = figures[1]["p99_ms"] / figures[0]["p99_ms"]
    growth = samples.growth(min(SETTLED, uploads // 2))
    rounded = {name: round(value, 2) for name, value in growth.items()}
    columns = ("", "answers", "failed", "not their revision's", "stale", "p50 ms", "p99 ms")
    return Report(
        f"swap: {conditions['backbone']}, {conditions['dtype']}",
        columns,
        rows,
        {"loads": figures, "p99_over_without_uploads": ratio, "memory": growth},
        conditions | {"p99 over that without uploads": round(ratio, 2)} | rounded,
    )


def _by_label(result: dict[str, Any]) -> list[float]:
    return [entry["score"] for entry in sorted(result["scores"], key=lambda entry: entry["label"])]
