"""A device that takes batches ahead: which one is started while another runs.

The batches run as a CPU runs them, in a thread that stands for a GPU.
"""

import asyncio
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from adapters.adapter import PreparedAdapter
from adapters.backbone.model import Backbone
from adapters.format.files import Adapter
from service.engine.runners.base import Asked, Flight, Hosted, Placed, Ran
from service.engine.runners.packed import PackedRunner
from tests.support.engine_harness import House, run

BUDGET = 100


class Aloft:
    """`Runner` whose batches are in the air until somebody waits for them, in order."""

    ahead = True
    lanes = 1

    def __init__(self, backbone: Backbone) -> None:
        self.backbone = backbone
        self.launched: list[int] = []
        self.finished = 0
        self._ground = PackedRunner(backbone)
        self._air = ThreadPoolExecutor(1)

    def enter_lane(self) -> None:
        self._ground.enter_lane()

    def adopt(self, adapter: Adapter) -> PreparedAdapter:
        return self._ground.adopt(adapter)

    def place(self, adapters: Sequence[tuple[int, Hosted]]) -> list[Placed]:
        return self._ground.place(adapters)

    def warm_up(self, max_tokens: int) -> None:
        self._ground.warm_up(max_tokens)

    def launch(self, rows: Sequence[Asked]) -> Flight:
        self.launched.append(len(rows))
        return self._air.submit(self._ground.launch, rows)

    def landed(self, flight: Flight) -> bool:
        assert isinstance(flight, Future)
        return flight.done()

    def finish(self, flight: Flight) -> Ran:
        assert isinstance(flight, Future)
        ran = flight.result()
        self.finished += 1
        assert isinstance(ran, Ran)
        return ran


@pytest.fixture
def flown(tmp_path: Path, backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> House:
    monkeypatch.setattr("service.engine.engine._runner", lambda watched, _: Aloft(watched))
    return House(tmp_path / "store", backbone, max_batch_tokens=BUDGET)


def runner_of(house: House) -> Aloft:
    assert house.engine._parts is not None
    runner = house.engine._parts.runner
    assert isinstance(runner, Aloft)
    return runner


async def until(house: House, launches: int) -> None:
    for _ in range(2000):
        if len(runner_of(house).launched) == launches:
            return
        await asyncio.sleep(0.001)
    pytest.fail(f"launched {runner_of(house).launched}, never {launches} batches")


async def on_the_device(house: House, text: str) -> "asyncio.Task[None]":
    """A request whose batch is in the air until `house.device.free()`."""
    house.device.hold()
    task = asyncio.create_task(ask(house, text))
    assert await asyncio.to_thread(house.device.entered.wait, 10)
    return task


async def ask(house: House, *texts: str) -> None:
    entries = house.entries(*(("abc"[index % 3], text) for index, text in enumerate(texts)))
    house.agrees(entries, await house.engine.predict(entries))


def test_behind_a_large_batch_the_next_one_starts_as_soon_as_it_is_full(flown: House) -> None:
    async def test() -> None:
        await flown.engine.start()
        first = await on_the_device(flown, "win " * 40)
        second = asyncio.create_task(ask(flown, "win " * 20, "now " * 20))
        await flown.waiting_entries(2)
        await asyncio.sleep(0.05)
        # Half a batch: whoever still comes can join it.
        assert len(runner_of(flown).launched) == 1
        third = asyncio.create_task(ask(flown, "card " * 40))
        await until(flown, 2)
        assert runner_of(flown).finished == 0
        assert runner_of(flown).launched == [1, 3]
        flown.device.free()
        await asyncio.gather(first, second, third)
        await flown.engine.stop()

    run(test())


def test_behind_a_small_batch_nothing_is_started(flown: House) -> None:
    async def test() -> None:
        await flown.engine.start()
        first = await on_the_device(flown, "win")
        second = asyncio.create_task(ask(flown, "win " * 60, "now " * 60))
        await flown.waiting_entries(2)
        await asyncio.sleep(0.05)
        assert len(runner_of(flown).launched) == 1
        flown.device.free()
        await asyncio.gather(first, second)
        await flown.engine.stop()

    run(test())


def test_many_requests_through_it_are_answered_as_each_alone(flown: House) -> None:
    async def test() -> None:
        await flown.engine.start()
        texts = [["win now " * (seed * 7 % 30), "card " * (seed % 11)] for seed in range(60)]
        await asyncio.gather(*(ask(flown, *item) for item in texts))
        assert max(report.tokens for report in flown.recorder.batches) <= BUDGET
        await flown.engine.stop()

    run(test())


def test_stopping_fails_whoever_is_in_the_air_and_whoever_waits(flown: House) -> None:
    async def test() -> None:
        await flown.engine.start()
        first = await on_the_device(flown, "win " * 40)
        others = [asyncio.create_task(ask(flown, "now " * 60)) for _ in range(3)]
        await until(flown, 2)
        stopping = asyncio.create_task(flown.engine.stop())
        answers = await asyncio.gather(first, *others, return_exceptions=True)
        assert [type(answer).__name__ for answer in answers] == ["EngineUnavailable"] * 4
        flown.device.free()
        await stopping

    run(test())
