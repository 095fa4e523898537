"""The scheduler with a fake clock: order, budgets, deadlines, admission."""

import subprocess
import sys
from itertools import count

import numpy as np
import pytest

from service.engine.scheduler import (
    MAX_OVERTAKEN,
    MAX_PASSED_OVER,
    WAITING_SECONDS,
    QueuedEntry,
    Scheduler,
    Ticket,
)
from service.errors import DeadlineExceeded, Overloaded, TooLarge
from tests.support.scheduler_builders import (
    costs,
    make_entry,
    make_scheduler,
    queue,
    submit,
    submit_each,
)


def test_the_scheduler_needs_no_torch() -> None:
    code = "import sys, service.engine.scheduler; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_entries_of_one_flow_leave_in_order_of_arrival_as_many_as_fit() -> None:
    scheduler = make_scheduler()
    entries = submit_each(scheduler, 40, 40, 40, 40, 40)
    assert scheduler.next_batch(0.0).batch == entries[:2]
    assert scheduler.next_batch(0.0).batch == entries[2:4]
    assert scheduler.next_batch(0.0).batch == entries[4:]
    assert not scheduler.next_batch(0.0)


def test_a_later_entry_fills_what_an_earlier_one_leaves() -> None:
    scheduler = make_scheduler()
    submit_each(scheduler, 60, 50, 30, 20, 10)
    assert costs(scheduler.next_batch(0.0).batch) == [60, 30, 10]
    assert costs(scheduler.next_batch(0.0).batch) == [50, 20]


def test_an_entry_of_another_flow_fills_what_the_first_leaves() -> None:
    scheduler = make_scheduler()
    submit(scheduler, make_entry(60, name="a"), make_entry(60, name="a"))
    submit(scheduler, make_entry(70, name="b"))
    submit(scheduler, make_entry(30, name="c"))
    assert costs(scheduler.next_batch(0.0).batch) == [60, 30]
    # What did not fit comes first in the next batch.
    assert costs(scheduler.next_batch(0.0).batch) == [70]
    assert costs(scheduler.next_batch(0.0).batch) == [60]


def test_a_thread_that_takes_one_of_several_shares_leaves_the_rest() -> None:
    scheduler = make_scheduler()
    submit_each(scheduler, 10, 10, 10, 10, 10)
    assert costs(scheduler.next_batch(0.0, shares=2).batch) == [10, 10]
    assert costs(scheduler.next_batch(0.0, shares=1).batch) == [10, 10, 10]
    submit_each(scheduler, 7)
    assert costs(scheduler.next_batch(0.0, shares=4).batch) == [7]


def test_an_entry_over_the_budget_runs_alone() -> None:
    scheduler = make_scheduler()
    submit_each(scheduler, 10, 500, 10)
    assert costs(scheduler.next_batch(0.0).batch) == [10, 10]
    submit_each(scheduler, 1)
    assert costs(scheduler.next_batch(0.0).batch) == [500]
    assert costs(scheduler.next_batch(0.0).batch) == [1]


def test_a_batch_holds_no_more_adapters_than_allowed() -> None:
    scheduler = make_scheduler(max_adapters=2)
    for name in "abcab":
        submit(scheduler, make_entry(1, name=name))
    first = [queued.entry.adapter.name for queued in scheduler.next_batch(0.0).batch]
    assert sorted(first) == list("aabb")
    assert [queued.entry.adapter.name for queued in scheduler.next_batch(0.0).batch] == ["c"]


def test_an_entry_is_overtaken_in_a_bounded_number_of_batches() -> None:
    scheduler = make_scheduler()
    blockers = submit_each(scheduler, *[60] * (MAX_OVERTAKEN + 3))
    (victim,) = submit_each(scheduler, 50)
    submit_each(scheduler, *[40] * 50)
    for _ in range(MAX_OVERTAKEN):
        assert costs(scheduler.next_batch(0.0).batch) == [60, 40]
    assert victim.overtaken == blockers[MAX_OVERTAKEN].overtaken == MAX_OVERTAKEN
    for _ in range(3):
        assert costs(scheduler.next_batch(0.0).batch) == [60]
    assert scheduler.next_batch(0.0).batch[0] is victim


