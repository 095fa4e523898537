"""Uploads of two alternating adapters while clients predict, against a real service.

Counts what must be zero: failed requests, answers that differ from what the revision that they name
answers alone, and answers by the older revision to the request that follows each upload.
"""

import hashlib
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from adapters.adapter import random_adapter
from adapters.files import serialize
from adapters.loading import load_backbone
from benchmarks.report import show, write
from benchmarks.servers import service

NAME = "swapped"
# How long predictions are timed without any upload.
QUIET_SECONDS = 10.0
TEXTS = ("win a free ticket now", "my card was charged twice", "", "a warm, funny film " * 8)
# Batch-mates change a score by no more than this: docs/exactness.md.
BOUNDS = {"float32": 1e-5, "bfloat16": 0.02}


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

    def count(self, tally: Tally, response: httpx.Response, text: int, seconds: float) -> None:
        tally.answers += 1
        tally.seconds.append(seconds)
        if response.status_code != 200:
            tally.failed += 1
            return
        (result,) = response.json()["results"]
        expected = np.array(self.alone[result["revision"]][text])
        tally.different += bool(np.abs(_by_label(result) - expected).max() > self.bound)


def swap(*, uploads: int, clients: int, dtype: str, json: Path | None) -> None:
    """Swap `uploads` times under load; predictions without uploads are timed before."""
    backbone = load_backbone(device="cpu")
    files = [serialize(random_adapter(backbone, seed=seed)) for seed in (0, 1)]
    revisions = [hashlib.sha256(data).hexdigest() for data in files]
    quiet, loaded = Tally(), Tally()
    with tempfile.TemporaryDirectory() as folder:
        settings = {"IDSPAM_DEVICE": "cpu", "IDSPAM_DTYPE": dtype, "IDSPAM_LOG_LEVEL": "warning"}
        with service(Path(folder), {NAME: files[1]}, **settings) as url:
            _publish(url, files[0])
            alone = {revision: _alone(url, revision) for revision in revisions}
            judge = Judge(alone, BOUNDS[dtype])
            _under_load(url, clients, judge, quiet, lambda: time.sleep(QUIET_SECONDS))

            def upload() -> None:
                for number in range(1, uploads + 1):
                    _publish(url, files[number % 2])
                    # Nothing else is uploaded meanwhile: only this revision may answer.
                    answer = _predict(url, NAME, TEXTS[0])
                    loaded.stale += answer["revision"] != revisions[number % 2]

            started = time.perf_counter()
            _under_load(url, clients, judge, loaded, upload)
            seconds = time.perf_counter() - started
    rows = [
        [
            name,
            str(tally.answers),
            str(tally.failed),
            str(tally.different),
            str(tally.stale),
            *(f"{np.percentile(tally.seconds, share) * 1e3:.0f}" for share in (50, 99)),
        ]
        for name, tally in (("no uploads", quiet), (f"{uploads} uploads", loaded))
    ]
    columns = ("", "answers", "failed", "not their revision's", "stale", "p50 ms", "p99 ms")
    show(f"swap: {clients} clients, {dtype}, {uploads / seconds:.1f} uploads/s", columns, rows)
    figures = [dict(zip(("load", *columns[1:]), row, strict=True)) for row in rows]
    write(json, {"clients": clients, "dtype": dtype, "seconds": seconds, "figures": figures})


def _under_load(
    url: str, clients: int, judge: Judge, tally: Tally, work: Callable[[], None]
) -> None:
    over, lock = threading.Event(), threading.Lock()

    def client(number: int) -> None:
        with httpx.Client(base_url=url, timeout=60) as connection:
            while not over.is_set():
                number += 1
                text = number % len(TEXTS)
                started = time.perf_counter()
                body = {"adapter": NAME, "inputs": TEXTS[text]}
                response = connection.post("/v1/predict", json=body)
                took = time.perf_counter() - started
                with lock:
                    judge.count(tally, response, text, took)

    with ThreadPoolExecutor(clients) as pool:
        futures = [pool.submit(client, number) for number in range(clients)]
        try:
            work()
        finally:
            over.set()
        for future in futures:
            future.result()


def _publish(url: str, data: bytes) -> None:
    response = httpx.put(
        f"{url}/v1/adapters/{NAME}",
        content=data,
        headers={"Content-Type": "application/octet-stream"},
        timeout=60,
    )
    response.raise_for_status()


def _alone(url: str, revision: str) -> list[list[float]]:
    return [_by_label(_predict(url, f"{NAME}@{revision}", text)) for text in TEXTS]


def _predict(url: str, adapter: str, text: str) -> dict[str, Any]:
    body = {"adapter": adapter, "inputs": text}
    response = httpx.post(f"{url}/v1/predict", json=body, timeout=60).raise_for_status()
    (result,) = response.json()["results"]
    found: dict[str, Any] = result
    return found


def _by_label(result: dict[str, Any]) -> list[float]:
    return [entry["score"] for entry in sorted(result["scores"], key=lambda entry: entry["label"])]
