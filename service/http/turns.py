"""Turns for other requests during long work on the event loop.

Thousands of labels for hundreds of texts take a second to write. A thread would not help: Python
runs one at a time. Most work is over long before its turn is, and pays for reading a clock.
"""

import asyncio
from collections.abc import Iterable
from time import perf_counter
from typing import TypeVar

T = TypeVar("T")

TURN_SECONDS = 0.005


class Turn:
    """The turn of one piece of work, which begins now."""

    def __init__(self) -> None:
        self._until = perf_counter() + TURN_SECONDS

    def is_over(self) -> bool:
        return perf_counter() > self._until

    async def give(self) -> None:
        """Let others go on; the next turn begins after them."""
        await asyncio.sleep(0)
        self._until = perf_counter() + TURN_SECONDS


async def in_turns(items: Iterable[T]) -> list[T]:
    """The items, with turns for other requests while they are made."""
    turn, made = Turn(), []
    for item in items:
        made.append(item)
        if turn.is_over():
            await turn.give()
    return made