def test_expired_entries_leave_without_being_run() -> None:
    scheduler = make_scheduler()
    late = submit(scheduler, make_entry(10), make_entry(10), deadline=5.0)
    (good,) = submit(scheduler, make_entry(10), deadline=5.1)
    selection = scheduler.next_batch(5.0)
    assert selection.expired == late
    assert selection.batch == [good]
    assert scheduler.waiting_tokens == 0


def test_withdrawn_entries_are_not_batched_and_free_their_tokens() -> None:
    scheduler = make_scheduler()
    first, *dropped, last = [submit(scheduler, make_entry(10))[0] for _ in range(4)]
    for queued in dropped:
        assert scheduler.withdraw(queued.ticket) == 1
        assert scheduler.withdraw(queued.ticket) == 0
    assert scheduler.waiting_tokens == 20
    assert scheduler.next_batch(0.0).batch == [first, last]
    assert scheduler.withdraw(first.ticket) == 0
    assert scheduler.waiting_tokens == 0


def test_a_request_is_admitted_exactly_up_to_the_limit_or_not_at_all() -> None:
    scheduler = make_scheduler(max_waiting_tokens=100)
    first = scheduler.admit([make_entry(60)], now=0.0)
    with pytest.raises(Overloaded):
        scheduler.admit([make_entry(41)], now=0.0)
    assert scheduler.waiting_tokens == 60
    scheduler.admit([make_entry(40)], now=0.0)
    with pytest.raises(Overloaded):
        scheduler.admit([make_entry(1)], now=0.0)
    scheduler.withdraw(first)
    scheduler.admit([make_entry(60)], now=0.0)


def test_a_request_that_can_never_wait_is_too_large_not_overloaded() -> None:
    with pytest.raises(TooLarge, match="101"):
        make_scheduler(max_waiting_tokens=100).admit([make_entry(101)], now=0.0)


def test_without_a_set_bound_a_large_request_is_admitted_while_its_adapter_waits_for_nothing() -> (
    None
):
    scheduler = make_scheduler(max_waiting_tokens=None)
    submit(scheduler, *[make_entry(100, name="b") for _ in range(4)])
    submit(scheduler, *[make_entry(100) for _ in range(50)])
    with pytest.raises(Overloaded):
        submit(scheduler, *[make_entry(100) for _ in range(50)])


def test_a_refusal_says_when_the_excess_will_have_drained() -> None:
    scheduler = make_scheduler(max_waiting_tokens=100)
    scheduler.admit([make_entry(100)], now=0.0)
    with pytest.raises(Overloaded) as unmeasured:
        scheduler.admit([make_entry(20)], now=0.0)
    assert unmeasured.value.retry_after == 1.0
    scheduler.measured(100, 0.2)
    with pytest.raises(Overloaded) as measured:
        scheduler.admit([make_entry(20)], now=0.0)
    assert measured.value.retry_after == pytest.approx(20 / 500)
    for _ in range(40):
        scheduler.measured(100, 2.0)
    with pytest.raises(Overloaded) as slower:
        scheduler.admit([make_entry(20)], now=0.0)
    assert slower.value.retry_after == pytest.approx(20 / 50, rel=1e-3)


def test_the_bound_of_waiting_tokens_follows_the_measured_rate() -> None:
    scheduler = make_scheduler(max_waiting_tokens=None, lanes=2)
    assert scheduler.limit == 4 * 2 * 100
    scheduler.measured(100, 0.1)
    assert scheduler.limit == WAITING_SECONDS * 2000
    for _ in range(100):
        scheduler.measured(100, 100.0)
    # However slow the device is, one more batch may wait for each lane.
    assert scheduler.limit == 2 * 100


def test_a_request_that_would_miss_its_deadline_is_refused_at_once() -> None:
    scheduler = make_scheduler()
    scheduler.measured(100, 1.0)
    submit(scheduler, *[make_entry(50)] * 6, deadline=3.9)
    # Three batches of a second wait, and a fourth one would have this entry.
    with pytest.raises(Overloaded) as refusal:
        submit(scheduler, make_entry(50), deadline=3.0)
    assert refusal.value.reason == "deadline"
    assert refusal.value.retry_after == pytest.approx(1.0, abs=0.5)
    assert scheduler.waiting_tokens == 300
    submit(scheduler, make_entry(50), deadline=4.5)


