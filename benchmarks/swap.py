"""Uploads of alternating adapters under one name while clients predict, against a real service.

Counts what must be zero: failed requests, answers that differ from what the revision that they name
answers alone, and answers by the older revision to the request that follows each upload. Memory of
all the service's processes is sampled: it must not grow with the uploads.
"""

import hashlib
import threading
import time
from argparse import ArgumentParser
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from adapters.adapter import random_adapter
from adapters.backbone.loading import load_backbone
from adapters.format.files import serialize
from benchmarks.arguments import at_least, duration
from benchmarks.caller import Caller, Reply
from benchmarks.loop import percentiles_ms
from benchmarks.memory import Progress, Samples, sampled
from benchmarks.report import Report, progress
from benchmarks.servers import service
from benchmarks.shapes import described, located
from benchmarks.subject import add_backbone_arguments

NAME = "swapped"
TEXTS = ("win a free ticket now", "my card was charged twice", "", "a warm, funny film " * 8)
# Batch-mates change a score by no more than this (docs/exactness.md has the default backbone's);
# random weights are given more room, two revisions differ by more still.
BOUNDS = {"float32": 1e-5, "bfloat16": 0.05}
# Memory may grow until the first hundred uploads are done.
SETTLED = 100


@dataclass(slots=True)
class Tally:
    """What was seen. Only `answers` and `seconds` may grow."""

    answers: int = 0
    failed: int = 0
    different: int = 0
    stale: int = 0
    seconds: list[float] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Judge:
    """alone: each revision's scores for each text, asked when nothing else was."""

    alone: dict[str, list[list[float]]]
    bound: float

    def count(self, tally: Tally, reply: Reply, text: int, seconds: float) -> None:
        tally.answers += 1
        tally.seconds.append(seconds)
        if reply.status != 200:
            tally.failed += 1
            return
        (result,) = reply.content["results"]
        expected = np.array(self.alone[result["revision"]][text])
        tally.different += bool(np.abs(_by_label(result) - expected).max() > self.bound)


def add_arguments(parser: ArgumentParser) -> None:
    add_backbone_arguments(parser)
    parser.set_defaults(dtype="float32")
    parser.add_argument("--uploads", type=at_least(1), default=200)
    parser.add_argument("--revisions", type=at_least(1), default=2, help="that take turns")
    parser.add_argument("--clients", type=at_least(1), default=16)
    parser.add_argument("--workers", type=at_least(0), default=0, help="IDSPAM_WORKERS")
    parser.add_argument(
        "--quiet", type=duration, default=10.0, help="seconds without uploads, first"
    )


def run(
    *,
    backbone: str,
    device: str,
    dtype: str,
    uploads: int,
    revisions: int,
    clients: int,
    workers: int,
    quiet: float,
) -> Report:
    with TemporaryDirectory(prefix="idspam-swap-") as temporary:
        folder = Path(temporary)
        source = located(backbone, folder)
        loaded = load_backbone(source, device="cpu")
        files = [serialize(random_adapter(loaded, seed=seed)) for seed in range(revisions)]
        del loaded
        settings = {"BACKBONE": source, "DEVICE": device, "DTYPE": dtype}
        if workers:
            settings["WORKERS"] = str(workers)
        with service(folder / "store", log=folder / "service.log", **settings) as server:
            run = _Run(server.url, files, clients, BOUNDS.get(dtype, BOUNDS["bfloat16"]))
            run.prepare()
            progress(f"{quiet:g} s without uploads")
            run.under_load(run.quiet, lambda: time.sleep(quiet))
            progress(f"{uploads} uploads")
            started = time.perf_counter()
            with sampled(server.pid, run.uploaded, every=0.2) as samples:
                run.under_load(run.busy, lambda: run.upload(uploads))
            seconds = time.perf_counter() - started
    conditions = {
        "backbone": described(backbone),
        "device": device,
        "dtype": dtype,
        "service": f"{workers} HTTP workers" if workers else "one process",
        "clients": f"{clients} threads of this process, one text a request",
        "uploads": f"{uploads}, {uploads / seconds:.1f} a second, {revisions} revisions in turns",
        "bound of a score": BOUNDS.get(dtype, BOUNDS["bfloat16"]),
        "memory": f"RSS of all the service's processes, and the device's, behind "
        f"{min(SETTLED, uploads // 2)} uploads",
    }
    return _report(run, samples, uploads, conditions)


