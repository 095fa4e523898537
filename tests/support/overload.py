"""A device and its clients under any load, on a clock of their own: no threads, no waiting.

The scheduler is the real one. Only the device is simulated: a batch takes a fixed time and a time
for each token, with noise, and its answers reach the clients a little later.
"""

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import count
from typing import Any

from service.engine.scheduler import QueuedEntry, Scheduler, Selection
from service.errors import DeadlineExceeded, Overloaded
from tests.support.scheduler_builders import make_entry, make_scheduler


@dataclass(frozen=True)
class SimulatedDevice:
    """Seconds of a batch on one of its lanes: fixed + per_token * tokens, noise on top.

    noise: a batch takes up to this share longer or shorter. hiccup: one batch in fifty takes this
    many times longer.
    """

    lanes: int = 2
    budget: int = 2048
    fixed: float = 0.005
    per_token: float = 1e-4
    noise: float = 0.2
    hiccup: float = 1.0
    answering: float = 0.005

    def seconds(self, tokens: int, chance: random.Random) -> float:
        spread = 1 + chance.uniform(-self.noise, self.noise)
        hiccup = self.hiccup if chance.random() < 0.02 else 1.0
        return (self.fixed + self.per_token * tokens) * spread * hiccup

    @property
    def seconds_of_a_full_batch(self) -> float:
        return self.fixed + self.per_token * self.budget

    @property
    def rate(self) -> float:
        """Tokens per second in full batches."""
        return self.lanes * self.budget / self.seconds_of_a_full_batch


@dataclass(frozen=True)
class Traffic:
    """Requests that arrive at random. load: as a multiple of the device's rate.

    texts, tokens: of a request and of each of its texts, drawn from these. adapters: one is drawn
    for each request.
    """

    load: float
    timeouts: Sequence[float | None] = (1.0,)
    texts: Sequence[int] = (1,)
    tokens: Sequence[int] = (20, 40, 60)
    adapters: Sequence[str] = ("a", "b", "c", "d")
    client: str = ""
    weight: float = 1.0
    begins: float = 0.0
    ends: float = float("inf")


@dataclass
class Tally:
    """What became of the requests of one kind. tokens: of texts answered in time."""

    offered: int = 0
    offered_tokens: int = 0
    good: int = 0
    tokens: int = 0
    refused: int = 0
    expired: int = 0
    late: int = 0
    slowest: float = 0.0


@dataclass
class Outcome:
    """goodput: tokens answered in time, as a share of what this device could have run in full
    batches, or of what was offered, if that was less. by: tallies by client, adapter and timeout.
    wasted: tokens that were run for requests that then were late."""

    goodput: float = 0.0
    wasted: int = 0
    batches: int = 0
    mean_tokens: float = 0.0
    by: dict[tuple[str, str, float | None], Tally] = field(
        default_factory=lambda: defaultdict(Tally)
    )

    def total(self, **chosen: Any) -> Tally:
        """The sum of the tallies with this client, adapter or timeout."""
        total = Tally()
        for (client, adapter, timeout), tally in self.by.items():
            if (
                chosen.get("client", client) == client
                and chosen.get("adapter", adapter) == adapter
                and chosen.get("timeout", timeout) == timeout
            ):
                for name, value in vars(tally).items():
                    own = getattr(total, name)
                    setattr(total, name, max(own, value) if name == "slowest" else own + value)
        return total


@dataclass(eq=False)
class _Sent:
    """A request on its way. left: texts without an answer."""

    tally: Tally
    at: float
    deadline: float | None
    tokens: int
    left: int
    ran: int = 0
    failed: bool = False


