"""What a start loads before it answers, and what beside its answers."""

import asyncio
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from time import monotonic

import pytest

from adapters.format.files import serialize
from adapters.format.store import AdapterStore
from service import local
from service.catalog import preloading
from service.catalog.preloading import preload_all, wait_at_most
from service.engine.engine import LocalEngine
from service.engine.interface import AdapterKey, CheckedAdapter
from tests.support.http_service import serve, until
from tests.support.tiny_models import make_adapter, make_backbone

KEYS = [AdapterKey(f"a{number}", "r") for number in range(100)]


async def test_all_are_preloaded_and_no_more_than_some_at_a_time() -> None:
    done: list[AdapterKey] = []
    running = most = 0

    async def preload(key: AdapterKey) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.001)
        running -= 1
        done.append(key)

    await preload_all(KEYS, preload)
    assert sorted(done) == sorted(KEYS)
    assert most == 16


async def test_what_comes_after_the_start_takes_a_quarter_of_the_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(preloading, "PRELOADING_SECONDS", -1.0)
    began = monotonic()
    await preload_all(KEYS[:32], lambda _: asyncio.sleep(0.1))
    assert monotonic() - began > 2 * 0.4


async def test_a_start_waits_no_longer_than_its_time_and_hears_of_failures() -> None:
    async def fail() -> None:
        raise LookupError

    task = asyncio.create_task(asyncio.sleep(60))
    await wait_at_most(0.01, task)
    assert not task.done()
    task.cancel()
    await wait_at_most(60, asyncio.create_task(asyncio.sleep(0)))
    with pytest.raises(LookupError):
        await wait_at_most(60, asyncio.create_task(fail()))


@pytest.mark.slow
def test_a_service_answers_before_all_of_a_large_store_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = AdapterStore(tmp_path)
    backbone = make_backbone()
    for number in range(40):
        store.put(f"a{number:02}", serialize(make_adapter(backbone, seed=number)))
    preload, gate = LocalEngine.preload, Future[None]()
    preloaded: list[str] = []

    async def wait_first(
        engine: LocalEngine, key: AdapterKey, checked: CheckedAdapter | None = None
    ) -> None:
        preloaded.append(key.name)
        if "a20" <= key.name < "a32":
            await asyncio.wrap_future(gate)
        await preload(engine, key, checked)

    monkeypatch.setattr(local, "PRELOADING_SECONDS", 0.2)
    monkeypatch.setattr(LocalEngine, "preload", wait_first)
    with serve(tmp_path) as live:
        active = partial(live.metric, "idspam_tier_adapters", tier="active")
        # Some of those that a start loads, and none of those that wait.
        assert active() <= 20
        assert live.predict(adapter="a39", inputs="x")["results"][0]["adapter"] == "a39"
        # What is no longer served when its turn comes is not loaded.
        live.client.delete("/v1/adapters/a38").raise_for_status()
        gate.set_result(None)
        until(lambda: active() == 39)
    assert "a38" not in preloaded
    assert set(preloaded) >= {f"a{number:02}" for number in range(38)}
