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
    trims: list[None] = []
    monkeypatch.setattr(engine_module, "_TRIM_SECONDS", 0.01)
    monkeypatch.setattr(engine_module, "trim_heap", lambda: trims.append(None))
    engine = LocalEngine(make_backbone, AdapterStore(tmp_path), EngineSettings())
    await engine.start()
    while len(trims) < 3:
        await asyncio.sleep(0.01)
    await engine.stop()
    count = len(trims)
    await asyncio.sleep(0.1)
    assert len(trims) <= count + 1
