"""Texts that a second revision reads beside the answer: never at the cost of a request."""

import asyncio
from collections.abc import Callable
from time import monotonic
from typing import Any

import numpy as np
import pytest

from adapters.format.files import serialize
from service.engine.interface import AdapterKey, Entry
from service.engine.scheduler import SPARE_SECONDS, QueuedEntry, Scheduler, Ticket
from service.engine.trials import Trial
from service.errors import AdapterLoadFailed, DeadlineExceeded, InferenceFailed
from tests.support.engine_harness import (
    EngineHarness,
    OpenEngine,
    adapter_with_infinite_scores,
)
from tests.support.scheduler_builders import costs, make_entry, make_scheduler, submit_each
from tests.support.tiny_models import make_adapter


def second(engine: EngineHarness, *, seed: int = 9) -> AdapterKey:
    """Store a second revision of `a`, which stays at its first."""
    adapter = make_adapter(engine.backbone, seed=seed, labels=("x", "y"), prompt_length=1)
    return stored(engine, serialize(adapter))


def stored(engine: EngineHarness, file: bytes) -> AdapterKey:
    current = engine.keys["a"].revision
    return AdapterKey("a", engine.store.stage("a", file, expected=current).revision)


def shadowed(engine: EngineHarness, other: AdapterKey, text: str) -> Entry:
    """A text that the current revision answers and the other one reads too."""
    entry = engine.entry("a", text)
    entry.trial = Trial(other.revision, other.revision, entry.cost)
    return entry


async def until(condition: Callable[[], bool]) -> None:
    deadline = monotonic() + 10
    while not condition():
        assert monotonic() < deadline, "waited too long"
        await asyncio.sleep(0.005)


async def test_both_revisions_read_the_text_and_the_current_one_answers(
    open_engine: OpenEngine,
) -> None:
    async with open_engine() as engine:
        other = second(engine)
        await engine.engine.preload(other)
        entries = [shadowed(engine, other, text) for text in ("free win", "hello you", "bad card")]
        completion = await engine.engine.predict(entries)
        engine.assert_answered_as_alone(entries, completion)
        await until(lambda: len(engine.trials.pairs) == 3)
        alone = await engine.engine.predict(
            [Entry(other, entry.encoding, entry.cost) for entry in entries]
        )
        for pair, answered, read in zip(
            engine.trials.pairs, completion.rows, alone.rows, strict=True
        ):
            np.testing.assert_allclose(pair.current, answered.scores, atol=1e-5)
            np.testing.assert_allclose(pair.candidate, read.scores, atol=1e-5)
        assert engine.trials.texts == {"current": 3, "shadow": 3}
        assert not engine.trials.failures
        # Nothing of it is counted as a batch, or held on the device.
        assert sum(report.rows for report in engine.recorder.batches) == 6
        assert engine.engine.in_use("a") == frozenset()


async def test_a_canarys_text_is_compared_the_other_way_round(open_engine: OpenEngine) -> None:
    async with open_engine() as engine:
        other, current = second(engine), engine.keys["a"]
        await engine.engine.preload(current)
        entry = engine.entry("a", "free win")
        entry = Entry(
            other, entry.encoding, entry.cost, trial=Trial(other.revision, current.revision, 5)
        )
        completion = await engine.engine.predict([entry])
        await until(lambda: len(engine.trials.pairs) == 1)
        (pair,) = engine.trials.pairs
        np.testing.assert_allclose(pair.candidate, completion.rows[0].scores, atol=1e-5)
        assert engine.trials.texts == {"canary": 1, "shadow": 1}


async def test_a_shadow_that_fails_fails_no_request(open_engine: OpenEngine) -> None:
    async with open_engine() as engine:
        other = stored(engine, serialize(adapter_with_infinite_scores(engine.backbone)))
        await engine.engine.preload(other)
        entries = [shadowed(engine, other, "free win") for _ in range(3)]
        engine.assert_answered_as_alone(entries, await engine.engine.predict(entries))
        await until(lambda: engine.trials.failures["shadow", other.revision] == 3)
        assert not engine.recorder.failures


