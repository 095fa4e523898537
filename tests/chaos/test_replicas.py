"""The parts of the chaos over replicas that need no service; `make chaos-replicas` is the whole."""

import math
import time

from adapters import faults
from adapters.backbone.model import Backbone
from chaos.answers import Answers
from chaos.changes import Changes
from chaos.history import Operation, check
from chaos.replicas import longest


def test_the_longest_time_without_one_counts_both_ends() -> None:
    assert longest([1.0, 2.0, 6.0], 0.0, 7.0) == 4.0
    assert longest([1.0], 0.0, 9.0) == 8.0
    assert longest([5.0], 0.0, 6.0) == 5.0
    assert longest([], 2.0, 9.0) == 7.0
    assert longest([-5.0, 20.0], 0.0, 3.0) == 3.0


def test_each_replica_is_judged_by_all_changes_and_its_own_reads(backbone: Backbone) -> None:
    answers = Answers(backbone, dtype="float32", seed=1, texts=4)
    changes = Changes("127.0.0.1", [1, 2], answers, ["a"], writers=0, readers=0, seed=1)
    put, stale = Operation("a", "put", 0, 3, "new"), Operation("a", "read", 4, 5)
    during = [Operation("a", "read", 1, 1.5, "new"), Operation("a", "read", 1.6, 2)]
    changes.saw(put, 1)
    # While the change is on its way, one replica has switched and the other has not.
    changes.saw(during[0], 1)
    changes.saw(during[1], 2)
    assert changes.seen_at(1) == [put, during[0]]
    assert changes.seen_at(2) == [put, during[1]]
    assert not check(changes.seen_at(1))
    assert not check(changes.seen_at(2))
    assert check(changes.history)
    # When it has returned, it is everywhere.
    changes.saw(stale, 2)
    assert check(changes.seen_at(2))
    assert not check(changes.seen_at(1))


def test_a_change_without_an_answer_may_have_happened(backbone: Backbone) -> None:
    answers = Answers(backbone, dtype="float32", seed=1, texts=4)
    changes = Changes("127.0.0.1", [1], answers, ["a"], writers=0, readers=0, seed=1)
    changes.saw(Operation("a", "put", 0, math.inf, "new"), 1)
    changes.saw(Operation("a", "read", 1, 2, ""), 1)
    changes.saw(Operation("a", "read", 3, 4, "new"), 1)
    assert not check(changes.seen_at(1))


def test_a_fault_can_make_a_call_slow() -> None:
    began = time.monotonic()
    assert not faults.act("sleep:0.05")
    assert time.monotonic() - began >= 0.05
