"""Launching ahead: which batch is started while another runs.

The batches run on the CPU, in a thread that takes the part of a GPU.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from time import sleep

import pytest
from torch import Tensor

from adapters.adapter import PreparedAdapter
from adapters.backbone.model import Backbone
from adapters.flattened import Layout
from adapters.format.files import Adapter
from adapters.format.spec import AdapterSpec
from service.engine.runners.base import (
    BatchResult,
    BatchRow,
    DeviceAdapter,
    HostAdapter,
    Loading,
    RunningBatch,
)
from service.engine.runners.packed import PackedRunner
from tests.support.engine_harness import EngineHarness, open_engine

# A test that hangs fails.
pytestmark = pytest.mark.timeout(30)

BUDGET = 100


class BatchInThread:
    """A `RunningBatch` of an `AheadRunner`."""

    def __init__(self, result: Future[RunningBatch], runner: "AheadRunner") -> None:
        self._result = result
        self._runner = runner
        self.spins = runner.spins

    def is_done(self) -> bool:
        return self._result.done()

    def wait(self) -> BatchResult:
        result = self._result.result().wait()
        self._runner.finished += 1
        return result


class AheadRunner:
    """A `Runner` that launches ahead: its batches run one after another in a thread.

    Attributes:
        launched: rows of each batch. finished: how many have ended. spins: of the next ones.
        on_launch: called before every launch.
    """

    copies = False
    launches_ahead = True
    lanes = 1
    form = "ahead"

    def __init__(self, backbone: Backbone) -> None:
        self.backbone = backbone
        self.launched: list[int] = []
        self.finished = 0
        self.spins = False
        self.on_launch: Callable[[], None] = lambda: None
        self._packed = PackedRunner(backbone)
        self.embedder = self._packed.embedder
        self._thread = ThreadPoolExecutor(1)

    def enter_lane(self) -> None:
        self._packed.enter_lane()

    def prepare(self, adapter: Adapter) -> PreparedAdapter:
        return self._packed.prepare(adapter)

    def flatten(self, adapter: HostAdapter) -> tuple[Layout, Tensor]:
        return self._packed.flatten(adapter)

    def memory(self, nbytes: int, *, passing: bool) -> Tensor:
        return self._packed.memory(nbytes, passing=passing)

    def restore(self, spec: AdapterSpec, layout: Layout, memory: Tensor) -> PreparedAdapter:
        return self._packed.restore(spec, layout, memory)

    def load(self, adapters: Sequence[tuple[int, HostAdapter]]) -> list[DeviceAdapter]:
        return self._packed.load(adapters)

    def begin_load(self, slot: int, adapter: HostAdapter) -> Loading:
        return self._packed.begin_load(slot, adapter)

    def unload(self, slot: int) -> None:
        self._packed.unload(slot)

    def warm_up(self, max_tokens: int) -> Sequence[tuple[int, float]]:
        return self._packed.warm_up(max_tokens)

    def launch(self, rows: Sequence[BatchRow]) -> RunningBatch:
        self.on_launch()
        self.launched.append(len(rows))
        return BatchInThread(self._thread.submit(self._packed.launch, rows), self)


@pytest.fixture
async def harness(
    tmp_path: Path, backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[EngineHarness]:
    """A started engine whose runner launches ahead."""
    monkeypatch.setattr(
        "service.engine.engine._make_runner", lambda watched, _: AheadRunner(watched)
    )
    async with open_engine(tmp_path / "store", backbone, max_batch_tokens=BUDGET) as harness:
        yield harness


def runner_of(harness: EngineHarness) -> AheadRunner:
    assert harness.engine._parts is not None
    runner = harness.engine._parts.runner
    assert isinstance(runner, AheadRunner)
    return runner


async def until_launched(harness: EngineHarness, launches: int) -> None:
    for _ in range(2000):
        if len(runner_of(harness).launched) == launches:
            return
        await asyncio.sleep(0.001)
    pytest.fail(f"launched {runner_of(harness).launched}, never {launches} batches")


async def hold_device(harness: EngineHarness, text: str) -> "asyncio.Task[None]":
    """A request whose batch runs until `harness.device.release()`."""
    harness.device.hold()
    task = asyncio.create_task(ask(harness, text))
    assert await asyncio.to_thread(harness.device.entered.wait, 10)
    return task


async def ask(harness: EngineHarness, *texts: str) -> None:
    entries = harness.entries(*(("abc"[index % 3], text) for index, text in enumerate(texts)))
    harness.assert_answered_as_alone(entries, await harness.engine.predict(entries))


async def test_during_a_large_batch_the_next_one_starts_as_soon_as_it_is_full(
    harness: EngineHarness,
) -> None:
    first = await hold_device(harness, "win " * 40)
    second = asyncio.create_task(ask(harness, "win " * 20, "now " * 20))
    await harness.until_waiting(2)
    await asyncio.sleep(0.05)
    # Half a batch: entries that still arrive can join it.
    assert len(runner_of(harness).launched) == 1
    third = asyncio.create_task(ask(harness, "card " * 40))
    await until_launched(harness, 2)
    assert runner_of(harness).finished == 0
    assert runner_of(harness).launched == [1, 3]
    harness.device.release()
    await asyncio.gather(first, second, third)


async def test_during_a_small_batch_nothing_is_started(harness: EngineHarness) -> None:
    first = await hold_device(harness, "win")
    second = asyncio.create_task(ask(harness, "win " * 60, "now " * 60))
    await harness.until_waiting(2)
    await asyncio.sleep(0.05)
    assert len(runner_of(harness).launched) == 1
    harness.device.release()
    await asyncio.gather(first, second)


async def test_many_requests_are_answered_as_each_text_alone(harness: EngineHarness) -> None:
    pairs = [["win now " * (seed * 7 % 30), "card " * (seed % 11)] for seed in range(60)]
    await asyncio.gather(*(ask(harness, *pair) for pair in pairs))
    assert max(report.tokens for report in harness.recorder.batches) <= BUDGET


async def test_stopping_fails_running_and_waiting_requests(harness: EngineHarness) -> None:
    first = await hold_device(harness, "win " * 40)
    others = [asyncio.create_task(ask(harness, "now " * 60)) for _ in range(3)]
    await until_launched(harness, 2)
    stopping = asyncio.create_task(harness.engine.stop())
    answers = await asyncio.gather(first, *others, return_exceptions=True)
    assert [type(answer).__name__ for answer in answers] == ["EngineUnavailable"] * 4
    harness.device.release()
    await stopping


async def test_the_answers_of_a_small_batch_are_sent_before_the_next_one_starts(
    harness: EngineHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    # However slow this machine is.
    monkeypatch.setattr("service.engine.device._HAND_OVER_SECONDS", 20)
    runner = runner_of(harness)
    runner.spins = True
    first = await hold_device(harness, "win")
    answered: list[bool] = []
    runner.on_launch = lambda: answered.append(first.done())
    second = asyncio.create_task(ask(harness, "now"))
    await harness.until_waiting(1)
    harness.device.release()
    await asyncio.gather(first, second)
    assert answered == [True]


@pytest.mark.slow
@pytest.mark.parametrize(("few", "seconds"), [(16, 0.001), (0, 20)], ids=["few", "many"])
async def test_a_loop_that_is_busy_does_not_hold_up_the_device(
    harness: EngineHarness, monkeypatch: pytest.MonkeyPatch, few: int, seconds: float
) -> None:
    monkeypatch.setattr("service.engine.device._FEW_TEXTS", few)
    monkeypatch.setattr("service.engine.device._HAND_OVER_SECONDS", seconds)
    runner = runner_of(harness)
    runner.spins = True
    first = await hold_device(harness, "win")
    second = asyncio.create_task(ask(harness, "now"))
    await harness.until_waiting(1)
    harness.device.release()
    # On the loop.
    sleep(0.5)  # noqa: ASYNC251  # nothing else may run there
    assert len(runner.launched) == 2
    await asyncio.gather(first, second)
