"""Which of a worker's engines takes a request, and what happens if it refuses or dies."""

import asyncio
from collections.abc import Callable, Sequence
from time import monotonic

import numpy as np
import pytest

from adapters.tokenizer import Encoding
from service.engine.interface import AdapterKey, Completion, Entry
from service.engine.load import Load
from service.errors import EngineUnavailable, Overloaded
from service.ipc.least_loaded import LeastLoaded
from service.ipc.remote import RemoteEngine, Requests
from tests.support.ipc_harness import Failures

RATE = 1_000_000.0


class Engine(RemoteEngine):
    """Counts what it is asked, in place of the socket; answers once `held` is set."""

    def __init__(self) -> None:
        # Only `predict` uses the requests.
        super().__init__(Requests.__new__(Requests))
        self.tokens = 0
        self.asked: list[bool] = []
        self.usable = True
        self.error: Exception | None = None
        self.held = asyncio.Event()
        self.held.set()

    async def predict(
        self,
        entries: Sequence[Entry],
        *,
        deadline: float | None = None,  # noqa: ARG002
        client: str = "",  # noqa: ARG002
        weight: float = 1.0,  # noqa: ARG002
        bulk: bool = False,
        elsewhere: bool = False,
    ) -> Completion:
        tokens = sum(entry.cost for entry in entries)
        self.tokens += tokens
        if not bulk:
            self._sent_tokens += tokens
        self.asked.append(elsewhere)
        await self.held.wait()
        if self.error is not None:
            raise self.error
        return Completion((), 0.0, 0.0)

    def reports(self, wait: float, *, workers: int = 1, limit: int = 100) -> None:
        self.set_load(Load(monotonic(), limit, RATE, 0.0, {}, wait), workers)


def choice_of(*engines: Engine, failures: Failures | None = None) -> LeastLoaded:
    def usable(engine: Engine) -> Callable[[], bool]:
        return lambda: engine.usable

    pairs = [(engine, usable(engine)) for engine in engines]
    return LeastLoaded(pairs, failures or Failures())


def entry(tokens: int = 1000) -> Entry:
    ids = np.zeros(4, dtype=np.int64)
    return Entry(AdapterKey("a", "0" * 64), Encoding(ids, ids, False), tokens)


async def test_idle_engines_take_turns() -> None:
    engines = [Engine(), Engine(), Engine()]
    chosen = choice_of(*engines)
    for _ in range(30):
        await chosen.predict([entry()])
    assert [len(engine.asked) for engine in engines] == [10, 10, 10]


async def test_an_engine_that_is_busy_is_left_alone_until_the_others_are_as_busy() -> None:
    busy, idle = Engine(), Engine()
    chosen = choice_of(busy, idle)
    busy.reports(0.1)
    idle.reports(0.0)
    for _ in range(300):
        await chosen.predict([entry()])
    # A tenth of a second is a hundred thousand tokens.
    assert idle.tokens - busy.tokens == pytest.approx(100_000, abs=10_000)


async def test_many_workers_with_one_report_do_not_all_choose_the_same_engine() -> None:
    """Between two reports none sees what the others send."""
    workers = 8
    busy, idle = 0, 0
    for _ in range(workers):
        first, second = Engine(), Engine()
        first.reports(0.01, workers=workers)
        second.reports(0.0, workers=workers)
        chosen = choice_of(first, second)
        for _ in range(10):
            await chosen.predict([entry()])
        busy += first.tokens
        idle += second.tokens
    assert busy + idle == workers * 10_000
    # Ten milliseconds are ten thousand tokens; each may err by one request.
    assert 0 < idle - busy < 10_000 + workers * 2_000


async def test_what_is_in_flight_counts_without_a_report() -> None:
    slow, quick = Engine(), Engine()
    chosen = choice_of(slow, quick)
    slow.held.clear()
    waiting = [asyncio.create_task(chosen.predict([entry()])) for _ in range(2)]
    await asyncio.sleep(0)
    for _ in range(10):
        await chosen.predict([entry(10)])
    assert (len(slow.asked), len(quick.asked)) == (1, 11)
    slow.held.set()
    await asyncio.gather(*waiting)


async def test_bulk_does_not_keep_other_requests_away() -> None:
    one, other = Engine(), Engine()
    chosen = choice_of(one, other)
    one.held.clear()
    other.held.clear()
    portions = [asyncio.create_task(chosen.predict([entry()], bulk=True)) for _ in range(4)]
    await asyncio.sleep(0)
    assert (one.tokens, other.tokens) == (2000, 2000), "portions go to all devices"
    one.held.set()
    other.held.set()
    await asyncio.gather(*portions)


async def test_a_request_is_refused_only_if_all_engines_refuse_it() -> None:
    failures = Failures()
    one, other = Engine(), Engine()
    chosen = choice_of(one, other, failures=failures)
    one.error = Overloaded("full", retry_after=3.0)
    for _ in range(4):
        await chosen.predict([entry()])
    # The engine is told that its refusal is none, as long as another one is asked after it.
    assert all(one.asked)
    other.error = Overloaded("full, too", retry_after=1.0)
    asked = len(one.asked) + len(other.asked)
    with pytest.raises(Overloaded, match="full, too") as refused:
        await chosen.predict([entry()])
    assert refused.value.retry_after == 1.0
    assert len(one.asked) + len(other.asked) == asked + 2
    assert [one.asked[-1], other.asked[-1]].count(False) == 1
    assert failures.rows == [], "a refusal is the engine's to count"


async def test_what_one_engine_foresees_is_refused_if_all_do() -> None:
    one, other = Engine(), Engine()
    chosen = choice_of(one, other)
    one.reports(9.0, limit=100)
    other.reports(0.0, limit=50)
    chosen.foresee(["a"], timeout=1.0)
    other.reports(8.0, limit=50)
    with pytest.raises(Overloaded) as refused:
        chosen.foresee(["a"], timeout=1.0)
    assert refused.value.retry_after == pytest.approx(7.0, abs=0.5)
    one.usable = other.usable = False
    chosen.foresee(["a"], timeout=1.0)
    assert chosen.load is not None
    assert chosen.load.limit == 150


async def test_a_lost_request_is_asked_once_more_elsewhere() -> None:
    failures = Failures()
    engines = [Engine(), Engine(), Engine()]
    chosen = choice_of(*engines, failures=failures)
    engines[0].error = EngineUnavailable("it is gone")
    await chosen.predict([entry()])
    assert [len(engine.asked) for engine in engines] == [1, 1, 0]
    assert failures.rows == []
    for engine in engines:
        engine.error = EngineUnavailable("it is gone")
    with pytest.raises(EngineUnavailable, match="it is gone"):
        await chosen.predict([entry(), entry()])
    assert sum(len(engine.asked) for engine in engines) == 4
    assert failures.rows == [("unavailable", 2)]


async def test_engines_that_are_not_usable_are_not_asked() -> None:
    failures = Failures()
    one, other = Engine(), Engine()
    chosen = choice_of(one, other, failures=failures)
    one.usable = False
    assert chosen.missing == 1
    for _ in range(4):
        await chosen.predict([entry()])
    assert (len(one.asked), other.asked) == (0, [False] * 4)
    other.usable = False
    with pytest.raises(EngineUnavailable, match="no engine"):
        await chosen.predict([entry()])
    assert failures.rows == [("unavailable", 1)]