async def test_a_canary_that_fails_is_counted_by_text(open_engine: OpenEngine) -> None:
    async with open_engine() as engine:
        other = stored(engine, serialize(adapter_with_infinite_scores(engine.backbone)))
        entry = engine.entry("a", "free win")
        broken = Entry(other, entry.encoding, entry.cost, trial=Trial(other.revision))
        fine = engine.entry("a", "hello")
        fine.trial = Trial(other.revision)
        with pytest.raises(InferenceFailed):
            await engine.engine.predict([broken, fine, broken])
        assert engine.trials.failures == {("canary", other.revision): 2}
        assert engine.trials.texts == {"canary": 2, "current": 1}


async def test_shadows_wait_until_nothing_else_does_and_are_dropped_beyond_a_batch(
    open_engine: OpenEngine,
) -> None:
    async with open_engine(max_batch_tokens=64, lanes=1) as engine:
        other = second(engine)
        await engine.engine.preload(other)
        held = await engine.hold_device()
        waiting = [
            asyncio.create_task(engine.engine.predict([shadowed(engine, other, "free win now")]))
            for _ in range(40)
        ]
        await engine.until_waiting(40)
        engine.device.rows.clear()
        engine.device.release()
        await asyncio.gather(held, *waiting)
        await until(lambda: engine.trials.texts["shadow"] + sum(engine.trials.drops.values()) == 40)
        # One batch of tokens may wait; the rest is counted, and every request was answered.
        assert engine.trials.drops["load"] > 0
        assert engine.trials.texts["shadow"] > 0
        assert engine.trials.texts["current"] == 40


async def test_a_request_that_needs_the_slot_gets_it(open_engine: OpenEngine) -> None:
    async with open_engine(max_active_adapters=2, lanes=1) as engine:
        other = second(engine)
        await engine.engine.predict(engine.entries(("a", "x")))
        await engine.engine.preload(other)
        held = await engine.hold_device()
        request = asyncio.create_task(engine.engine.predict([shadowed(engine, other, "free win")]))
        await engine.until_waiting(1)
        engine.device.release()
        await asyncio.gather(held, request)
        # Whether its shadow has run by now or waits: `b` and `c` need both slots.
        completion = await asyncio.wait_for(
            engine.engine.predict(engine.entries(("b", "hello"), ("c", "good"))), 10
        )
        assert len(completion.rows) == 2


async def test_an_adapter_that_would_evict_another_is_not_loaded_to_compare(
    open_engine: OpenEngine,
) -> None:
    async with open_engine(max_active_adapters=2) as engine:
        other = second(engine)
        await engine.engine.predict(engine.entries(("a", "x"), ("b", "x")))
        await engine.engine.predict([shadowed(engine, other, "free win")])
        await asyncio.sleep(0.05)
        assert engine.trials.drops == {"memory": 1}
        assert not engine.trials.pairs


async def test_an_adapter_for_which_there_is_room_is_loaded_for_the_next_text(
    open_engine: OpenEngine,
) -> None:
    async with open_engine() as engine:
        other = second(engine)

        async def compared() -> bool:
            await engine.engine.predict([shadowed(engine, other, "free win")])
            await asyncio.sleep(0.02)
            return bool(engine.trials.pairs)

        for _ in range(100):
            if await compared():
                break
        assert engine.trials.pairs
        assert engine.trials.drops["memory"] >= 1


async def test_a_candidate_whose_file_is_gone_is_reported(open_engine: OpenEngine) -> None:
    async with open_engine() as engine:
        other = second(engine)
        engine.store.path("a", other.revision).unlink()
        await engine.engine.predict([shadowed(engine, other, "free win")])
        await until(lambda: engine.trials.lost == [other])


async def test_a_canary_that_is_too_late_or_cannot_be_loaded_has_failed(
    open_engine: OpenEngine,
) -> None:
    async with open_engine(lanes=1) as engine:
        other = second(engine)
        entry = engine.entry("a", "free win")
        entry = Entry(other, entry.encoding, entry.cost, trial=Trial(other.revision))
        held = await engine.hold_device()
        # Longer than any machine needs for a text: a shorter one may be refused at once.
        with pytest.raises(DeadlineExceeded):
            await engine.engine.predict([entry], deadline=monotonic() + 0.3)
        # Together with another adapter's text it is nobody's fault.
        with pytest.raises(DeadlineExceeded):
            await engine.engine.predict(
                [entry, *engine.entries(("b", "x"))], deadline=monotonic() + 0.3
            )
        engine.device.release()
        await held
        assert engine.trials.failures == {("canary", other.revision): 1}
        gone = second(engine, seed=10)
        engine.store.path("a", gone.revision).unlink()
        lost = Entry(gone, entry.encoding, entry.cost, trial=Trial(gone.revision))
        with pytest.raises(AdapterLoadFailed):
            await engine.engine.predict([lost, *engine.entries(("a", "x"))])
        assert engine.trials.failures["canary", gone.revision] == 1
        assert engine.trials.lost == [gone]


