"""Freed memory goes back to the system while the engine runs, and no longer once it has stopped."""

import asyncio
from pathlib import Path

import pytest

from adapters.format.store import AdapterStore
from service.engine import engine as engine_module
from service.engine.engine import LocalEngine
from service.engine.settings import EngineSettings
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
