"""The device loader at the end of the engine: every load that was asked for has an outcome."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from threading import Event
from typing import Any

from adapters.backbone.model import Backbone
from adapters.format.files import Adapter
from service.engine.device_loader import DeviceLoader, OnLoaded
from service.engine.runners.base import DeviceAdapter, HostAdapter
from service.engine.runners.packed import PackedRunner


class HeldRunner(PackedRunner):
    """Loads nothing until `gate` opens."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__(backbone)
        self.gate = Event()

    def load(self, loads: Any) -> list[DeviceAdapter]:
        assert self.gate.wait(10)
        return super().load(loads)


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
    assert all(isinstance(outcome, RuntimeError) for outcome in others)