class _Run:
    """The clients, the uploads, and what came back."""

    def __init__(self, url: str, files: Sequence[bytes], clients: int, bound: float) -> None:
        self._url, self._files, self._clients, self._bound = url, files, clients, bound
        self._revisions = [hashlib.sha256(data).hexdigest() for data in files]
        self._judge = Judge({}, bound)
        self.quiet, self.busy = Tally(), Tally()
        self.uploaded = Progress()

    def prepare(self) -> None:
        """Publish both, and ask each alone."""
        with Caller(self._url) as caller:
            for data in reversed(self._files):
                caller.put(NAME, data)
            alone = {
                revision: [_by_label(caller.predict(f"{NAME}@{revision}", text)) for text in TEXTS]
                for revision in self._revisions
            }
        self._judge = Judge(alone, self._bound)

    def upload(self, count: int) -> None:
        with Caller(self._url) as caller:
            for number in range(1, count + 1):
                caller.put(NAME, self._files[number % len(self._files)])
                # Nothing else is uploaded meanwhile: only this revision may answer.
                answer = caller.predict(NAME, TEXTS[0])
                self.busy.stale += answer["revision"] != self._revisions[number % len(self._files)]
                self.uploaded.value = number

    def under_load(self, tally: Tally, work: Callable[[], None]) -> None:
        over, lock = threading.Event(), threading.Lock()

        def client(number: int) -> None:
            with Caller(self._url) as caller:
                while not over.is_set():
                    number += 1
                    text = number % len(TEXTS)
                    started = time.perf_counter()
                    reply = caller.post("/v1/predict", {"adapter": NAME, "inputs": TEXTS[text]})
                    took = time.perf_counter() - started
                    with lock:
                        self._judge.count(tally, reply, text, took)

        with ThreadPoolExecutor(self._clients) as pool:
            futures = [pool.submit(client, number) for number in range(self._clients)]
            try:
                work()
            finally:
                over.set()
            for future in futures:
                future.result()


def _report(run: _Run, samples: Samples, uploads: int, conditions: dict[str, Any]) -> Report:
    rows: list[list[str]] = []
    figures: list[dict[str, Any]] = []
    for name, tally in (("no uploads", run.quiet), (f"{uploads} uploads", run.busy)):
        found = percentiles_ms(tally.seconds)
        rows.append(
            [
                name,
                *map(str, (tally.answers, tally.failed, tally.different, tally.stale)),
                f"{found['p50_ms']:.1f}",
                f"{found['p99_ms']:.1f}",
            ]
        )
        figures.append(
            {
                "load": name,
                "answers": tally.answers,
                "failed": tally.failed,
                "not_their_revisions": tally.different,
                "stale": tally.stale,
            }
            | found
        )
    ratio = figures[1]["p99_ms"] / figures[0]["p99_ms"]
    growth = samples.growth(min(SETTLED, uploads // 2))
    shown = {name: round(value, 2) for name, value in growth.items()}
    columns = ("", "answers", "failed", "not their revision's", "stale", "p50 ms", "p99 ms")
    return Report(
        f"swap: {conditions['backbone']}, {conditions['dtype']}",
        columns,
        rows,
        {"loads": figures, "p99_over_without_uploads": ratio, "memory": growth},
        conditions | {"p99 over that without uploads": round(ratio, 2)} | shown,
    )


def _by_label(result: dict[str, Any]) -> list[float]:
    return [entry["score"] for entry in sorted(result["scores"], key=lambda entry: entry["label"])]
