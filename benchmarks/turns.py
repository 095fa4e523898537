"""Takes measurements in turns: a slow minute of the machine hits all alike."""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from statistics import median
from typing import TypeAlias

from benchmarks.report import progress

Measure: TypeAlias = Callable[[], Awaitable[float]]


async def take_turns(measures: Mapping[str, Measure], *, rounds: int) -> dict[str, list[float]]:
    """Texts/s of every measure in every round. A first round warms up and is thrown away."""
    rates: dict[str, list[float]] = {name: [] for name in measures}
    for number in range(rounds + 1):
        for name, measure in measures.items():
            rate = await measure()
            if number:
                rates[name].append(rate)
            when = f"round {number}/{rounds}" if number else "warm-up"
            progress(f"{when}: {name}: {rate:,.0f} texts/s")
    return rates


def ratio(rates: Sequence[float], others: Sequence[float]) -> float:
    """The median of the ratios within each round."""
    return median(one / other for one, other in zip(rates, others, strict=True))
