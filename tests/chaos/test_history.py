"""The history checker: what it accepts and, above all, what it must refuse."""

import math
import random
from itertools import permutations

import pytest

from chaos import history
from chaos.history import ABSENT, UNLOADED, Kind, Operation, State, Undecided, check, step


def operation(kind: Kind, began: float, ended: float, revision: str = ABSENT) -> Operation:
    return Operation("a", kind, began, ended, revision)


NEVER = math.inf

LINEARIZABLE = {
    "one after the other": [
        operation("read", 0, 1),
        operation("put", 2, 3, "x"),
        operation("read", 4, 5, "x"),
        operation("put", 6, 7, "y"),
        operation("read", 8, 9, "y"),
        operation("rollback", 10, 11, "x"),
        operation("read", 12, 13, "x"),
        operation("delete", 14, 15),
        operation("read", 16, 17),
    ],
    "reads during a put see the old or the new": [
        operation("put", 0, 1, "x"),
        operation("put", 2, 10, "y"),
        operation("read", 3, 9, "x"),
        operation("read", 4, 8, "x"),
        operation("read", 5, 6, "x"),
        operation("read", 7, 8, "y"),
    ],
    "two puts at once, either order": [
        operation("put", 0, 5, "x"),
        operation("put", 0, 5, "y"),
        operation("read", 6, 7, "x"),
    ],
    "a put without an answer that took effect": [
        operation("put", 0, 1, "x"),
        operation("put", 2, NEVER, "y"),
        operation("read", 5, 6, "y"),
    ],
    "a put without an answer that had no effect": [
        operation("put", 0, 1, "x"),
        operation("put", 2, NEVER, "y"),
        operation("read", 5, 6, "x"),
        operation("read", 50, 60, "x"),
    ],
    "a put without an answer that took effect late": [
        operation("put", 0, 1, "x"),
        operation("put", 2, NEVER, "y"),
        operation("read", 5, 6, "x"),
        operation("read", 7, 8, "y"),
    ],
    "unloaded, and loaded by a restart": [
        operation("put", 0, 1, "x"),
        operation("unload", 2, 3),
        operation("read", 4, 5, UNLOADED),
        operation("restart", 6, 7),
        operation("read", 8, 9, "x"),
        operation("unload", 10, 11),
        operation("load", 12, 13),
        operation("read", 14, 15, "x"),
    ],
    "a rollback without an answer of a name that is gone": [
        operation("put", 0, 1, "x"),
        operation("delete", 2, 3),
        operation("rollback", 4, NEVER, "x"),
        operation("read", 5, 6),
    ],
}

VIOLATIONS = {
    "a stale read after a put was answered": [
        operation("put", 0, 1, "x"),
        operation("put", 2, 3, "y"),
        operation("read", 4, 5, "x"),
    ],
    "a read of what was never put": [operation("put", 0, 1, "x"), operation("read", 2, 3, "z")],
    "a read from the future": [operation("read", 0, 1, "x"), operation("put", 2, 3, "x")],
    "new and then old again": [
        operation("put", 0, 1, "x"),
        operation("put", 2, 10, "y"),
        operation("read", 3, 4, "y"),
        operation("read", 5, 6, "x"),
    ],
    "two readers disagree about the order of two puts": [
        operation("put", 0, 10, "x"),
        operation("put", 0, 10, "y"),
        operation("read", 1, 2, "x"),
        operation("read", 3, 4, "y"),
        operation("read", 5, 6, "x"),
    ],
    "an acknowledged put is lost": [operation("put", 0, 1, "x"), operation("read", 2, 3)],
    "a deleted name answers": [
        operation("put", 0, 1, "x"),
        operation("delete", 2, 3),
        operation("read", 4, 5, "x"),
    ],
    "an unloaded name answers": [
        operation("put", 0, 1, "x"),
        operation("unload", 2, 3),
        operation("read", 4, 5, "x"),
    ],
    "a put without an answer takes effect, and then not": [
        operation("put", 0, 1, "x"),
        operation("put", 2, NEVER, "y"),
        operation("read", 3, 4, "y"),
        operation("read", 5, 6, "x"),
    ],
    "a delete is answered though the name is absent": [operation("delete", 0, 1)],
}