def test_a_queue_of_patient_requests_does_not_keep_impatient_ones_out() -> None:
    scheduler = make_scheduler()
    scheduler.measured(100, 0.1)
    patient = submit(scheduler, *[make_entry(50)] * 60, deadline=30.0)
    (impatient,) = submit(scheduler, make_entry(50), deadline=0.5)
    assert scheduler.next_batch(0.0).batch == [patient[0], impatient]


def test_a_request_that_not_even_an_idle_device_could_finish_has_missed_its_deadline() -> None:
    scheduler = make_scheduler()
    scheduler.measured(100, 1.0)
    with pytest.raises(DeadlineExceeded):
        scheduler.admit([make_entry(100)] * 3, now=0.0, deadline=2.5)
    scheduler.admit([make_entry(100)] * 3, now=0.0, deadline=3.5)


@pytest.mark.parametrize("idle", [1.0, 60.0, 3600.0, 1e7])
@pytest.mark.parametrize("lanes", [1, 2])
def test_however_long_the_device_was_idle_the_next_request_is_answered(
    lanes: int, idle: float
) -> None:
    """Old measurements lose their force by halves; after a quarter of an hour they were zero."""
    for sizes in ([10], [50] * 3, [150]):
        scheduler = make_scheduler(lanes=lanes)
        scheduler.measured(100, 0.01)
        submit(scheduler, make_entry(10), deadline=1.0)
        scheduler.record_batch(scheduler.next_batch(0.0), 0.01, 0.01)
        submit(scheduler, *map(make_entry, sizes), now=idle, deadline=idle + 1.0)
        answered: list[int] = []
        while len(scheduler):
            selection = scheduler.next_batch(idle, shares=lanes)
            assert selection.expired == []
            answered += costs(selection.batch)
        assert answered == sizes


def test_running_batches_count_for_a_deadline() -> None:
    scheduler = make_scheduler(lanes=2)
    scheduler.measured(100, 1.0)
    submit(scheduler, *[make_entry(100)] * 2)
    running = [scheduler.next_batch(0.0), scheduler.next_batch(0.2)]
    with pytest.raises(Overloaded):
        scheduler.admit([make_entry(100)], now=0.4, deadline=1.9)
    scheduler.withdraw(scheduler.admit([make_entry(100)], now=0.4, deadline=2.1))
    scheduler.record_batch(running[0], 1.0, 1.0)
    scheduler.admit([make_entry(100)], now=1.0, deadline=2.1)


def test_what_cannot_be_done_in_time_leaves_before_it_runs() -> None:
    scheduler = make_scheduler()
    scheduler.measured(100, 1.0)
    (late,) = submit(scheduler, make_entry(100), deadline=5.0)
    (good,) = submit(scheduler, make_entry(100), deadline=5.2)
    selection = scheduler.next_batch(4.1)
    assert selection.expired == [late]
    assert selection.batch == [good]


def test_a_batch_is_made_smaller_for_an_entry_that_would_miss_a_full_one() -> None:
    scheduler = make_scheduler()
    scheduler.measured(10, 0.1)
    scheduler.measured(100, 1.0)
    submit(scheduler, make_entry(20), deadline=3.0)
    submit_each(scheduler, *[20] * 5)
    selection = scheduler.next_batch(2.5)
    assert costs(selection.batch) == [20, 20]
    assert not selection.expired


def test_a_request_that_cannot_be_done_as_a_whole_is_not_begun() -> None:
    scheduler = make_scheduler()
    scheduler.measured(100, 1.0)
    whole = submit(scheduler, *[make_entry(100)] * 3, deadline=3.5)
    selection = scheduler.next_batch(1.0)
    assert selection.expired == whole
    assert not selection.batch


def test_an_engine_that_was_slow_once_tries_again() -> None:
    scheduler = make_scheduler()
    scheduler.measured(100, 0.1)
    submit(scheduler, make_entry(100))
    for _ in range(50):
        scheduler.measured(100, 50.0)
    scheduler.record_batch(scheduler.next_batch(0.0), 50.0, 50.0)
    with pytest.raises(DeadlineExceeded):
        scheduler.admit([make_entry(100)], now=50.0, deadline=51.0)
    later = scheduler.admit([make_entry(100)], now=60.0, deadline=61.0)
    (queued,) = queue(scheduler, later, [make_entry(100)])
    assert scheduler.next_batch(60.0).batch == [queued]


