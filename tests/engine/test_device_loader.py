"""The device loader at the end of the engine: every load that was asked for has an outcome."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from threading import Event
from typing import Any

import pytest
import torch

from adapters.backbone.model import Backbone
from adapters.format.files import Adapter
from service.engine import device_loader
from service.engine.device_loader import DeviceLoader, OnLoaded
from service.engine.runners.base import DeviceAdapter, HostAdapter
from service.engine.runners.packed import PackedRunner
from service.engine.turns import Client
from service.errors import EngineUnavailable


class HeldRunner(PackedRunner):
    """Loads nothing until `gate` opens."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__(backbone)
        self.gate = Event()

    def load(self, loads: Any) -> list[DeviceAdapter]:
        assert self.gate.wait(10)
        return super().load(loads)


class CountingRunner(HeldRunner):
    """Keeps how many adapters each job has."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__(backbone)
        self.jobs: list[int] = []

    def load(self, loads: Any) -> list[DeviceAdapter]:
        self.jobs.append(len(loads))
        return super().load(loads)


@pytest.mark.parametrize(
    ("adapters", "jobs"),
    [
        (3.5, [1, 3, 3, 1]),
        (0.5, [1] * 8),
        (99, [1, 7]),
    ],
)
async def test_a_job_takes_what_has_gathered_up_to_a_number_of_bytes(
    backbone: Backbone,
    adapter: Adapter,
    monkeypatch: pytest.MonkeyPatch,
    adapters: float,
    jobs: list[int],
) -> None:
    runner = CountingRunner(backbone)
    host: HostAdapter = runner.prepare(adapter)
    monkeypatch.setattr(device_loader, "_MAX_JOB_BYTES", int(adapters * host.nbytes))
    loop = asyncio.get_running_loop()
    futures: list[asyncio.Future[object]] = [loop.create_future() for _ in range(8)]

    def keep(slot: int) -> OnLoaded:
        return lambda outcome, _: futures[slot].set_result(outcome)

    with ThreadPoolExecutor(1) as copying:
        loader = DeviceLoader(runner, copying)
        for slot in range(len(futures)):
            loader.load(slot, host, keep(slot))
        runner.gate.set()
        async with asyncio.timeout(10):
            outcomes = await asyncio.gather(*futures)
    assert not any(isinstance(outcome, BaseException) for outcome in outcomes)
    assert runner.jobs == jobs


async def test_clients_take_turns_and_a_second_one_brings_its_turn_along(
    backbone: Backbone, adapter: Adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_loader, "_MAX_JOB", 1)
    runner = HeldRunner(backbone)
    host: HostAdapter = runner.prepare(adapter)
    loaded: list[int] = []
    done = asyncio.Event()

    def keep(slot: int) -> OnLoaded:
        def note(*_: object) -> None:
            loaded.append(slot)
            if len(loaded) == 8:
                done.set()

        return note

    with ThreadPoolExecutor(1) as copying:
        loader = DeviceLoader(runner, copying)
        for slot in range(7):
            loader.load(slot, host, keep(slot), Client("noisy", 1.0))
        loader.load(7, host, keep(7), Client("quiet", 1.0))
        loader.advance(6, Client("other", 1.0))
        # It is being copied.
        loader.advance(0, Client("other", 1.0))
        runner.gate.set()
        async with asyncio.timeout(10):
            await done.wait()
    assert loaded == [0, 1, 7, 6, 2, 3, 4, 5]


class FullRunner(HeldRunner):
    """Has no memory for one of its slots."""

    full = 5

    def load(self, loads: Any) -> list[DeviceAdapter]:
        loaded = super().load(loads)
        if any(slot == self.full for slot, _ in loads):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
        return loaded


async def test_an_adapter_that_does_not_fit_fails_alone(
    backbone: Backbone, adapter: Adapter
) -> None:
    runner = FullRunner(backbone)
    host: HostAdapter = runner.prepare(adapter)
    loop = asyncio.get_running_loop()
    futures: list[asyncio.Future[object]] = [loop.create_future() for _ in range(8)]

    def keep(slot: int) -> OnLoaded:
        return lambda outcome, _: futures[slot].set_result(outcome)

    with ThreadPoolExecutor(1) as copying:
        loader = DeviceLoader(runner, copying)
        for slot in range(len(futures)):
            loader.load(slot, host, keep(slot))
        runner.gate.set()
        async with asyncio.timeout(10):
            outcomes = await asyncio.gather(*futures)
    failed = [slot for slot, outcome in enumerate(outcomes) if isinstance(outcome, Exception)]
    assert failed == [runner.full]
    assert isinstance(outcomes[runner.full], torch.OutOfMemoryError)


async def test_loads_that_wait_while_the_executor_ends_fail_and_none_is_forgotten(
    backbone: Backbone, adapter: Adapter
) -> None:
    runner = HeldRunner(backbone)
    host: HostAdapter = runner.prepare(adapter)
    copying = ThreadPoolExecutor(1)
    loader = DeviceLoader(runner, copying)
    loop = asyncio.get_running_loop()
    futures: list[asyncio.Future[object]] = [loop.create_future() for _ in range(40)]

    def keep(slot: int) -> OnLoaded:
        return lambda outcome, _: futures[slot].set_result(outcome)

    for slot in range(len(futures)):
        loader.load(slot, host, keep(slot))
    copying.shutdown(wait=False)
    runner.gate.set()
    async with asyncio.timeout(10):
        first, *others = await asyncio.gather(*futures)
    # The first was running; all others waited for it.
    assert not isinstance(first, BaseException)
    assert all(isinstance(outcome, EngineUnavailable) for outcome in others)
