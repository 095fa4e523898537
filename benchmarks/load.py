"""Texts to send, and `wrk` to send them. Knows no server."""

import json
import random
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SCRIPT = Path(__file__).with_name("wrk.lua")


class LoadFailed(Exception):
    """`wrk` is missing, or requests failed: figures with failed requests in them are none."""


@dataclass(frozen=True, slots=True)
class Figures:
    """One load: texts a second, and the requests' latencies in milliseconds."""

    texts_per_second: float
    p50_ms: float
    p99_ms: float


def make_texts(
    vocabulary: Iterable[str], *, count: int, mean_tokens: float, seed: int = 0
) -> list[str]:
    """Random words of a tokenizer's own vocabulary; lengths are log-normal like those of short
    messages.

    The mean is `mean_tokens`, special tokens included; nothing is longer than 250 tokens.
    """
    rng = random.Random(seed)
    words = sorted(
        word for word in vocabulary if word.isascii() and word.isalpha() and len(word) > 2
    )
    spread = 0.6
    middle = (mean_tokens - 2) / 2.718281828 ** (spread**2 / 2)
    lengths = [
        min(max(1, round(middle * rng.lognormvariate(0, spread))), 248) for _ in range(count)
    ]
    return [" ".join(rng.choices(words, k=length)) for length in lengths]


def write_bodies(path: Path, bodies: Sequence[Any]) -> Path:
    """One request a line."""
    path.write_text("".join(json.dumps(body) + "\n" for body in bodies))
    return path


def load(
    url: str, bodies: Path, *, texts_per_request: int, connections: int, seconds: float
) -> Figures:
    """Send `bodies` over and over.

    Raises:
        LoadFailed: no `wrk` here, or a request was not answered with 200.
    """
    wrk = shutil.which("wrk")
    if wrk is None:
        raise LoadFailed("wrk is not installed (Debian's package of that name)")
    command = [
        wrk,
        "-t1",
        f"-c{connections}",
        f"-d{seconds:.0f}s",
        "--timeout",
        "60s",
        "-s",
        str(SCRIPT),
        url,
        "--",
    ]
    done = subprocess.run(
        [*command, str(bodies)], capture_output=True, text=True, timeout=seconds + 120, check=False
    )
    if done.returncode != 0:
        raise LoadFailed(f"wrk: {done.stderr.strip() or done.stdout.strip()}")
    summary = json.loads(done.stdout.strip().splitlines()[-1])
    if summary["failed"] or not summary["requests"]:
        raise LoadFailed(f"{summary['failed']} of {summary['requests']} requests to {url} failed")
    return Figures(
        texts_per_second=summary["requests"] * texts_per_request / summary["seconds"],
        p50_ms=summary["p50_ms"],
        p99_ms=summary["p99_ms"],
    )
