"""How long a roll-out takes on many replicas: its protocol, with measured times of its steps.

    upload, prepare -> every replica sees it, fetches, checks, says ready -> the committer sees that
    commit          -> every replica sees it, switches, says so           -> the committer sees that

docs/replicas.md has the protocol. A replica looks at the log every `follow_seconds`, at a moment of
its own, and more often once it has seen a prepare. So a change waits for the slowest of all, twice.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Seconds = npt.NDArray[np.float64]

# As in `service.replicas`: how much more often replicas look while a change is prepared, and how
# long a committer pauses between two looks at the states (or as long as a look takes).
HURRY = 10
LOOK_SECONDS = 0.03
# States are written so many times in a lease.
BEATS = 4


@dataclass(frozen=True, slots=True)
class Steps:
    """Measured seconds of each step, in samples; a play draws from them.

    upload: an adapter's file to the store, once. create: an entry of the log. put: a replica's own
    state. read: the log's end, where nothing is new. fetch: an adapter's file from the store. warm:
    checking it, and one text through it. states: reading every replica's state, by how many there
    are.
    """

    upload: Seconds
    create: Seconds
    put: Seconds
    read: Seconds
    fetch: Seconds
    warm: Seconds
    states: Mapping[int, Seconds]


@dataclass(frozen=True, slots=True)
class Played:
    """Seconds of each play's roll-out, and where they went.

    prepare: until the committer knows that all are ready. commit: from there until it knows that
    all have switched.
    """

    total: Seconds
    prepare: Seconds
    commit: Seconds

    def percentile(self, percent: float) -> float:
        return float(np.percentile(self.total, percent))


def play(
    steps: Steps,
    replicas: int,
    *,
    follow_seconds: float,
    plays: int = 1000,
    store_requests_per_second: float | None = None,
    seed: int = 0,
) -> Played:
    """Play roll-outs on `replicas` replicas.

    Args:
        store_requests_per_second: what the store answers to all replicas together. Where they ask
            for more, rounds and looks take longer. None: no limit.
    """
    random = np.random.default_rng(seed)

    def drawn(samples: Seconds, *shape: int) -> Seconds:
        return random.choice(samples, size=shape or (plays,))

    others = max(0, replicas - 1)
    # One request of each replica, at the store's limit.
    everybody = replicas / store_requests_per_second if store_requests_per_second else 0.0
    looking = np.maximum(_reading_states(steps, replicas, drawn), everybody)
    period = looking + np.maximum(LOOK_SECONDS, looking)

    def seen(pause: float) -> Seconds:
        """Until each of the other replicas has read a new entry."""
        at = random.uniform(0.0, max(pause, everybody), (plays, others))
        return at + drawn(steps.read, plays, others)

    def said(when: Seconds) -> Seconds:
        """Until the slowest replica has written what it has done by then."""
        said_at: Seconds = (when + drawn(steps.put, *when.shape)).max(axis=1)
        return said_at

    def noticed(slowest: Seconds) -> Seconds:
        """Until the committer, who looks again and again, has read it."""
        noticed_at: Seconds = np.ceil(slowest / period) * period + looking
        return noticed_at

    # The committer reads its own entry back, and has the file already.
    own = drawn(steps.read, plays, 1)
    fetched = seen(follow_seconds) + np.maximum(drawn(steps.fetch, plays, others), everybody)
    warm = np.hstack([own, fetched]) + drawn(steps.warm, plays, others + 1)
    prepare = drawn(steps.upload) + drawn(steps.create) + noticed(said(warm))
    applied = np.hstack([drawn(steps.read, plays, 1), seen(follow_seconds / HURRY)])
    commit = drawn(steps.create) + noticed(said(applied))
    return Played(prepare + commit, prepare, commit)


def requests_per_second(
    replicas: int, *, follow_seconds: float, lease_seconds: float, hurry: bool = False
) -> float:
    """What replicas ask of the store: the log's end each round, and their states.

    Args:
        hurry: while a change is on its way.
    """
    rounds = (HURRY if hurry else 1) / follow_seconds
    return replicas * (rounds + BEATS / lease_seconds)


def _reading_states(steps: Steps, replicas: int, drawn: Callable[[Seconds], Seconds]) -> Seconds:
    """Between the measured numbers in proportion, beyond them by the last two's slope."""
    counts = sorted(steps.states)
    if replicas in steps.states or len(counts) == 1:
        return drawn(steps.states[replicas if replicas in steps.states else counts[0]])
    above = next((count for count in counts[1:] if count > replicas), counts[-1])
    below = counts[counts.index(above) - 1]
    share = (replicas - below) / (above - below)
    low, high = drawn(steps.states[below]), drawn(steps.states[above])
    return np.maximum(0.0, (1 - share) * low + share * high)
