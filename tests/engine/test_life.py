"""An engine's life: start, warm-up, trial runs, swaps, drain and stop."""

import asyncio
import threading
from pathlib import Path

import numpy as np
import pytest

from adapters.adapter import classify, prepare, rows_of
from adapters.backbone.model import Backbone
from adapters.errors import IncompatibleAdapter, InvalidAdapter
from adapters.format.files import serialize
from service.engine.engine import LocalEngine
from service.engine.interface import AdapterKey, EngineInfo, Entry
from service.errors import (
    AdapterLoadFailed,
    EngineUnavailable,
    NotReady,
)
from tests.support.engine_harness import SAME, House, Opened, run, unbounded
from tests.support.tiny_models import make_adapter, make_backbone


def test_checking_a_file_names_its_faults_and_publishes_nothing(opened: Opened) -> None:
    async def test() -> None:
        async with opened() as house:
            adapter = make_adapter(house.backbone, seed=7)
            assert await house.engine.check(serialize(adapter)) == adapter.spec
            with pytest.raises(InvalidAdapter):
                await house.engine.check(b"\x80\x04 a pickle")
            with pytest.raises(IncompatibleAdapter):
                await house.engine.check(serialize(make_adapter(make_backbone(seed=5))))
            with pytest.raises(InvalidAdapter, match="not finite"):
                await house.engine.check(serialize(unbounded(house.backbone)))
            assert house.store.names() == ["a", "b", "c"]

    run(test())


def test_preloading_fills_free_slots_and_evicts_nobody(opened: Opened) -> None:
    async def test() -> None:
        async with opened(max_active_adapters=2) as house:
            for name in "abc":
                await house.engine.preload(house.keys[name])
            for name in "abc":
                # Only c must still be read.
                house.store.path(name, house.keys[name].revision).unlink()
            await house.engine.predict(house.entries(("a", "x"), ("b", "x")))
            with pytest.raises(AdapterLoadFailed):
                await house.engine.predict(house.entries(("c", "x")))

    run(test())


def test_draining_answers_what_was_taken_and_takes_no_more(opened: Opened) -> None:
    async def test() -> None:
        async with opened() as house:
            held = await house.held()
            entries = house.entries(("b", "x"))
            taken = asyncio.create_task(house.engine.predict(entries))
            await house.waiting_entries(1)
            draining = asyncio.create_task(house.engine.drain())
            await asyncio.sleep(0.01)
            assert not draining.done()
            health = house.engine.health()
            assert health.live
            assert not health.ready
            with pytest.raises(EngineUnavailable, match="draining"):
                await house.engine.predict(entries)
            house.device.free()
            await draining
            assert held.done()
            house.agrees(entries, await taken)
            await asyncio.wait_for(house.engine.drain(), 1)

    run(test())


def test_stopping_fails_whoever_waits_at_once(opened: Opened) -> None:
    async def test() -> None:
        async with opened(max_active_adapters=1) as house:
            held = await house.held()
            queued = asyncio.create_task(house.engine.predict(house.entries(("a", "x"))))
            for_a_slot = asyncio.create_task(house.engine.predict(house.entries(("b", "x"))))
            await house.waiting_entries(1)
            stopping = asyncio.create_task(house.engine.stop())
            answers = await asyncio.gather(held, queued, for_a_slot, return_exceptions=True)
            assert [type(item) for item in answers] == [EngineUnavailable] * 3
            assert not stopping.done()
            house.device.free()
            await stopping
            await house.engine.stop()
            assert not house.engine.health().live
            assert not any(thread.name == "engine" for thread in threading.enumerate())
            with pytest.raises(EngineUnavailable, match="stopped"):
                await house.engine.predict(house.entries(("a", "x")))

    run(test())


def test_before_the_start_nothing_is_taken(tmp_path: Path, backbone: Backbone) -> None:
    async def test() -> None:
        house = House(tmp_path, backbone)
        for refused in (
            house.engine.predict(house.entries(("a", "x"))),
            house.engine.check(b""),
            house.engine.preload(house.keys["a"]),
        ):
            with pytest.raises(NotReady):
                await refused
        with pytest.raises(NotReady):
            _ = house.engine.info
        health = house.engine.health()
        assert health.live
        assert not health.ready
        await house.engine.stop()

    run(test())


