"""The engine's answers and batches: what each text gets alone, whoever it is batched with."""

import asyncio
import time
from pathlib import Path

import pytest

from adapters.backbone.model import Backbone
from service.engine.interface import Engine
from service.errors import (
    InvalidRequest,
)
from tests.support.engine_harness import House, Opened, run


def test_the_engine_is_what_the_routes_were_promised(tmp_path: Path, backbone: Backbone) -> None:
    engine: Engine = House(tmp_path, backbone).engine
    assert engine.health().live


def test_a_mixed_request_is_answered_in_order_as_each_text_alone(opened: Opened) -> None:
    async def test() -> None:
        async with opened() as house:
            entries = house.entries(
                ("c", "free card"), ("a", ""), ("b", "you win " * 40), ("a", "hello"), ("c", "no")
            )
            completion = await house.engine.predict(entries)
            house.agrees(entries, completion)
            assert [len(row.scores) for row in completion.rows] == [4, 2, 3, 2, 4]
            assert completion.inference_seconds > 0.0
            assert completion.queue_seconds >= 0.0

    run(test())


def test_many_requests_at_once_share_batches_and_agree_with_each_text_alone(
    opened: Opened,
) -> None:
    async def test() -> None:
        async with opened(max_active_adapters=2) as house:

            async def ask(number: int) -> None:
                names = ("abc"[number % 3], "abc"[number * 7 % 3])
                entries = house.entries(*((name, "win " * (number % 50)) for name in names))
                house.agrees(entries, await house.engine.predict(entries))

            held = await house.held()
            asking = [asyncio.create_task(ask(number)) for number in range(60)]
            # The third adapter waits for a place; who asks for the others passes it.
            await house.waiting_entries(80)
            house.device.free()
            await asyncio.gather(held, *asking)
            assert sum(report.rows for report in house.recorder.batches) == 121
            assert max(report.rows for report in house.recorder.batches) > 2
            assert max(report.adapters for report in house.recorder.batches) == 2
            for report in house.recorder.batches:
                assert report.tokens <= house.settings.max_batch_tokens
                assert len(report.queue_seconds) == report.rows
                assert report.generator_seconds is not None
                assert report.generator_seconds > 0.0
                assert (
                    report.generator_seconds + report.backbone_seconds <= report.inference_seconds
                )
            assert house.recorder.failures == []
            assert house.recorder.waiting[-1] == 0

    run(test())


def test_what_waits_when_the_device_becomes_free_is_one_batch(opened: Opened) -> None:
    async def test() -> None:
        async with opened() as house:
            held = await house.held()
            asking = [
                asyncio.create_task(house.engine.predict(house.entries((name, "hello"))))
                for name in "abcabc"
            ]
            await house.waiting_entries(6)
            house.device.free()
            _, *answers = await asyncio.gather(held, *asking)
            assert house.device.rows == [1, 6]
            report = house.recorder.batches[-1]
            assert min(report.queue_seconds) > 0.0
            assert sorted(item.queue_seconds for item in answers) == sorted(report.queue_seconds)
            assert {item.inference_seconds for item in answers} == {report.inference_seconds}

    run(test())


def test_requests_made_in_one_turn_of_the_loop_share_a_batch_on_an_idle_device(
    opened: Opened,
) -> None:
    async def test() -> None:
        async with opened() as house:
            for name in "abc":
                await house.engine.preload(house.keys[name])

            async def ask(name: str) -> None:
                # The turn takes a while, as parsing a large request would.
                time.sleep(0.005)  # noqa: ASYNC251  # it must hold the loop
                await house.engine.predict(house.entries((name, "hello")))

            await asyncio.gather(*(ask(name) for name in "abcabcab"))
            assert house.device.rows == [8]

    run(test())


def test_lanes_run_batches_side_by_side_each_its_share_of_what_waits(opened: Opened) -> None:
    async def test() -> None:
        async with opened(lanes=2) as house:
            for name in "abc":
                await house.engine.preload(house.keys[name])
            entries = house.entries(*((name, "hello") for name in "abcabcab"))
            house.device.hold()
            asking = asyncio.create_task(house.engine.predict(entries))
            await asyncio.to_thread(house.device.both_wait.wait, 10)
            house.device.free()
            house.agrees(entries, await asking)
            assert sorted(house.device.rows) == [4, 4]

    run(test())


def test_a_request_over_the_budget_is_answered_from_several_batches(opened: Opened) -> None:
    async def test() -> None:
        async with opened(max_batch_tokens=32) as house:
            entries = house.entries(*(("abc"[i % 3], "win " * i) for i in range(40)))
            house.agrees(entries, await house.engine.predict(entries))
            assert len(house.recorder.batches) > 5

    run(test())


def test_no_entries_are_no_rows(opened: Opened) -> None:
    async def test() -> None:
        async with opened() as house:
            assert (await house.engine.predict([])).rows == ()

    run(test())


def test_more_adapters_than_can_be_active_are_refused(opened: Opened) -> None:
    async def test() -> None:
        async with opened(max_active_adapters=2) as house:
            with pytest.raises(InvalidRequest, match="at most 2"):
                await house.engine.predict(house.entries(("a", ""), ("b", ""), ("c", "")))
            assert house.engine.health().details["waiting_tokens"] == 0

    run(test())


def test_a_cancelled_request_is_not_run_and_its_batch_mates_are(opened: Opened) -> None:
    async def test() -> None:
        async with opened() as house:
            held = await house.held()
            entries = house.entries(("b", "stays"))
            cancelled = asyncio.create_task(
                house.engine.predict(house.entries(*(("a", "goes"),) * 5))
            )
            stays = asyncio.create_task(house.engine.predict(entries))
            await house.waiting_entries(6)
            cancelled.cancel()
            await house.waiting_entries(1)
            house.device.free()
            house.agrees(entries, await stays)
            await held
            assert house.device.rows == [1, 1]
            assert house.recorder.failures == [("cancelled", 5)]

    run(test())


def test_a_request_cancelled_while_it_runs_keeps_its_adapter_until_the_batch_ends(
    opened: Opened,
) -> None:
    async def test() -> None:
        async with opened(max_active_adapters=1) as house:
            held = await house.held()
            held.cancel()
            await asyncio.gather(held, return_exceptions=True)
            assert held.cancelled()
            other = asyncio.create_task(house.engine.predict(house.entries(("b", "x"))))
            await asyncio.sleep(0.05)
            assert house.engine.health().details["waiting_entries"] == 0
            house.device.free()
            await other
            assert house.device.rows == [1, 1]

    run(test())