def simulate(
    device: SimulatedDevice,
    traffic: Sequence[Traffic],
    *,
    seconds: float = 30.0,
    settle: float = 3.0,
    seed: int = 1,
    measured: bool = True,
    **settings: Any,
) -> Outcome:
    """Run traffic against a scheduler; what begins before `settle` is not counted.

    Args:
        measured: whether the scheduler has seen a warm-up.
        settings: of `make_scheduler`.
    """
    chance = random.Random(seed)
    scheduler: Scheduler[Any] = make_scheduler(
        max_batch_tokens=device.budget,
        lanes=device.lanes,
        **({"max_waiting_tokens": None, "max_adapters": 256} | settings),
    )
    if measured:
        for tokens in (40, device.budget // 4):
            scheduler.measured(tokens, device.fixed + device.per_token * tokens)
    outcome = Outcome()
    order = count()
    # (time, order, what, value): events of the simulation.
    events: list[tuple[float, int, str, Any]] = []
    idle, good_tokens, ran_tokens = list(range(device.lanes)), 0, 0
    # Seconds of all batches, with and without noise.
    spent = [1e-9, 1e-9]
    for kind in traffic:
        heappush(events, (kind.begins, next(order), "arrive", kind))

    def run(now: float) -> None:
        nonlocal ran_tokens
        while idle:
            selection = scheduler.next_batch(now, shares=len(idle))
            if not selection:
                return
            finish_expired(selection)
            if selection.batch:
                lane = idle.pop()
                took = device.seconds(selection.tokens, chance)
                spent[0] += took
                spent[1] += device.fixed + device.per_token * selection.tokens
                outcome.batches += 1
                ran_tokens += selection.tokens
                heappush(events, (now + took, next(order), "done", (lane, selection, took)))

    def finish_expired(selection: Selection[Any]) -> None:
        for queued in selection.expired:
            fail(queued.request, "expired")
            queued.request.left -= 1

    def fail(sent: _Sent, how: str) -> None:
        if not sent.failed:
            sent.failed = True
            setattr(sent.tally, how, getattr(sent.tally, how) + 1)
            outcome.wasted += sent.ran

    def arrive(kind: Traffic, now: float) -> None:
        texts = [chance.choice(kind.tokens) for _ in range(chance.choice(kind.texts))]
        mean = sum(kind.tokens) / len(kind.tokens) * sum(kind.texts) / len(kind.texts)
        pause = chance.expovariate(kind.load * device.rate / mean)
        if now + pause < min(kind.ends, seconds):
            heappush(events, (now + pause, next(order), "arrive", kind))
        adapter, timeout = chance.choice(kind.adapters), chance.choice(kind.timeouts)
        counted = now >= settle
        tally = outcome.by[kind.client, adapter, timeout] if counted else Tally()
        tally.offered += 1
        tally.offered_tokens += sum(texts)
        entries = [make_entry(tokens, name=adapter) for tokens in texts]
        deadline = None if timeout is None else now + timeout
        sent = _Sent(tally, now, deadline, sum(texts), len(texts))
        try:
            ticket = scheduler.admit(
                entries, now=now, deadline=deadline, client=kind.client, weight=kind.weight
            )
        except (Overloaded, DeadlineExceeded):
            tally.refused += 1
            return
        scheduler.enqueue(
            ticket, [QueuedEntry(entry, sent, i, ticket) for i, entry in enumerate(entries)]
        )

    def done(lane: int, selection: Selection[Any], took: float, now: float) -> None:
        nonlocal good_tokens
        idle.append(lane)
        scheduler.record_batch(selection, took, now)
        answered = now + device.answering * chance.uniform(0.5, 1.5)
        for queued in selection.batch:
            sent: _Sent = queued.request
            sent.left -= 1
            sent.ran += queued.entry.cost
            if sent.failed:
                outcome.wasted += queued.entry.cost
            elif sent.left == 0:
                scheduler.record_answer(queued.ticket, answered)
                sent.tally.slowest = max(sent.tally.slowest, answered - sent.at)
                if sent.deadline is not None and answered > sent.deadline:
                    fail(sent, "late")
                else:
                    sent.tally.good += 1
                    sent.tally.tokens += sent.tokens
                    if now >= settle:
                        good_tokens += sent.tokens

    while events:
        now, _, what, value = heappop(events)
        if now > seconds:
            break
        if what == "arrive":
            arrive(value, now)
        else:
            lane, selection, took = value
            done(lane, selection, took, now)
        run(now)
    capacity = device.rate * (seconds - settle) * spent[1] / spent[0]
    outcome.goodput = good_tokens / min(capacity, outcome.total().offered_tokens)
    outcome.mean_tokens = ran_tokens / max(1, outcome.batches)
    return outcome
