"""Everyone once a round: a slow minute of the machine hits all alike, and ratios are within rounds.

Knows not what is measured.
"""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from statistics import median
from typing import TypeAlias

from benchmarks.report import progress

Measure: TypeAlias = Callable[[], Awaitable[float]]


async def take_turns(measures: Mapping[str, Measure], *, rounds: int) -> dict[str, list[float]]:
    """Every measure, in texts/s, once a round. The first of all warms up and is not kept."""
    found: dict[str, list[float]] = {name: [] for name in measures}
    for number in range(rounds + 1):
        for name, measure in measures.items():
            value = await measure()
            if number:
                found[name].append(value)
            when = f"round {number}/{rounds}" if number else "warm-up"
            progress(f"{when}: {name}: {value:,.0f} texts/s")
    return found


def ratio(some: Sequence[float], others: Sequence[float]) -> float:
    """The median of the rounds' ratios."""
    return median(one / other for one, other in zip(some, others, strict=True))
