"""Garbage collection while thousands of adapters come: young garbage goes, no walk through all."""

import gc
from collections import Counter, deque
from collections.abc import Iterator
from weakref import WeakSet

import pytest

from service.start import freeze_loaded_objects


@pytest.fixture(autouse=True)
def _collector() -> Iterator[None]:
    before = gc.get_threshold()
    freeze_loaded_objects()
    yield
    gc.set_threshold(*before)
    gc.unfreeze()


@pytest.fixture
def collections() -> Iterator[Counter[int]]:
    """How many there were of each generation."""
    counts: Counter[int] = Counter()

    def count(phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            counts[info["generation"]] += 1

    gc.callbacks.append(count)
    yield counts
    gc.callbacks.remove(count)


class Cycle:
    """Refers to itself, so that only a collection finds it."""

    def __init__(self) -> None:
        self.itself = self


def test_objects_that_come_and_stay_are_walked_through_seldom(collections: Counter[int]) -> None:
    kept = [[number] for number in range(1_000_000)]
    assert collections[2] == 0
    assert 1 <= sum(collections.values()) <= len(kept) // 20_000 + 1


@pytest.mark.slow
def test_garbage_that_has_grown_old_is_collected(collections: Counter[int]) -> None:
    """Such as the errors of lines that have waited for the answers of lines before them."""
    waiting: deque[Cycle] = deque()
    for _ in range(2_000_000):
        waiting.append(Cycle())
        if len(waiting) > 150_000:
            waiting.popleft()
    assert collections[2] >= 1


@pytest.mark.slow
def test_garbage_in_cycles_stays_bounded() -> None:
    alive: WeakSet[Cycle] = WeakSet()
    most = 0
    for _ in range(100):
        for _ in range(1000):
            alive.add(Cycle())
        most = max(most, len(alive))
    assert most <= 25_000