def test_ready_comes_after_a_warm_up_with_the_whole_budget(
    tmp_path: Path, backbone: Backbone
) -> None:
    async def test() -> None:
        house = House(tmp_path, backbone, max_batch_tokens=1000)
        house.device.hold()
        starting = asyncio.create_task(house.engine.start())
        assert await asyncio.to_thread(house.device.entered.wait, 10)
        assert not house.engine.health().ready
        with pytest.raises(NotReady, match="warming"):
            await house.engine.predict(house.entries(("a", "x")))
        house.device.free()
        info = await starting
        assert house.engine.health().ready
        assert isinstance(info, EngineInfo)
        assert (info.device, info.dtype, info.max_tokens) == ("cpu", "float32", 128)
        # 128 tokens and 10 prompt slots a row.
        assert house.device.rows == [1, 1000 // 138]
        await house.engine.stop()

    run(test())


@pytest.mark.parametrize("where", ["loading", "warming up"])
def test_a_start_that_fails_says_why_and_leaves_an_engine_that_is_dead(
    tmp_path: Path, backbone: Backbone, where: str
) -> None:
    def broken() -> Backbone:
        raise OSError("no such file")

    async def test() -> None:
        house = House(tmp_path, backbone)
        if where == "loading":
            house.engine = LocalEngine(broken, house.store, house.settings)
        house.device.error = lambda: ValueError("broken kernel")
        with pytest.raises((OSError, RuntimeError), match=r"no such file|ValueError"):
            await house.engine.start()
        assert not house.engine.health().live
        with pytest.raises(EngineUnavailable, match="died"):
            await house.engine.predict(house.entries(("a", "x")))
        await house.engine.stop()

    run(test())


def test_stopping_while_it_starts_ends_the_start(tmp_path: Path, backbone: Backbone) -> None:
    async def test() -> None:
        house = House(tmp_path, backbone)
        house.device.hold()
        starting = asyncio.create_task(house.engine.start())
        assert await asyncio.to_thread(house.device.entered.wait, 10)
        stopping = asyncio.create_task(house.engine.stop())
        await asyncio.sleep(0.01)
        house.device.free()
        with pytest.raises(EngineUnavailable):
            await starting
        await stopping
        assert not house.engine.health().live

    run(test())


def test_a_swap_under_load_answers_by_the_revision_that_was_asked_for(opened: Opened) -> None:
    async def test() -> None:
        async with opened(max_active_adapters=3) as house:
            versions = [make_adapter(house.backbone, seed=seed) for seed in range(6)]
            expected = []
            encoding = house.backbone.encoder.encode("hello you", max_length=64)
            for version in versions:
                prepared = [prepare(version, house.backbone)]
                batch = house.backbone.pack(rows_of(prepared, [(0, encoding)]))
                expected.append(classify(house.backbone, batch, prepared)[0].scores)
            files = [serialize(version) for version in versions]
            revisions = [house.store.put("swapped", data).revision for data in files]
            asked_for = set()
            swaps = 0

            async def ask() -> None:
                asked = 0
                # Both sides go on until the other has done its part, however slow the machine.
                while asked < 8 or swaps < 30:
                    asked += 1
                    revision = house.store.current("swapped")
                    asked_for.add(revision)
                    entry = Entry(AdapterKey("swapped", revision), encoding, len(encoding) + 3)
                    (row,) = (await house.engine.predict([entry])).rows
                    wanted = expected[revisions.index(revision)]
                    np.testing.assert_allclose(row.scores, wanted, rtol=0, atol=SAME)

            clients = asyncio.gather(*(ask() for _ in range(8)))
            while not clients.done():
                await asyncio.to_thread(house.store.put, "swapped", files[swaps % len(files)])
                swaps += 1
            await clients
            assert len(asked_for) > 1
            assert house.recorder.failures == []

    run(test())
