"""Turns of clients where adapters wait to be loaded, by weight.

Who arrives gets a turn: the one at the front, or where its client's last turn ends, whichever is
later. A turn ends as much later as the adapters that are wanted, divided by the client's weight. So
a client with one request comes before most of those of a client with thousands, and nobody comes
before a turn that has reached the front: a request for many slots gets them, too. This is
start-time fair queueing, as in `service.engine.flows`, with turns that are given on arrival.
"""

from typing import NamedTuple

# With more clients, those are forgotten whose turns are over.
_KEPT = 1024


class Client(NamedTuple):
    """The client that adapters are loaded for. weight: of its turns."""

    name: str
    weight: float


# The service itself, which loads adapters that no request waits for.
NOBODY = Client("", 1.0)


class Turns:
    """Where the turns of each client end."""

    def __init__(self) -> None:
        self._ends: dict[str, float] = {}
        self._most = _KEPT

    def next(self, client: Client, *, front: float) -> float:
        """The turn that this client would get.

        Args:
            front: the turn that is served next, or was served last if nobody waits.
        """
        return max(front, self._ends.get(client.name, front))

    def take(self, client: Client, *, front: float, adapters: int = 1) -> float:
        """As `next`, and the client has it from now on."""
        turn = self.next(client, front=front)
        if len(self._ends) >= self._most:
            self._ends = {name: end for name, end in self._ends.items() if end > front}
            self._most = max(_KEPT, 2 * len(self._ends))
        self._ends[client.name] = turn + adapters / client.weight
        return turn

    def forget(self, name: str) -> None:
        """A client that has nothing waiting does not pay for what it has had, or has given up."""
        self._ends.pop(name, None)
