"""Answers and batches: every text is answered as if it were alone in its batch."""

import asyncio
import time
from pathlib import Path

import pytest

from adapters.backbone.model import Backbone
from service.engine.interface import Engine
from service.errors import InvalidRequest
from tests.support.engine_harness import EngineHarness, OpenEngine

# A test that hangs fails.
pytestmark = pytest.mark.timeout(30)


def test_the_engine_implements_its_interface(tmp_path: Path, backbone: Backbone) -> None:
    engine: Engine = EngineHarness(tmp_path, backbone).engine
    assert engine.health().live


async def test_a_mixed_request_is_answered_in_order_as_each_text_alone(
    open_engine: OpenEngine,
) -> None:
    async with open_engine() as harness:
        entries = harness.entries(
            ("c", "free card"), ("a", ""), ("b", "you win " * 40), ("a", "hello"), ("c", "no")
        )
        completion = await harness.engine.predict(entries)
        harness.assert_answered_as_alone(entries, completion)
        assert [len(row.scores) for row in completion.rows] == [4, 2, 3, 2, 4]
        assert completion.inference_seconds > 0.0
        assert completion.queue_seconds >= 0.0


async def test_concurrent_requests_share_batches_and_are_answered_as_each_text_alone(
    open_engine: OpenEngine,
) -> None:
    async with open_engine(max_active_adapters=2) as harness:

        async def ask(number: int) -> None:
            names = ("abc"[number % 3], "abc"[number * 7 % 3])
            entries = harness.entries(*((name, "win " * (number % 50)) for name in names))
            harness.assert_answered_as_alone(entries, await harness.engine.predict(entries))

        held = await harness.hold_device()
        asking = [asyncio.create_task(ask(number)) for number in range(60)]
        # Requests for the third adapter wait for a slot; requests for the others overtake them.
        await harness.until_waiting(80)
        harness.device.release()
        await asyncio.gather(held, *asking)
        assert sum(report.rows for report in harness.recorder.batches) == 121
        assert max(report.rows for report in harness.recorder.batches) > 2
        assert max(report.adapters for report in harness.recorder.batches) == 2
        for report in harness.recorder.batches:
            assert report.tokens <= harness.settings.max_batch_tokens
            assert len(report.queue_seconds) == report.rows
            assert report.generator_seconds is not None
            assert report.generator_seconds > 0.0
            assert report.generator_seconds + report.backbone_seconds <= report.inference_seconds
        assert harness.recorder.failures == []
        assert harness.recorder.waiting[-1] == 0


async def test_all_entries_that_wait_for_the_device_become_one_batch(
    open_engine: OpenEngine,
) -> None:
    async with open_engine() as harness:
        held = await harness.hold_device()
        asking = [
            asyncio.create_task(harness.engine.predict(harness.entries((name, "hello"))))
            for name in "abcabc"
        ]
        await harness.until_waiting(6)
        harness.device.release()
        _, *answers = await asyncio.gather(held, *asking)
        assert harness.device.rows == [1, 6]
        report = harness.recorder.batches[-1]
        assert min(report.queue_seconds) > 0.0
        assert sorted(answer.queue_seconds for answer in answers) == sorted(report.queue_seconds)
        assert {answer.inference_seconds for answer in answers} == {report.inference_seconds}


async def test_requests_made_in_one_turn_of_the_loop_share_a_batch_on_an_idle_device(
    open_engine: OpenEngine,
) -> None:
    async with open_engine() as harness:
        for name in "abc":
            await harness.engine.preload(harness.keys[name])

        async def ask(name: str) -> None:
            # Parsing a large request would hold the loop like this.
            time.sleep(0.005)  # noqa: ASYNC251  # it must hold the loop
            await harness.engine.predict(harness.entries((name, "hello")))

        await asyncio.gather(*(ask(name) for name in "abcabcab"))
        assert harness.device.rows == [8]


async def test_lanes_share_the_waiting_entries_and_run_side_by_side(
    open_engine: OpenEngine,
) -> None:
    async with open_engine(lanes=2) as harness:
        for name in "abc":
            await harness.engine.preload(harness.keys[name])
        entries = harness.entries(*((name, "hello") for name in "abcabcab"))
        harness.device.hold()
        asking = asyncio.create_task(harness.engine.predict(entries))
        await asyncio.to_thread(harness.device.both_held.wait, 10)
        harness.device.release()
        harness.assert_answered_as_alone(entries, await asking)
        assert sorted(harness.device.rows) == [4, 4]


async def test_a_request_over_the_budget_is_answered_from_several_batches(
    open_engine: OpenEngine,
) -> None:
    async with open_engine(max_batch_tokens=32) as harness:
        entries = harness.entries(*(("abc"[i % 3], "win " * i) for i in range(40)))
        harness.assert_answered_as_alone(entries, await harness.engine.predict(entries))
        assert len(harness.recorder.batches) > 5


async def test_a_request_without_entries_is_answered_without_rows(open_engine: OpenEngine) -> None:
    async with open_engine() as harness:
        assert (await harness.engine.predict([])).rows == ()


async def test_more_adapters_than_can_be_active_are_refused(open_engine: OpenEngine) -> None:
    async with open_engine(max_active_adapters=2) as harness:
        with pytest.raises(InvalidRequest, match="at most 2"):
            await harness.engine.predict(harness.entries(("a", ""), ("b", ""), ("c", "")))
        assert harness.engine.health().details["waiting_tokens"] == 0


async def test_a_cancelled_request_is_not_run_and_its_batch_mates_are(
    open_engine: OpenEngine,
) -> None:
    async with open_engine() as harness:
        held = await harness.hold_device()
        entries = harness.entries(("b", "stays"))
        cancelled = asyncio.create_task(
            harness.engine.predict(harness.entries(*(("a", "goes"),) * 5))
        )
        stays = asyncio.create_task(harness.engine.predict(entries))
        await harness.until_waiting(6)
        cancelled.cancel()
        await harness.until_waiting(1)
        harness.device.release()
        harness.assert_answered_as_alone(entries, await stays)
        await held
        assert harness.device.rows == [1, 1]
        assert harness.recorder.failures == [("cancelled", 5)]


async def test_a_request_cancelled_while_it_runs_keeps_its_adapter_until_the_batch_ends(
    open_engine: OpenEngine,
) -> None:
    async with open_engine(max_active_adapters=1) as harness:
        held = await harness.hold_device()
        held.cancel()
        await asyncio.gather(held, return_exceptions=True)
        assert held.cancelled()
        other = asyncio.create_task(harness.engine.predict(harness.entries(("b", "x"))))
        await asyncio.sleep(0.05)
        assert harness.engine.health().details["waiting_entries"] == 0
        harness.device.release()
        await other
        assert harness.device.rows == [1, 1]
