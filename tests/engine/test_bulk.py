"""Bulk in the scheduler: a smaller share, and short batches beside other requests."""

from service.engine.pace import Pace
from service.engine.scheduler import BULK_WEIGHT
from tests.support.scheduler_builders import make_entry, make_scheduler, submit


def test_bulk_alone_fills_batches() -> None:
    scheduler = make_scheduler(max_batch_tokens=1000)
    scheduler.measured(100, 0.1)
    scheduler.measured(1000, 1.0)
    submit(scheduler, *[make_entry(10)] * 200, now=100.0, bulk=True)
    assert scheduler.next_batch(100.0).tokens == 1000


def test_beside_other_requests_bulk_makes_no_batch_longer_than_is_efficient() -> None:
    scheduler = make_scheduler(max_batch_tokens=1000)
    # As fast in batches of 125 as in full ones.
    scheduler.measured(125, 0.125)
    scheduler.measured(1000, 1.0)
    submit(scheduler, *[make_entry(10)] * 200, now=100.0, bulk=True)
    (asked,) = submit(scheduler, make_entry(10), now=100.0)
    first = scheduler.next_batch(100.0)
    assert asked in first.batch
    assert first.tokens <= 130
    assert scheduler.next_batch(101.0).tokens <= 130
    # Nobody has asked for a while.
    assert scheduler.next_batch(120.0).tokens == 1000


def test_requests_fill_a_batch_in_which_bulk_has_no_more_room() -> None:
    scheduler = make_scheduler(max_batch_tokens=1000)
    scheduler.measured(125, 0.125)
    scheduler.measured(1000, 1.0)
    submit(scheduler, *[make_entry(10)] * 200, now=0.0, bulk=True)
    asked = submit(scheduler, *[make_entry(10)] * 90, now=0.0)
    batch = scheduler.next_batch(0.0)
    assert set(asked) <= set(batch.batch)
    assert 900 < batch.tokens <= 1000


def test_bulk_has_its_share_while_others_have_as_much_to_do() -> None:
    scheduler = make_scheduler(max_batch_tokens=100, max_waiting_tokens=10**6)
    bulk = set(submit(scheduler, *[make_entry(10)] * 1000, now=0.0, bulk=True, client="x"))
    submit(scheduler, *[make_entry(10)] * 1000, now=0.0, client="x")
    taken = [queued for _ in range(50) for queued in scheduler.next_batch(0.0).batch]
    share = sum(queued in bulk for queued in taken) / len(taken)
    assert abs(share - BULK_WEIGHT / (1 + BULK_WEIGHT)) < 0.03


def test_bulk_does_not_make_timeouts_long() -> None:
    """Batches are as short as the shortest timeout asks, whatever a job allows."""
    scheduler = make_scheduler(max_batch_tokens=1000, max_waiting_tokens=10**6)
    scheduler.measured(250, 0.25)
    scheduler.measured(1000, 1.0)
    submit(scheduler, make_entry(10), now=0.0, deadline=1.0)
    scheduler.next_batch(0.0)
    for _ in range(1000):
        submit(scheduler, make_entry(1), now=0.0, deadline=600.0, bulk=True)
    submit(scheduler, *[make_entry(10)] * 100, now=0.0)
    assert scheduler.next_batch(0.0).tokens <= 400


def test_an_entry_larger_than_bulk_may_be_is_run_alone() -> None:
    scheduler = make_scheduler(max_batch_tokens=1000)
    scheduler.measured(125, 0.125)
    scheduler.measured(1000, 1.0)
    submit(scheduler, make_entry(300), make_entry(300), now=0.0, bulk=True)
    submit(scheduler, make_entry(10), now=0.0)
    sizes = [len(scheduler.next_batch(0.0).batch) for _ in range(4)]
    assert sum(sizes) == 3
    assert not scheduler.next_batch(0.0)


def test_the_least_efficient_batch_is_full_where_small_ones_are_slow() -> None:
    pace = Pace()
    assert pace.least_efficient(0.9, 1000) == 1000
    pace.record(10, 0.01)
    pace.record(1000, 0.011)
    assert pace.least_efficient(0.9, 1000) == 1000
    fast = Pace()
    fast.record(100, 0.1)
    fast.record(1000, 1.0)
    assert fast.least_efficient(0.9, 1000) == 125
