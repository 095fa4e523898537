"""Which replicas a request is offered to: power-of-two choices among those with its adapters.

Two replicas that have most of a request's adapters on their device are drawn, and the one with the
shorter queue takes it. If both are busier than two others by more than a margin, one of the others
takes it, loads the adapter, and has it from then on. So a popular adapter spreads over as many
replicas as its traffic needs.

An adapter that no replica has goes to two fixed replicas, found by hashing. Otherwise the requests
that come before the first load is known would load it everywhere.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from random import Random

Ranks = list[list[int]]


@dataclass(frozen=True, slots=True)
class Seen:
    """A replica as a router sees it.

    id: of the replica. adapters: on its device. ready: whether it may answer. queue: its requests
    in flight. wait: seconds of work that waited when it last reported.
    """

    id: str
    adapters: frozenset[str] = frozenset()
    ready: bool = True
    queue: int = 0
    wait: float = 0.0


@dataclass(frozen=True, slots=True)
class Margin:
    """How much busier a replica with the adapter may be than one without it.

    requests: in flight. seconds: of waiting work.
    """

    requests: int = 8
    seconds: float = 0.25


def choose(replicas: Sequence[Seen], names: Sequence[str], margin: Margin, chance: Random) -> Ranks:
    """Positions of replicas: the first rank is asked first, its members by their queues.

    Replicas that are not ready are offered nothing while any other is.
    """
    usable = [index for index, replica in enumerate(replicas) if replica.ready]
    usable = usable or list(range(len(replicas)))
    if not usable:
        return []
    preferred = _preferred(replicas, usable, names)
    rest = [index for index in usable if index not in preferred]
    near, far = _draw(sorted(preferred), chance), _draw(rest, chance)
    if near and far and _is_busier(replicas, near, far, margin):
        near, far = far, near
    return [rank for rank in (near, far) if rank]


def _preferred(replicas: Sequence[Seen], usable: list[int], names: Sequence[str]) -> set[int]:
    if not names:
        return set(usable)
    counts = {index: sum(name in replicas[index].adapters for name in names) for index in usable}
    most = max(counts.values())
    if most:
        return {index for index, count in counts.items() if count == most}
    key = "\n".join(sorted(names))
    by_hash = sorted(usable, key=lambda index: _weight(replicas[index].id, key))
    return set(by_hash[:2])


def _weight(id_: str, key: str) -> bytes:
    """Rendezvous hashing: a replica's place in the order for a key.

    Not a CRC: it is linear, so the same replicas would be neighbours for every key. Of eight, a few
    pairs would share all adapters, and one replica would have twice its part.
    """
    return blake2b(f"{id_}\n{key}".encode(), digest_size=8).digest()


def _draw(indices: list[int], chance: Random) -> list[int]:
    return chance.sample(indices, min(2, len(indices)))


def _is_busier(replicas: Sequence[Seen], near: list[int], far: list[int], margin: Margin) -> bool:
    def least(indices: list[int]) -> tuple[int, float]:
        return (
            min(replicas[index].queue for index in indices),
            min(replicas[index].wait for index in indices),
        )

    (queue, wait), (other_queue, other_wait) = least(near), least(far)
    return queue > other_queue + margin.requests or wait > other_wait + margin.seconds
