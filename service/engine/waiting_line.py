"""Waiters in the order in which they are served: in turns of clients, and a client's in their order
of arrival (`turns.py`)."""

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator
from itertools import count
from typing import Generic, NamedTuple, TypeVar

from service.engine.turns import Client, Turns

W = TypeVar("W")


class _Place(NamedTuple):
    """Where a waiter stands. Numbers differ, so places are never equal."""

    turn: float
    number: int


class WaitingLine(Generic[W]):
    """The line, whose waiters are hashable and in it once each."""

    def __init__(self) -> None:
        # In the order in which they are served.
        self._line: list[tuple[_Place, W]] = []
        self._places: dict[W, tuple[_Place, str]] = {}
        self._turns = Turns()
        # How many waiters each client has.
        self._waiting: Counter[str] = Counter()
        self._numbers = count()
        self._last_turn = 0.0

    def __len__(self) -> int:
        return len(self._line)

    def __contains__(self, waiter: W) -> bool:
        return waiter in self._places

    def __iter__(self) -> Iterator[W]:
        return (waiter for _, waiter in self._line)

    def __getitem__(self, index: int) -> W:
        """The waiter that is served after so many others."""
        return self._line[index][1]

    def add(self, waiter: W, client: Client, *, adapters: int = 1) -> int:
        """Put a waiter into the line; returns how many are served before it, as it stands now.

        Args:
            adapters: how many it waits for.
        """
        turn = self._turns.take(client, front=self._front, adapters=adapters)
        place = _Place(turn, next(self._numbers))
        self._places[waiter] = place, client.name
        self._waiting[client.name] += 1
        index = self._index_of(place)
        self._line.insert(index, (place, waiter))
        return index

    def advance(self, waiter: W, client: Client) -> None:
        """Another client waits for the same: the waiter has its turn, if that comes sooner."""
        place, owner = self._places[waiter]
        if client.name != owner and self._turns.next(client, front=self._front) < place.turn:
            self.remove(waiter)
            self.add(waiter, client)

    def remove(self, waiter: W) -> int:
        """Take a waiter out of the line; returns how many stood before it."""
        place, name = self._places.pop(waiter)
        self._waiting[name] -= 1
        if self._waiting[name] == 0:
            del self._waiting[name]
            self._turns.forget(name)
        index = self._index_of(place)
        del self._line[index]
        if index == 0:
            self._last_turn = place.turn
        return index

    def clear(self) -> None:
        for waiter in list(self):
            self.remove(waiter)

    @property
    def _front(self) -> float:
        return self._line[0][0].turn if self._line else self._last_turn

    def _index_of(self, place: _Place) -> int:
        return bisect_left(self._line, place, key=_place_of)


def _place_of(entry: tuple[_Place, W]) -> _Place:
    return entry[0]
