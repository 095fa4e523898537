"""Servers beside each other under the same texts and load, over HTTP, in turns.

Each gets every size of request in every round. What is compared is within one round.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from benchmarks.load import Figures, load, write_bodies
from benchmarks.report import Report, progress, rate_cells, spread
from benchmarks.turns import ratio

# (texts a request, connections)
SHAPES = ((1, 32), (32, 4))
WARM_UP_SECONDS = 3.0

Measured: TypeAlias = dict[tuple[str, int], list[Figures]]


@dataclass(frozen=True, slots=True)
class Contender:
    """One server under one load: where to post, and the file of bodies for each request size."""

    name: str
    url: str
    bodies: Mapping[int, Path]


def bodies_of(
    folder: Path, name: str, texts: Sequence[str], body: Callable[[Sequence[str]], Any]
) -> dict[int, Path]:
    """Writes a file of requests for each size; `body` makes one of its texts."""
    return {
        size: write_bodies(
            folder / f"{name}-{size}.jsonl",
            [body(texts[start : start + size]) for start in range(0, len(texts), size)],
        )
        for size, _ in SHAPES
    }


def rounds_of(contenders: Sequence[Contender], *, seconds: float, rounds: int) -> Measured:
    """Every server once a round (`benchmarks.turns`)."""
    measured: Measured = {}
    for number in range(rounds + 1):
        for contender in contenders:
            for size, connections in SHAPES:
                figures = load(
                    contender.url,
                    contender.bodies[size],
                    texts_per_request=size,
                    connections=connections,
                    seconds=seconds if number else WARM_UP_SECONDS,
                )
                if number:
                    measured.setdefault((contender.name, size), []).append(figures)
                    rate = f"{figures.texts_per_second:,.0f} texts/s"
                    progress(f"round {number}/{rounds}: {contender.name}, {size} a request: {rate}")
    return measured


def report_of(
    title: str, measured: Measured, conditions: Mapping[str, Any], *, baseline: str
) -> Report:
    """
    Args:
        baseline: the contender whose rate all others are divided by.
    """
    rows, figures = [], []
    for (name, size), loads in measured.items():
        rates = [load.texts_per_second for load in loads]
        rate = spread(rates)
        times = ratio(rates, [load.texts_per_second for load in measured[baseline, size]])
        p50, p99 = spread([load.p50_ms for load in loads]), spread([load.p99_ms for load in loads])
        cells = [f"{times:.2f}", f"{p50['median']:.1f}", f"{p99['median']:.1f}"]
        rows.append([name, str(size), *rate_cells(rate), *cells])
        figures.append(
            {
                "server": name,
                "texts_per_request": size,
                "texts_per_second": rate,
                f"over_{baseline.replace(' ', '_')}": times,
                "p50_ms": p50,
                "p99_ms": p99,
            }
        )
    columns = ("server", "texts a request", "texts/s", "range", f"x {baseline}", "p50 ms", "p99 ms")
    return Report(title, columns, rows, figures, conditions)
