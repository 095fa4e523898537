"""The scheduler with a fake clock: order, budgets, deadlines, admission."""

import subprocess
import sys
from itertools import count

import pytest

from service.engine.scheduler import MAX_OVERTAKEN, MAX_PASSED_OVER, QueuedEntry
from service.errors import Overloaded, TooLarge
from tests.support.scheduler_builders import costs, enqueue, make_entry, make_scheduler


def test_the_scheduler_needs_no_torch() -> None:
    code = "import sys, service.engine.scheduler; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_entries_leave_in_order_of_arrival_as_many_as_fit() -> None:
    scheduler = make_scheduler()
    entries = [make_entry(40) for _ in range(5)]
    enqueue(scheduler, *entries)
    assert scheduler.next_batch(0.0).batch == entries[:2]
    assert scheduler.next_batch(0.0).batch == entries[2:4]
    assert scheduler.next_batch(0.0).batch == entries[4:]
    assert not scheduler.next_batch(0.0)


def test_a_later_entry_fills_what_an_earlier_one_leaves() -> None:
    scheduler = make_scheduler()
    enqueue(
        scheduler, make_entry(60), make_entry(50), make_entry(30), make_entry(20), make_entry(10)
    )
    assert costs(scheduler.next_batch(0.0).batch) == [60, 30, 10]
    assert costs(scheduler.next_batch(0.0).batch) == [50, 20]


def test_a_thread_that_takes_one_of_several_shares_leaves_the_rest() -> None:
    scheduler = make_scheduler()
    enqueue(scheduler, *(make_entry(10) for _ in range(5)))
    assert costs(scheduler.next_batch(0.0, shares=2).batch) == [10, 10]
    assert costs(scheduler.next_batch(0.0, shares=1).batch) == [10, 10, 10]
    enqueue(scheduler, make_entry(7))
    assert costs(scheduler.next_batch(0.0, shares=4).batch) == [7]


def test_an_entry_over_the_budget_runs_alone() -> None:
    scheduler = make_scheduler()
    enqueue(scheduler, make_entry(10), make_entry(500), make_entry(10))
    assert costs(scheduler.next_batch(0.0).batch) == [10, 10]
    enqueue(scheduler, make_entry(1))
    assert costs(scheduler.next_batch(0.0).batch) == [500]
    assert costs(scheduler.next_batch(0.0).batch) == [1]


def test_a_batch_holds_no_more_adapters_than_allowed() -> None:
    scheduler = make_scheduler(max_adapters=2)
    enqueue(scheduler, *(make_entry(1, name=name) for name in "abcab"))
    assert [queued.entry.adapter.name for queued in scheduler.next_batch(0.0).batch] == list("abab")
    assert [queued.entry.adapter.name for queued in scheduler.next_batch(0.0).batch] == ["c"]


def test_an_entry_is_overtaken_in_a_bounded_number_of_batches() -> None:
    victim = make_entry(50)
    scheduler = make_scheduler()
    blockers = [make_entry(60) for _ in range(MAX_OVERTAKEN + 3)]
    enqueue(scheduler, *blockers)
    enqueue(scheduler, victim)
    enqueue(scheduler, *(make_entry(40) for _ in range(50)))
    for _ in range(MAX_OVERTAKEN):
        assert costs(scheduler.next_batch(0.0).batch) == [60, 40]
    assert victim.overtaken == MAX_OVERTAKEN
    assert costs(scheduler.next_batch(0.0).batch) == [60]
    assert costs(scheduler.next_batch(0.0).batch) == [60]
    assert costs(scheduler.next_batch(0.0).batch) == [60]
    assert scheduler.next_batch(0.0).batch[0] is victim


def test_expired_entries_leave_without_being_run() -> None:
    scheduler = make_scheduler()
    late, good = make_entry(10, deadline=5.0), make_entry(10, deadline=5.1)
    enqueue(scheduler, late, good)
    selection = scheduler.next_batch(5.0)
    assert selection.expired == [late]
    assert selection.batch == [good]
    assert scheduler.waiting_tokens == 0


def test_dropped_entries_are_not_batched_and_free_their_tokens() -> None:
    scheduler = make_scheduler()
    entries = [make_entry(10) for _ in range(4)]
    enqueue(scheduler, *entries)
    assert scheduler.drop(entries[1:3]) == 2
    assert scheduler.drop(entries[1:3]) == 0
    assert scheduler.waiting_tokens == 20
    assert scheduler.next_batch(0.0).batch == [entries[0], entries[3]]
    assert scheduler.drop(entries) == 0
    assert scheduler.waiting_tokens == 0


def test_a_request_is_admitted_exactly_up_to_the_limit_or_not_at_all() -> None:
    scheduler = make_scheduler(max_waiting_tokens=100)
    scheduler.admit(60)
    with pytest.raises(Overloaded):
        scheduler.admit(41)
    assert scheduler.waiting_tokens == 60
    scheduler.admit(40)
    with pytest.raises(Overloaded):
        scheduler.admit(1)
    scheduler.withdraw(60)
    scheduler.admit(60)


def test_a_request_that_can_never_wait_is_too_large_not_overloaded() -> None:
    with pytest.raises(TooLarge, match="101"):
        make_scheduler(max_waiting_tokens=100).admit(101)


def test_a_refusal_says_when_the_excess_will_have_drained() -> None:
    scheduler = make_scheduler(max_waiting_tokens=100)
    scheduler.admit(100)
    with pytest.raises(Overloaded) as unmeasured:
        scheduler.admit(20)
    assert unmeasured.value.retry_after == 1.0
    scheduler.record_batch(1000, 2.0)
    with pytest.raises(Overloaded) as measured:
        scheduler.admit(20)
    assert measured.value.retry_after == pytest.approx(20 / 500)
    for _ in range(40):
        scheduler.record_batch(1000, 20.0)
    with pytest.raises(Overloaded) as slower:
        scheduler.admit(20)
    # The old rate's weight is 0.8 ** 40 by now.
    assert slower.value.retry_after == pytest.approx(20 / 50, rel=1e-3)


def test_filling_a_batch_looks_at_few_of_thousands_of_waiting_entries() -> None:
    """Counted, not timed: the scan stops although thousands of entries do not fit."""
    scheduler = make_scheduler(max_batch_tokens=10, max_waiting_tokens=10**9)
    looks = count()

    class Watched(QueuedEntry[int]):
        def __getattribute__(self, name: str) -> object:
            if name == "entry":
                next(looks)
            return super().__getattribute__(name)

    long = make_entry(9).entry
    enqueue(scheduler, make_entry(5), *(Watched(long, 0, 0, 0.0) for _ in range(5000)))
    before = next(looks)
    assert costs(scheduler.next_batch(0.0).batch) == [5]
    assert 0 < next(looks) - before <= 3 * MAX_PASSED_OVER
