"""Random use of a scheduler, with a fake clock, compared with plain bookkeeping."""

import random
from contextlib import suppress
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from service.engine.flows import Flows
from service.engine.interface import Entry
from service.engine.load import urgency_of
from service.engine.scheduler import MAX_OVERTAKEN, QueuedEntry, Scheduler, Selection, Ticket
from service.errors import DeadlineExceeded, Overloaded, TooLarge
from tests.support.scheduler_builders import (
    costs,
    make_entry,
    make_scheduler,
    queue,
    submit,
    submit_each,
)

WEIGHTS = {"": 1.0, "slow": 0.5, "fast": 4.0}


@dataclass(eq=False)
class Admitted:
    """A request that was admitted. queued: its entries that wait; None: they are not queued yet."""

    client: str
    ticket: Ticket[int]
    entries: list[Entry]
    queued: list[QueuedEntry[int]] | None = None

    @property
    def tokens(self) -> int:
        if self.queued is None:
            return sum(entry.cost for entry in self.entries)
        return sum(costs(self.queued))


class Life(RuleBasedStateMachine):
    """Arrivals, cancellations, deadlines and batches in random order, on one or more lanes."""

    scheduler: Scheduler[int]

    @initialize(
        budget=st.integers(1, 50),
        limit=st.none() | st.integers(1, 300),
        adapters=st.integers(1, 3),
        lanes=st.integers(1, 3),
        seconds=st.none() | st.floats(0.01, 2.0),
    )
    def begin(
        self, budget: int, limit: int | None, adapters: int, lanes: int, seconds: float | None
    ) -> None:
        self.budget, self.limit, self.adapters, self.lanes = budget, limit, adapters, lanes
        self.scheduler = make_scheduler(
            max_batch_tokens=budget,
            max_waiting_tokens=limit,
            max_adapters=adapters,
            lanes=lanes,
            adapter_weights={"b": 3.0},
        )
        self.measured = seconds is not None
        if seconds is not None:
            self.scheduler.measured(budget, seconds)
        self.now = 0.0
        self.admitted: list[Admitted] = []
        self.running: list[Selection[int]] = []

    def queued(self) -> list[QueuedEntry[int]]:
        return [queued for request in self.admitted for queued in request.queued or ()]

    @rule(
        entries=st.lists(
            st.tuples(st.integers(1, 60), st.sampled_from("abcd")), min_size=1, max_size=6
        ),
        patience=st.none() | st.floats(0.0, 5.0),
        client=st.sampled_from(sorted(WEIGHTS)),
        at_once=st.booleans(),
    )
    def arrive(
        self, entries: list[tuple[int, str]], patience: float | None, client: str, at_once: bool
    ) -> None:
        arriving = [make_entry(cost, name=name) for cost, name in entries]
        tokens, waiting = sum(cost for cost, _ in entries), self.scheduler.waiting_tokens
        try:
            ticket = self.scheduler.admit(
                arriving,
                now=self.now,
                deadline=None if patience is None else self.now + patience,
                client=client,
                weight=WEIGHTS[client],
            )
        except TooLarge:
            assert self.limit is not None
            assert tokens > self.limit
            return
        except DeadlineExceeded:
            assert patience is not None
            assert self.measured
            return
        except Overloaded as refusal:
            # An engine with nothing to do refuses nothing.
            assert waiting or self.running
            if refusal.reason == "deadline":
                assert patience is not None
                assert self.measured
            else:
                assert waiting + tokens > self.scheduler.limit
            return
        request = Admitted(client, ticket, arriving)
        self.admitted.append(request)
        if at_once:
            request.queued = queue(self.scheduler, ticket, arriving)

    @precondition(lambda self: any(request.queued is None for request in self.admitted))
    @rule(data=st.data())
    def enqueue_later(self, data: st.DataObject) -> None:
        waiting = [request for request in self.admitted if request.queued is None]
        request = data.draw(st.sampled_from(waiting))
        request.queued = queue(self.scheduler, request.ticket, request.entries)
        # A flow's entries are taken in the order in which they were queued.
        self.admitted.remove(request)
        self.admitted.append(request)

    @precondition(lambda self: self.admitted)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(self.admitted))
        expected = len(request.queued) if request.queued is not None else 0
        assert self.scheduler.withdraw(request.ticket) == expected
        assert self.scheduler.withdraw(request.ticket) == 0
        self.admitted.remove(request)

    @rule(seconds=st.floats(0.0, 3.0))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @precondition(lambda self: len(self.running) < self.lanes)
    @rule()
    def run(self) -> None:
        before = self.queued()
        overtaken = {queued: queued.overtaken for queued in before}
        selection = self.scheduler.next_batch(
            self.now, shares=self.lanes - len(self.running) if before else 1
        )
        batch, expired = selection.batch, selection.expired
        taken = batch + expired
        assert all(queued in overtaken for queued in taken)
        assert len(set(taken)) == len(taken)
        assert bool(taken) == bool(before)
        self.check_batch(selection)
        self.check_expired(selection, before)
        self.check_order(batch, before, expired)
        for queued in before:
            assert queued.overtaken - overtaken[queued] <= 1
            assert queued.overtaken <= MAX_OVERTAKEN
        for request in self.admitted:
            if request.queued:
                request.queued = [queued for queued in request.queued if queued not in taken]
        if batch:
            self.running.append(selection)

    def check_batch(self, selection: Selection[int]) -> None:
        batch = selection.batch
        assert selection.tokens == sum(costs(batch))
        assert len(batch) <= 1 or selection.tokens <= self.budget
        assert len({queued.entry.adapter for queued in batch}) <= self.adapters
        for queued in batch:
            deadline = queued.ticket.deadline
            assert deadline is None or deadline > self.now

    def check_expired(self, selection: Selection[int], before: list[QueuedEntry[int]]) -> None:
        """A request is given up as a whole, and only if it has a deadline that cannot be kept."""
        given_up = {id(queued.ticket) for queued in selection.expired}
        for queued in before:
            if id(queued.ticket) in given_up:
                assert queued in selection.expired or queued in selection.batch
        for queued in selection.expired:
            deadline = queued.ticket.deadline
            assert deadline is not None
            assert self.measured or deadline <= self.now

    def check_order(
        self,
        batch: list[QueuedEntry[int]],
        before: list[QueuedEntry[int]],
        expired: list[QueuedEntry[int]],
    ) -> None:
        """In a flow, whatever was passed over did not fit: it was larger, or its adapter one too
        many. The first entry of the batch was the first of its flow."""
        by_flow: dict[tuple[str, str, int], list[QueuedEntry[int]]] = {}
        clients = {id(request.ticket): request.client for request in self.admitted}
        for queued in before:
            ticket = queued.ticket
            patience = None if ticket.deadline is None else ticket.deadline - ticket.since
            names = {item.entry.adapter.name for item in ticket.queued}
            # Requests that name several adapters are one flow.
            adapter = names.pop() if len(names) == 1 else ""
            key = (clients[id(ticket)], adapter, urgency_of(patience))
            if queued not in expired:
                by_flow.setdefault(key, []).append(queued)
        if batch:
            firsts = [flow[0] for flow in by_flow.values()]
            assert batch[0] in firsts
        active = {queued.entry.adapter for queued in batch}
        for flow in by_flow.values():
            order = [queued for queued in batch if queued in flow]
            passed = [flow[: flow.index(queued)] for queued in order]
            for queued, earlier in zip(order, passed, strict=True):
                for other in earlier:
                    larger = other.entry.cost > queued.entry.cost
                    one_too_many = len(active) == self.adapters and (
                        other.entry.adapter not in active
                    )
                    assert other in batch or larger or one_too_many

    @precondition(lambda self: self.running)
    @rule(data=st.data(), factor=st.floats(0.1, 10.0))
    def end(self, data: st.DataObject, factor: float) -> None:
        selection = data.draw(st.sampled_from(self.running))
        self.running.remove(selection)
        seconds = factor * selection.tokens / self.budget
        self.scheduler.record_batch(selection, seconds, self.now)
        self.measured = True
        for queued in selection.batch:
            self.scheduler.record_answer(queued.ticket, self.now)

    @rule()
    def run_to_the_end(self) -> None:
        """Every batch has something of what waits, so all of it gets its turn."""
        for selection in self.running:
            self.scheduler.record_batch(selection, 0.1, self.now)
            self.measured = True
        self.running = []
        for _ in range(len(self.queued())):
            self.run()
            for selection in self.running:
                self.scheduler.record_batch(selection, 0.1, self.now)
                self.measured = True
            self.running = []
        assert not self.queued()

    @invariant()
    def counts_agree(self) -> None:
        if hasattr(self, "scheduler"):
            assert len(self.scheduler) == len(self.queued())
            assert self.scheduler.waiting_tokens == sum(item.tokens for item in self.admitted)
            if self.limit is not None:
                # Flows below their share may add to a full queue, together once as much again.
                assert self.scheduler.waiting_tokens <= 2 * self.limit

    @invariant()
    def the_load_can_be_told(self) -> None:
        if hasattr(self, "scheduler"):
            load = self.scheduler.load(self.now)
            assert len(load.waits) <= 64
            assert all(seconds >= 0 for seconds, _ in load.waits.values())


