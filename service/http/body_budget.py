"""One bound for the bodies of all requests in flight, in memory and on disk.

Bytes are counted as they arrive. What would exceed the bound is refused at once, never made to
wait, so half-read bodies cannot wait for each other. The first 64 KiB of each body are free: their
number is bounded by that of the connections, and so a few large bodies that stall cannot keep
ordinary requests out.
"""

from collections.abc import MutableMapping
from typing import Any, Literal

from service.errors import Overloaded

FREE_BYTES = 64 * 1024
RETRY_SECONDS = 1.0
SHARE = "idspam.body_share"

Place = Literal["memory", "disk"]


class BodyBudget:
    """The bytes in flight in this process.

    Attributes:
        bytes_in: by place; each is at most `limit`.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.bytes_in: dict[Place, int] = {"memory": 0, "disk": 0}

    def refuse_unless_fits(self, size: int, place: Place) -> None:
        """
        Raises:
            Overloaded: so many more bytes would be over the bound.
        """
        if self.bytes_in[place] + size > self.limit:
            raise Overloaded(
                f"{self.bytes_in[place]} bytes of bodies are in flight and {self.limit} are "
                f"allowed: there is no room for {size} more",
                retry_after=RETRY_SECONDS,
            )

    def share_of(self, scope: MutableMapping[str, Any]) -> "BodyShare":
        """The share of a request, which the gate releases when it has been answered."""
        share = scope.get(SHARE)
        if share is None:
            share = scope[SHARE] = BodyShare(self)
        assert isinstance(share, BodyShare)
        return share


class BodyShare:
    """The part of the budget that one request has taken."""

    def __init__(self, budget: BodyBudget) -> None:
        self._budget = budget
        self._taken: dict[Place, int] = {"memory": 0, "disk": 0}

    def take(self, size: int, place: Place) -> None:
        """
        Raises:
            Overloaded: it would be over the bound.
        """
        self._budget.refuse_unless_fits(size, place)
        self._budget.bytes_in[place] += size
        self._taken[place] += size

    def give_back(self, size: int, place: Place) -> None:
        """Give back a part of what was taken."""
        assert 0 <= size <= self._taken[place]
        self._budget.bytes_in[place] -= size
        self._taken[place] -= size

    def release(self) -> None:
        for place, size in self._taken.items():
            self._budget.bytes_in[place] -= size
            self._taken[place] = 0
