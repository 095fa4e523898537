"""Who counts as alive, seen on one clock."""

from dataclasses import replace

import pytest

from adapters.shared.records import ReplicaState
from service.replicas import watch
from service.replicas.watch import Watch, name_of

LEASE = 10.0


class States:
    """What replicas last wrote, and a clock that the tests move."""

    def __init__(self) -> None:
        self.now = 0.0
        self.by_id = {
            name: ReplicaState(name, beat=1, applied=0, lease_seconds=LEASE) for name in "ab"
        }
        self.watch = Watch(lambda: list(self.by_id.values()), self.by_id.pop)

    def beat(self, name: str) -> None:
        self.by_id[name] = replace(self.by_id[name], beat=self.by_id[name].beat + 1)

    def alive(self) -> set[str]:
        return {state.id for state in self.watch.look()}


@pytest.fixture
def states(monkeypatch: pytest.MonkeyPatch) -> States:
    states = States()
    monkeypatch.setattr(watch, "monotonic", lambda: states.now)
    return states


def test_a_state_that_stays_the_same_for_its_whole_lease_is_that_of_a_dead_replica(
    states: States,
) -> None:
    assert states.alive() == {"a", "b"}
    states.now += LEASE / 2
    states.beat("a")
    assert states.alive() == {"a", "b"}
    states.now += LEASE * 0.7
    # It has been seen for longer than its lease, and `a` for less.
    assert states.alive() == {"a"}
    assert set(states.by_id) == {"a"}


def test_a_dead_replica_is_known_by_two_looks_that_are_a_lease_apart(states: States) -> None:
    states.alive()
    states.now += LEASE * 1.2
    states.beat("a")
    assert states.alive() == {"a"}


def test_a_state_that_is_seen_for_the_first_time_counts_as_alive(states: States) -> None:
    states.now += LEASE * 1.2
    assert states.alive() == {"a", "b"}


def test_a_replicas_name_is_for_people() -> None:
    state = ReplicaState("gpu-1-0a1b", beat=1, applied=0, about={"name": "gpu-1"})
    assert name_of(state) == "gpu-1"
    assert name_of(replace(state, about={})) == "gpu-1-0a1b"