TestLife = Life.TestCase
TestLife.settings = settings(max_examples=50, stateful_step_count=30, deadline=None)


@given(
    sizes=st.lists(st.tuples(st.integers(1, 120), st.sampled_from("abc")), min_size=1, max_size=60),
    budget=st.integers(1, 100),
)
@settings(max_examples=200, deadline=None)
def test_every_entry_is_run_exactly_once(sizes: list[tuple[int, str]], budget: int) -> None:
    scheduler = make_scheduler(max_batch_tokens=budget)
    entries = [submit(scheduler, make_entry(size, name=name))[0] for size, name in sizes]
    ran: list[QueuedEntry[int]] = []
    for _ in entries:
        ran += scheduler.next_batch(0.0).batch
    assert len(ran) == len(entries)
    assert set(ran) == set(entries)
    assert scheduler.waiting_tokens == 0


@given(
    flood=st.integers(1, 100),
    own=st.integers(1, 100),
    urgencies=st.tuples(st.none() | st.floats(20, 30), st.none() | st.floats(20, 30)),
    same_adapter=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_no_entry_waits_for_more_than_its_share_of_an_endless_flood(
    flood: int, own: int, urgencies: tuple[float | None, float | None], same_adapter: bool
) -> None:
    scheduler = make_scheduler(max_waiting_tokens=10**6)
    submit_each(scheduler, *[flood] * 100, client="flooder", deadline=urgencies[0])
    (victim,) = submit(
        scheduler,
        make_entry(own, name="a" if same_adapter else "b"),
        client="victim",
        deadline=urgencies[1],
    )
    for _ in range(4):
        submit_each(scheduler, *[flood] * 100, client="flooder", deadline=urgencies[0])
        scheduler.next_batch(0.0)
        if not victim.waits:
            break
    assert not victim.waits


@pytest.mark.parametrize("seed", range(20))
def test_a_flow_that_is_alone_is_served_as_entry_by_entry(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(seed)
    steps = [
        (
            rng.choice(("first", "first", "first", "second")),
            [
                make_entry(rng.randint(1, 60), name=rng.choice("abcde"))
                for _ in range(rng.randint(1, 9))
            ],
            rng.choice((None, 1.5, 4.0)),
            rng.random() < 0.1,
            rng.randint(0, 2),
        )
        for _ in range(150)
    ]

    def taken() -> list[tuple[list[int], list[int], float]]:
        scheduler = make_scheduler(max_batch_tokens=150, max_waiting_tokens=5000, max_adapters=4)
        scheduler.measured(150, 0.1)
        places: dict[QueuedEntry[int], int] = {}
        batches, now = [], 0.0
        for client, entries, timeout, bulk, takes in steps:
            deadline = None if timeout is None else now + timeout
            with suppress(Overloaded, DeadlineExceeded):
                for queued in submit(
                    scheduler, *entries, now=now, client=client, deadline=deadline, bulk=bulk
                ):
                    places[queued] = len(places)
            for _ in range(takes):
                selection = scheduler.next_batch(now)
                now += 0.1
                scheduler.record_batch(selection, 0.1, now)
                order = [places[queued] for queued in selection.batch]
                expired = [places[queued] for queued in selection.expired]
                batches.append((order, expired, float(scheduler.waiting_tokens)))
        return batches

    quickly = taken()
    monkeypatch.setattr(Flows, "is_alone", lambda *_: False)
    assert quickly == taken()
    assert any(len(order) > 2 for order, _, _ in quickly)
