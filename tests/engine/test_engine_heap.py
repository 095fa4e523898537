"""What requests leave behind: nothing for the garbage collector, and freed memory goes back to the
system while the engine runs."""

import asyncio
import gc
from collections.abc import Iterator
from pathlib import Path

import pytest

from adapters.format.store import AdapterStore
from service.engine import engine as engine_module
from service.engine.engine import LocalEngine
from service.engine.requests import Request
from service.engine.settings import EngineSettings
from service.errors import DeadlineExceeded
from tests.support.engine_harness import OpenEngine
from tests.support.tiny_models import make_backbone


async def test_the_heap_is_trimmed_until_the_engine_stops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trims, third = 0, asyncio.Event()
    loop = asyncio.get_running_loop()

    def trim() -> None:
        nonlocal trims
        trims += 1
        if trims == 3:
            loop.call_soon_threadsafe(third.set)

    monkeypatch.setattr(engine_module, "_TRIM_SECONDS", 0.01)
    monkeypatch.setattr(engine_module, "trim_heap", trim)
    engine = LocalEngine(make_backbone, AdapterStore(tmp_path), EngineSettings())
    await engine.start()
    await third.wait()
    await engine.stop()
    count = trims
    await asyncio.sleep(0.1)
    # One may have been on its way.
    assert trims <= count + 1


@pytest.fixture
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.slow
@pytest.mark.usefixtures("no_collector")
async def test_requests_that_are_over_leave_nothing_for_the_garbage_collector(
    open_engine: OpenEngine,
) -> None:
    # What other tests of this process have left, a failed one for its report.
    others = number_of_requests()
    async with open_engine() as harness:
        entries = harness.entries(("a", "one"), ("b", "two"))
        for _ in range(5):
            await harness.engine.predict(entries)
        held = await harness.hold_device()
        for _ in range(5):
            soon = asyncio.get_running_loop().time() + 0.3
            with pytest.raises(DeadlineExceeded):
                await harness.engine.predict(entries, deadline=soon)
        cancelled = [asyncio.create_task(harness.engine.predict(entries)) for _ in range(5)]
        await harness.until_waiting(10)
        for task in cancelled:
            task.cancel()
        await asyncio.wait(cancelled)
        del cancelled, task
        harness.device.release()
        await held
        await harness.engine.predict(entries)
        # A busy machine may keep the lane from letting go of its last batch. What a circle keeps
        # would stay.
        for _ in range(100):
            if number_of_requests() == others:
                break
            await asyncio.sleep(0.05)
        assert number_of_requests() == others


def number_of_requests() -> int:
    # `isinstance` would warn about some of torch's objects.
    return sum(type(item) is Request for item in gc.get_objects())
