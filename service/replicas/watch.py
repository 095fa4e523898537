"""Which replicas there are, as one of them sees it: by their states, on its own clock."""

from collections.abc import Callable
from time import monotonic

from adapters.shared.records import ReplicaState

# How much slower than this replica's clock another one's may run.
MARGIN = 1.05


class Watch:
    """Remembers since when each state has been the same.

    Args:
        read: returns all states; it blocks.
        remove: called with the id of a replica whose lease is over for ever; it blocks.
    """

    def __init__(
        self, read: Callable[[], list[ReplicaState]], remove: Callable[[str], object]
    ) -> None:
        self._read = read
        self._remove = remove
        # By id: the beat, and when it had been read for the first time.
        self._seen: dict[str, tuple[int, float]] = {}

    def look(self) -> list[ReplicaState]:
        """The states of all replicas that may hold a lease. It blocks.

        One that has not changed for its whole lease is left out: its last write began before that
        time, and a lease that is over is never renewed.

        Raises:
            StoreError: they cannot be read.
        """
        began = monotonic()
        states = self._read()
        ended = monotonic()
        seen = {}
        alive = []
        for state in states:
            beat, since = self._seen.get(state.id, (None, ended))
            if beat != state.beat:
                since = ended
            if began - since >= state.lease_seconds * MARGIN:
                self._remove(state.id)
                continue
            seen[state.id] = state.beat, since
            alive.append(state)
        self._seen = seen
        return alive


def name_of(state: ReplicaState) -> str:
    """What people call a replica."""
    name = state.about.get("name")
    return name if isinstance(name, str) else state.id