@pytest.mark.parametrize("case", LINEARIZABLE)
def test_a_history_with_an_order_passes(case: str) -> None:
    assert check(LINEARIZABLE[case]) == []


@pytest.mark.parametrize("case", VIOLATIONS)
def test_a_history_without_an_order_is_found_and_named(case: str) -> None:
    (violation,) = check(VIOLATIONS[case])
    assert violation.name == "a"
    assert violation.stuck in VIOLATIONS[case]
    assert str(violation.stuck) in str(violation)


def test_names_are_checked_apart() -> None:
    good = [Operation("b", "put", 0, 1, "x"), Operation("b", "read", 2, 3, "x")]
    bad = VIOLATIONS["a deleted name answers"]
    assert [violation.name for violation in check([*good, *bad])] == ["a"]


def brute_force(operations: list[Operation]) -> bool:
    """Whether an order exists, by trying all: operations without an answer may come last."""
    for order in permutations(operations):
        if any(
            later.ended < earlier.began
            for index, earlier in enumerate(order)
            for later in order[index + 1 :]
        ):
            continue
        state = State()
        for each in order:
            following = step(state, each)
            if following is None:
                break
            state = following
        else:
            return True
    return False


def test_it_agrees_with_trying_every_order() -> None:
    """Random histories of six operations, about half of them linearizable."""
    chance = random.Random(7)
    verdicts = []
    for _ in range(400):
        operations = []
        for _ in range(6):
            kind: Kind = chance.choice(("put", "put", "read", "read", "read", "delete", "unload"))
            began = chance.uniform(0, 10)
            ended = NEVER if chance.random() < 0.1 else began + chance.uniform(0, 4)
            choices = {"put": ("x", "y"), "read": ("x", "y", ABSENT, UNLOADED)}.get(kind, (ABSENT,))
            operations.append(operation(kind, began, ended, chance.choice(choices)))
        verdicts.append(brute_force(operations))
        assert (check(operations) == []) is verdicts[-1], operations
    assert 40 < sum(verdicts) < 360


def simulated(chance: random.Random, length: int) -> list[Operation]:
    """A linearizable history of eight clients: each operation happens at a moment inside it."""
    moments = []
    for client in range(8):
        now = 0.0
        for _ in range(length // 8):
            began = now + chance.uniform(0, 0.1)
            ended = began + chance.uniform(0.01, 1.0)
            moments.append((chance.uniform(began, ended), began, ended, client))
            now = ended
    state, operations = State(), []
    for number, (_, began, ended, _) in enumerate(sorted(moments)):
        if chance.random() < 0.2:
            operations.append(operation("put", began, ended, str(number)))
            state = State(str(number))
        else:
            operations.append(operation("read", began, ended, state.revision))
    return operations


@pytest.mark.slow
def test_long_histories_are_decided_quickly_and_one_stale_read_in_them_is_found() -> None:
    chance = random.Random(3)
    operations = simulated(chance, 4000)
    assert check(operations) == []
    at = next(
        index
        for index, each in enumerate(operations)
        if each.kind == "read" and index > 2000 and each.revision
    )
    stale = next(each.revision for each in operations if each.kind == "put")
    broken = operations[at]
    operations[at] = operation("read", broken.began, broken.ended, stale)
    (violation,) = check(operations)
    assert violation.stuck.revision == stale or violation.stuck == operations[at]


def test_a_search_that_grows_too_large_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history, "MAX_STATES", 50)
    puts = [operation("put", 0, 100, str(number)) for number in range(12)]
    with pytest.raises(Undecided):
        check([*puts, operation("read", 101, 102, "none of them")])
