"""Random lives of a scheduler, by a fake clock, against plain bookkeeping."""

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from service.engine.scheduler import MAX_OVERTAKEN, Waiting
from service.errors import Overloaded, TooLarge
from tests.support.scheduler_builders import costs, queue, scheduler, waiting


class Life(RuleBasedStateMachine):
    """Random arrivals, cancellations, deadlines and batches, checked against plain bookkeeping."""

    @initialize(
        budget=st.integers(1, 50), waiting_limit=st.integers(1, 300), adapters=st.integers(1, 3)
    )
    def begin(self, budget: int, waiting_limit: int, adapters: int) -> None:
        self.budget, self.limit, self.adapters = budget, waiting_limit, adapters
        self.target = scheduler(
            max_batch_tokens=budget, max_waiting_tokens=waiting_limit, max_adapters=adapters
        )
        self.now = 0.0
        self.queued: list[Waiting[int]] = []
        self.reserved: list[int] = []
        self.passed_by: dict[Waiting[int], int] = {}

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
        made = [
            waiting(
                cost,
                name=name,
                since=self.now,
                deadline=None if patience is None else self.now + patience,
            )
            for cost, name, patience in entries
        ]
        tokens = sum(costs(made))
        try:
            self.target.admit(tokens)
        except TooLarge:
            assert tokens > self.limit
            return
        except Overloaded:
            assert self.tokens() + tokens > self.limit
            return
        assert self.tokens() + tokens <= self.limit
        if at_once:
            self.target.enqueue(made)
            self.queued += made
            self.passed_by |= dict.fromkeys(made, 0)
        else:
            self.reserved.append(tokens)

    @precondition(lambda self: self.reserved)
    @rule()
    def give_up_before_queueing(self) -> None:
        self.target.withdraw(self.reserved.pop())

    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        chosen = data.draw(
            st.lists(st.sampled_from(self.queued), unique_by=id) if self.queued else st.just([])
        )
        assert self.target.drop(chosen) == len(chosen)
        self.queued = [item for item in self.queued if item not in chosen]

    @rule(seconds=st.floats(0.0, 3.0))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def run(self) -> None:
        selection = self.target.next_batch(self.now)
        batch, expired = selection.batch, selection.expired
        taken = batch + expired
        assert all(item in self.queued for item in taken)
        assert len(set(taken)) == len(taken)
        assert all(item.deadline is not None and item.deadline <= self.now for item in expired)
        assert all(item.deadline is None or item.deadline > self.now for item in batch)
        assert len(batch) == 1 or sum(costs(batch)) <= self.budget
        assert len({item.entry.adapter for item in batch}) <= self.adapters
        # In order of arrival, and the oldest that is not late is always in it.
        alive = [item for item in self.queued if item not in expired]
        assert batch == [item for item in alive if item in batch]
        assert batch[:1] == alive[:1]
        if batch:
            for item in alive[: alive.index(batch[-1])]:
                self.passed_by[item] += item not in batch
                assert self.passed_by[item] <= MAX_OVERTAKEN
        self.queued = [item for item in self.queued if item not in taken]

    @rule()
    def run_to_the_end(self) -> None:
        for _ in range(len(self.queued)):
            self.run()
        assert not self.queued

    @invariant()
    def counts_agree(self) -> None:
        if hasattr(self, "target"):
            assert len(self.target) == len(self.queued)
            assert self.target.waiting_tokens == self.tokens() <= self.limit


TestLife = Life.TestCase
TestLife.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


@given(
    sizes=st.lists(st.integers(1, 120), min_size=1, max_size=60),
    budget=st.integers(1, 100),
)
@settings(max_examples=200, deadline=None)
def test_every_entry_is_run_exactly_once(sizes: list[int], budget: int) -> None:
    target = scheduler(max_batch_tokens=budget)
    entries = [waiting(size) for size in sizes]
    queue(target, *entries)
    ran: list[Waiting[int]] = []
    for _ in entries:
        ran += target.next_batch(0.0).batch
    assert len(ran) == len(entries)
    assert set(ran) == set(entries)
    assert target.waiting_tokens == 0