async def test_a_deadline_that_nobody_could_keep_is_no_failure_of_the_canary(
    open_engine: OpenEngine,
) -> None:
    async with open_engine() as engine:
        other = second(engine)
        entry = engine.entry("a", "free win")
        entry = Entry(other, entry.encoding, entry.cost, trial=Trial(other.revision))
        # Its time is over on arrival, so it is refused before it is queued.
        with pytest.raises(DeadlineExceeded):
            await engine.engine.predict([entry], deadline=monotonic())
        assert not engine.trials.failures
        assert not engine.trials.texts


async def test_draining_and_stopping_do_not_wait_for_shadows(open_engine: OpenEngine) -> None:
    async with open_engine(lanes=1) as engine:
        other = second(engine)
        await engine.engine.preload(other)
        held = await engine.hold_device()
        request = asyncio.create_task(engine.engine.predict([shadowed(engine, other, "free win")]))
        await engine.until_waiting(1)
        engine.device.release()
        await asyncio.gather(held, request)
        await asyncio.wait_for(engine.engine.drain(), 5)


# The scheduler alone.


def offer(scheduler: Scheduler[int], *sizes: int) -> bool:
    entries = [make_entry(size) for size in sizes]
    ticket: Ticket[int] = scheduler.admit(entries, now=0.0)
    scheduler.withdraw(ticket)
    return scheduler.offer_spare(
        [QueuedEntry(entry, 0, index, ticket) for index, entry in enumerate(entries)]
    )


def measured(**settings: Any) -> Scheduler[int]:
    """A device that takes a millisecond for ten tokens."""
    scheduler = make_scheduler(**settings)
    for tokens in (10, 100):
        scheduler.measured(tokens, tokens / 10_000)
    return scheduler


def test_spare_entries_run_only_when_nothing_waits_or_runs() -> None:
    scheduler = measured()
    assert offer(scheduler, 10)
    submit_each(scheduler, 30)
    assert not scheduler.spare_batch()
    batch = scheduler.next_batch(0.0)
    assert costs(batch.batch) == [30]
    # It runs.
    assert not scheduler.spare_batch()
    scheduler.record_batch(batch, 0.003, 0.003)
    spare = scheduler.spare_batch()
    assert costs(spare.batch) == [10]
    assert spare.spare
    # One at a time.
    assert offer(scheduler, 10)
    assert not scheduler.spare_batch()
    scheduler.record_batch(spare, 0.001, 0.004)
    assert costs(scheduler.spare_batch().batch) == [10]


def test_a_spare_batch_is_short_or_has_one_entry() -> None:
    scheduler = measured(max_batch_tokens=1000)
    most = int(SPARE_SECONDS * 10_000)
    assert offer(scheduler, *[30] * 20)
    spare = scheduler.spare_batch()
    assert 0.8 * most - 30 <= spare.tokens <= 1.05 * most
    scheduler.record_batch(spare, 0.01, 0.01)
    scheduler.withdraw_spare()
    assert offer(scheduler, 900, 10)
    assert costs(scheduler.spare_batch().batch) == [900]


def test_spare_entries_change_no_promise_and_take_no_room() -> None:
    with_spares, without = (measured(max_waiting_tokens=200) for _ in range(2))
    assert offer(with_spares, 50, 50)
    assert with_spares.spare_batch()
    assert offer(with_spares, 20)
    assert with_spares.waiting_tokens == 0
    for scheduler in (with_spares, without):
        submit_each(scheduler, 100, 100)
    assert with_spares.load(0.0) == without.load(0.0)
    assert with_spares.pace(0.0) == without.pace(0.0)


def test_more_than_a_batch_of_spare_tokens_is_refused() -> None:
    scheduler = measured(max_batch_tokens=100)
    assert offer(scheduler, 500)
    assert not offer(scheduler, 10)
    assert len(scheduler.withdraw_spare()) == 1
    assert offer(scheduler, 60)
    assert offer(scheduler, 40)
    assert not offer(scheduler, 1)
    scheduler.close()
    scheduler.withdraw_spare()
    assert not offer(scheduler, 1)
