"""One bound for the bodies of all requests in flight, in memory and on disk.

Bytes are counted as they arrive. What would exceed the bound is refused at once, never made to
wait, so half-read bodies cannot wait for each other. The first 64 KiB of each body are free: their
number is bounded by that of the connections, and so a few large bodies that stall cannot keep
ordinary requests out.

Clients with keys share the bound by a dynamic threshold (Choudhury and Hahne, IEEE/ACM Transactions
on Networking 6(2), 1998): the bodies of one may take three times what would then be free. One
client alone takes three quarters, two take three sevenths each, and there is always room for
another one. The only body of its client may take all that is free, so the largest one fits.
"""

from collections import Counter
from collections.abc import MutableMapping
from typing import Any, Literal

from service.errors import Overloaded

FREE_BYTES = 64 * 1024
RETRY_SECONDS = 1.0
SHARE = "idspam.body_share"
# A client's bytes over those that are free.
_TIMES_FREE = 3

Place = Literal["memory", "disk"]


class BodyBudget:
    """The bytes in flight in this process.

    Attributes:
        bytes_in: by place; each is at most `limit`.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.bytes_in: Counter[Place] = Counter({"memory": 0, "disk": 0})
        self._of_clients: dict[Place, Counter[str]] = {"memory": Counter(), "disk": Counter()}

    def share_of(self, scope: MutableMapping[str, Any]) -> "BodyShare":
        """The share of a request, which the gate releases when it has been answered."""
        share = scope.get(SHARE)
        if share is None:
            share = scope[SHARE] = BodyShare(self, scope.get("idspam.client", ""))
        assert isinstance(share, BodyShare)
        return share

    def of_client(self, client: str, place: Place) -> int:
        """The bytes of a client's bodies."""
        return self._of_clients[place][client]

    def add(self, client: str, size: int, place: Place) -> None:
        """Count so many more bytes of a client, or fewer if it is negative."""
        self.bytes_in[place] += size
        clients = self._of_clients[place]
        clients[client] += size
        if not clients[client]:
            del clients[client]


class BodyShare:
    """The part of the budget that one request has taken.

    Args:
        client: whose request it is; empty without a key, and then only the whole bound counts.
    """

    def __init__(self, budget: BodyBudget, client: str) -> None:
        self._budget = budget
        self._client = client
        self._taken: Counter[Place] = Counter()

    def refuse_unless_fits(self, size: int, place: Place) -> None:
        """
        Raises:
            Overloaded: so many more bytes would be over the bound, or over the client's part of it.
        """
        budget = self._budget
        free = budget.limit - budget.bytes_in[place] - size
        if free < 0:
            raise Overloaded(
                f"{budget.bytes_in[place]} bytes of bodies are in flight and {budget.limit} are "
                f"allowed: there is no room for {size} more",
                retry_after=RETRY_SECONDS,
            )
        of_client = budget.of_client(self._client, place)
        others = of_client - self._taken[place]
        if self._client and others and of_client + size > _TIMES_FREE * free:
            raise Overloaded(
                f"{of_client} bytes of this client's bodies are in flight: {size} more would leave "
                f"{free} of {budget.limit} for all others",
                retry_after=RETRY_SECONDS,
            )

    def fits(self, size: int, place: Place) -> bool:
        """Whether so many more bytes would be taken."""
        try:
            self.refuse_unless_fits(size, place)
        except Overloaded:
            return False
        return True

    def take(self, size: int, place: Place) -> None:
        """Raises as `refuse_unless_fits`."""
        self.refuse_unless_fits(size, place)
        self._add(size, place)

    def give_back(self, size: int, place: Place) -> None:
        """Give back a part of what was taken."""
        assert 0 <= size <= self._taken[place]
        self._add(-size, place)

    def release(self) -> None:
        for place, size in tuple(self._taken.items()):
            self._add(-size, place)

    def _add(self, size: int, place: Place) -> None:
        self._taken[place] += size
        self._budget.add(self._client, size, place)
