"""Random use of a scheduler, with a fake clock, compared with plain bookkeeping."""

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from service.engine.scheduler import MAX_OVERTAKEN, QueuedEntry
from service.errors import Overloaded, TooLarge
from tests.support.scheduler_builders import costs, enqueue, make_entry, make_scheduler


class Life(RuleBasedStateMachine):
    """Arrivals, cancellations, deadlines and batches in random order."""

    @initialize(
        budget=st.integers(1, 50), waiting_limit=st.integers(1, 300), adapters=st.integers(1, 3)
    )
    def begin(self, budget: int, waiting_limit: int, adapters: int) -> None:
        self.budget, self.limit, self.adapters = budget, waiting_limit, adapters
        self.scheduler = make_scheduler(
            max_batch_tokens=budget, max_waiting_tokens=waiting_limit, max_adapters=adapters
        )
        self.now = 0.0
        self.queued: list[QueuedEntry[int]] = []
        self.reserved: list[int] = []
        self.passed_by: dict[QueuedEntry[int], int] = {}

    def tokens(self) -> int:
        return sum(costs(self.queued)) + sum(self.reserved)

    @rule(
        entries=st.lists(
            st.tuples(st.integers(1, 60), st.sampled_from("abcd"), st.none() | st.floats(0.0, 5.0)),
            min_size=1,
            max_size=6,
        ),
        at_once=st.booleans(),
    )
    def arrive(self, entries: list[tuple[int, str, float | None]], at_once: bool) -> None:
        arriving = [
            make_entry(
                cost,
                name=name,
                since=self.now,
                deadline=None if patience is None else self.now + patience,
            )
            for cost, name, patience in entries
        ]
        tokens = sum(costs(arriving))
        try:
            self.scheduler.admit(tokens)
        except TooLarge:
            assert tokens > self.limit
            return
        except Overloaded:
            assert self.tokens() + tokens > self.limit
            return
        assert self.tokens() + tokens <= self.limit
        if at_once:
            self.scheduler.enqueue(arriving)
            self.queued += arriving
            self.passed_by |= dict.fromkeys(arriving, 0)
        else:
            self.reserved.append(tokens)

    @precondition(lambda self: self.reserved)
    @rule()
    def give_up_before_queueing(self) -> None:
        self.scheduler.withdraw(self.reserved.pop())

    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        chosen = data.draw(
            st.lists(st.sampled_from(self.queued), unique_by=id) if self.queued else st.just([])
        )
        assert self.scheduler.drop(chosen) == len(chosen)
        self.queued = [queued for queued in self.queued if queued not in chosen]

    @rule(seconds=st.floats(0.0, 3.0))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def run(self) -> None:
        selection = self.scheduler.next_batch(self.now)
        batch, expired = selection.batch, selection.expired
        taken = batch + expired
        assert all(queued in self.queued for queued in taken)
        assert len(set(taken)) == len(taken)
        assert all(
            queued.deadline is not None and queued.deadline <= self.now for queued in expired
        )
        assert all(queued.deadline is None or queued.deadline > self.now for queued in batch)
        assert len(batch) == 1 or sum(costs(batch)) <= self.budget
        assert len({queued.entry.adapter for queued in batch}) <= self.adapters
        # In order of arrival, and the oldest entry that has not expired is in the batch.
        alive = [queued for queued in self.queued if queued not in expired]
        assert batch == [queued for queued in alive if queued in batch]
        assert batch[:1] == alive[:1]
        if batch:
            for queued in alive[: alive.index(batch[-1])]:
                self.passed_by[queued] += queued not in batch
                assert self.passed_by[queued] <= MAX_OVERTAKEN
        self.queued = [queued for queued in self.queued if queued not in taken]

    @rule()
    def run_to_the_end(self) -> None:
        for _ in range(len(self.queued)):
            self.run()
        assert not self.queued

    @invariant()
    def counts_agree(self) -> None:
        if hasattr(self, "scheduler"):
            assert len(self.scheduler) == len(self.queued)
            assert self.scheduler.waiting_tokens == self.tokens() <= self.limit


TestLife = Life.TestCase
TestLife.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


@given(
    sizes=st.lists(st.integers(1, 120), min_size=1, max_size=60),
    budget=st.integers(1, 100),
)
@settings(max_examples=200, deadline=None)
def test_every_entry_is_run_exactly_once(sizes: list[int], budget: int) -> None:
    scheduler = make_scheduler(max_batch_tokens=budget)
    entries = [make_entry(size) for size in sizes]
    enqueue(scheduler, *entries)
    ran: list[QueuedEntry[int]] = []
    for _ in entries:
        ran += scheduler.next_batch(0.0).batch
    assert len(ran) == len(entries)
    assert set(ran) == set(entries)
    assert scheduler.waiting_tokens == 0