def test_promises_are_corrected_by_how_late_answers_were() -> None:
    scheduler = make_scheduler()
    scheduler.measured(100, 0.1)
    for at in range(200):
        (queued,) = submit(scheduler, make_entry(100), now=float(at), deadline=at + 0.3)
        selection = scheduler.next_batch(float(at))
        scheduler.record_batch(selection, 0.1, at + 0.1)
        # The event loop is busy: each answer comes 50 ms later than the device was done.
        scheduler.record_answer(queued.ticket, at + 0.15)
    submit(scheduler, make_entry(100), now=200.0)
    with pytest.raises(Overloaded):
        scheduler.admit([make_entry(100)], now=200.0, deadline=200.24)
    scheduler.admit([make_entry(100)], now=200.0, deadline=200.26)


def test_waiting_for_an_adapter_does_not_make_later_promises_longer() -> None:
    scheduler = make_scheduler()
    scheduler.measured(100, 0.1)
    submit(scheduler, make_entry(100))
    ticket = scheduler.admit([make_entry(100)], now=0.0, deadline=0.5)
    # Its adapter takes 20 s to load; the device then takes as long as promised.
    scheduler.postpone(ticket, 20.0)
    scheduler.record_answer(ticket, 20.2)
    submit(scheduler, make_entry(100))
    scheduler.admit([make_entry(100)], now=0.0, deadline=0.45)


def test_filling_a_batch_looks_at_few_of_thousands_of_waiting_entries() -> None:
    """Counted, not timed: the scan stops although thousands of entries do not fit."""
    scheduler = make_scheduler(max_batch_tokens=10, max_waiting_tokens=10**9)
    looks = count()

    class Watched(QueuedEntry[int]):
        def __getattribute__(self, name: str) -> object:
            if name == "entry":
                next(looks)
            return super().__getattribute__(name)

    submit(scheduler, make_entry(5))
    many = [make_entry(9)] * 5000
    ticket = scheduler.admit(many, now=0.0)
    scheduler.enqueue(ticket, [Watched(entry, 0, 0, ticket) for entry in many])
    before = next(looks)
    assert costs(scheduler.next_batch(0.0).batch) == [5]
    assert 0 < next(looks) - before <= 4 * MAX_PASSED_OVER


@pytest.mark.parametrize("loading", [0, 1, 7])
def test_a_text_whose_adapter_was_loaded_is_in_the_next_batch_before_all_that_came_meanwhile(
    loading: int,
) -> None:
    # 60 requests of 32 texts in flight, for adapters of which some are asked for far more often.
    scheduler = make_scheduler(max_batch_tokens=1000, max_adapters=99)
    random = np.random.default_rng(0)
    asked: list[Ticket[int]] = []

    def ask() -> None:
        entry = make_entry(3, name=f"n{int(random.zipf(1.5)) % 100}")
        asked.append(submit(scheduler, *[entry] * 32)[0].ticket)

    def run() -> list[str]:
        batch = scheduler.next_batch(0.0).batch
        for ticket in [ticket for ticket in asked if not ticket.left]:
            asked.remove(ticket)
            ask()
        return [queued.entry.adapter.name for queued in batch]

    for _ in range(60):
        ask()
    for _ in range(20):
        run()
    for number in range(10):
        # It is admitted, and then waits for its adapter while others run.
        entry = make_entry(3, name=f"cold{number}")
        ticket = scheduler.admit([entry], now=0.0)
        for _ in range(loading):
            assert entry.adapter.name not in run()
        queue(scheduler, ticket, [entry])
        assert entry.adapter.name in run()


def served(scheduler: Scheduler[int], batches: int) -> dict[str, int]:
    """Tokens by adapter in this many batches."""
    tokens: dict[str, int] = {}
    for _ in range(batches):
        for queued in scheduler.next_batch(0.0).batch:
            name = queued.entry.adapter.name
            tokens[name] = tokens.get(name, 0) + queued.entry.cost
    return tokens
