"""An engine's life: start, warm-up, trial runs, swaps, drain and stop."""

import asyncio
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from adapters.adapter import classify, prepare, rows_of
from adapters.backbone.model import Backbone
from adapters.errors import IncompatibleAdapter, InvalidAdapter
from adapters.format.files import serialize
from service.engine.engine import LocalEngine
from service.engine.interface import AdapterKey, EngineInfo, Entry
from service.engine.residency import Lease
from service.engine.turns import Client
from service.errors import AdapterLoadFailed, EngineUnavailable, NotReady
from tests.support.engine_harness import (
    SAME,
    EngineHarness,
    OpenEngine,
    adapter_with_infinite_scores,
)
from tests.support.tiny_models import make_adapter, make_backbone

# A test that hangs fails.
pytestmark = pytest.mark.timeout(30)


async def test_checking_a_file_names_its_faults_and_publishes_nothing(
    open_engine: OpenEngine, tmp_path: Path
) -> None:
    file = tmp_path / "file"
    async with open_engine() as harness:
        adapter = make_adapter(harness.backbone, seed=7)
        file.write_bytes(serialize(adapter))
        assert (await harness.engine.check(file)).spec == adapter.spec
        foreign = serialize(make_adapter(make_backbone(seed=5)))
        infinite = serialize(adapter_with_infinite_scores(harness.backbone))
        for content, error, reason in (
            (b"\x80\x04 a pickle", InvalidAdapter, "pickle"),
            (foreign, IncompatibleAdapter, "backbone"),
            (infinite, InvalidAdapter, "not finite"),
        ):
            file.write_bytes(content)
            with pytest.raises(error, match=reason):
                await harness.engine.check(file)
        assert harness.store.names() == ["a", "b", "c"]


async def test_preloading_fills_free_slots_and_evicts_no_adapter(open_engine: OpenEngine) -> None:
    async with open_engine(max_active_adapters=2) as harness:
        for name in "abc":
            await harness.engine.preload(harness.keys[name])
        for name in "abc":
            # Only c is not loaded yet.
            harness.store.path(name, harness.keys[name].revision).unlink()
        await harness.engine.predict(harness.entries(("a", "x"), ("b", "x")))
        with pytest.raises(AdapterLoadFailed):
            await harness.engine.predict(harness.entries(("c", "x")))


async def test_draining_answers_admitted_requests_and_refuses_new_ones(
    open_engine: OpenEngine,
) -> None:
    async with open_engine() as harness:
        held = await harness.hold_device()
        entries = harness.entries(("b", "x"))
        taken = asyncio.create_task(harness.engine.predict(entries))
        await harness.until_waiting(1)
        draining = asyncio.create_task(harness.engine.drain())
        await asyncio.sleep(0.01)
        assert not draining.done()
        health = harness.engine.health()
        assert health.live
        assert not health.ready
        with pytest.raises(EngineUnavailable, match="draining"):
            await harness.engine.predict(entries)
        harness.device.release()
        await draining
        assert held.done()
        harness.assert_answered_as_alone(entries, await taken)
        await asyncio.wait_for(harness.engine.drain(), 1)


async def test_stopping_fails_waiting_requests_at_once(open_engine: OpenEngine) -> None:
    before = set(threading.enumerate())
    async with open_engine(max_active_adapters=1) as harness:
        held = await harness.hold_device()
        queued = asyncio.create_task(harness.engine.predict(harness.entries(("a", "x"))))
        for_a_slot = asyncio.create_task(harness.engine.predict(harness.entries(("b", "x"))))
        await harness.until_waiting(1)
        stopping = asyncio.create_task(harness.engine.stop())
        answers = await asyncio.gather(held, queued, for_a_slot, return_exceptions=True)
        assert [type(answer) for answer in answers] == [EngineUnavailable] * 3
        assert not stopping.done()
        harness.device.release()
        await stopping
        await harness.engine.stop()
        assert not harness.engine.health().live
        started = set(threading.enumerate()) - before
        assert not any(thread.name == "engine" for thread in started)
        with pytest.raises(EngineUnavailable, match="stopped"):
            await harness.engine.predict(harness.entries(("a", "x")))


async def test_a_request_that_gets_its_lease_just_as_the_engine_ends_fails(
    open_engine: OpenEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_engine() as harness:
        assert harness.engine._parts is not None
        residency = harness.engine._parts.residency
        acquire = residency.acquire

        async def acquire_at_the_end(keys: Sequence[AdapterKey], client: Client) -> Lease:
            lease = await acquire(keys, client)
            harness.engine._die(OSError("gone"))
            return lease

        monkeypatch.setattr(residency, "acquire", acquire_at_the_end)
        with pytest.raises(EngineUnavailable, match="died: OSError: gone"):
            await harness.engine.predict(harness.entries(("a", "x")))
        assert harness.engine.health().details["waiting_tokens"] == 0
        assert harness.recorder.failures == [("unavailable", 1)]


async def test_before_the_start_every_call_is_refused(tmp_path: Path, backbone: Backbone) -> None:
    harness = EngineHarness(tmp_path, backbone)
    for refused in (
        harness.engine.predict(harness.entries(("a", "x"))),
        harness.engine.check(tmp_path / "none"),
        harness.engine.preload(harness.keys["a"]),
    ):
        with pytest.raises(NotReady):
            await refused
    with pytest.raises(NotReady):
        _ = harness.engine.info
    health = harness.engine.health()
    assert health.live
    assert not health.ready
    await harness.engine.stop()


async def test_the_engine_is_ready_after_a_warm_up_with_the_whole_budget(
    tmp_path: Path, backbone: Backbone
) -> None:
    harness = EngineHarness(tmp_path, backbone, max_batch_tokens=1000)
    harness.device.hold()
    starting = asyncio.create_task(harness.engine.start())
    assert await asyncio.to_thread(harness.device.entered.wait, 10)
    assert not harness.engine.health().ready
    with pytest.raises(NotReady, match="warming"):
        await harness.engine.predict(harness.entries(("a", "x")))
    harness.device.release()
    info = await starting
    assert harness.engine.health().ready
    assert isinstance(info, EngineInfo)
    assert (info.device, info.dtype, info.max_tokens) == ("cpu", "float32", 128)
    # 128 tokens and 10 prompt positions a row.
    short, full, *timed = harness.device.rows
    assert (short, full) == (1, 1000 // 138)
    assert len(timed) == 2
    load = harness.engine.load
    assert load is not None
    assert load.rate > 0
    await harness.engine.stop()


@pytest.mark.parametrize("where", ["loading", "warming up"])
async def test_a_failed_start_says_why_and_leaves_a_dead_engine(
    tmp_path: Path, backbone: Backbone, where: str
) -> None:
    def broken() -> Backbone:
        raise OSError("no such file")

    harness = EngineHarness(tmp_path, backbone)
    if where == "loading":
        harness.engine = LocalEngine(broken, harness.store, harness.settings)
    harness.device.error = lambda: ValueError("broken kernel")
    with pytest.raises((OSError, RuntimeError), match=r"no such file|ValueError"):
        await harness.engine.start()
    assert not harness.engine.health().live
    with pytest.raises(EngineUnavailable, match="died"):
        await harness.engine.predict(harness.entries(("a", "x")))
    await harness.engine.stop()


async def test_stopping_while_it_starts_ends_the_start(tmp_path: Path, backbone: Backbone) -> None:
    harness = EngineHarness(tmp_path, backbone)
    harness.device.hold()
    starting = asyncio.create_task(harness.engine.start())
    assert await asyncio.to_thread(harness.device.entered.wait, 10)
    stopping = asyncio.create_task(harness.engine.stop())
    await asyncio.sleep(0.01)
    harness.device.release()
    with pytest.raises(EngineUnavailable):
        await starting
    await stopping
    assert not harness.engine.health().live


async def test_during_swaps_every_request_is_answered_by_its_revision(
    open_engine: OpenEngine,
) -> None:
    async with open_engine(max_active_adapters=3) as harness:
        versions = [make_adapter(harness.backbone, seed=seed) for seed in range(6)]
        expected = []
        encoding = harness.backbone.encoder.encode("hello you", max_length=64)
        for version in versions:
            prepared = [prepare(version, harness.backbone)]
            batch = harness.backbone.pack(rows_of(prepared, [(0, encoding)]))
            expected.append(classify(harness.backbone, batch, prepared)[0].scores)
        files = [serialize(version) for version in versions]
        revisions = [harness.store.put("swapped", data).revision for data in files]
        requested = set()
        swaps = 0

        async def ask() -> None:
            asked = 0
            # Both sides go on until the other has done enough, on machines of any speed.
            while asked < 8 or swaps < 30:
                asked += 1
                revision = harness.store.current("swapped")
                requested.add(revision)
                entry = Entry(AdapterKey("swapped", revision), encoding, len(encoding) + 3)
                (row,) = (await harness.engine.predict([entry])).rows
                scores = expected[revisions.index(revision)]
                np.testing.assert_allclose(row.scores, scores, rtol=0, atol=SAME)

        clients = asyncio.gather(*(ask() for _ in range(8)))
        while not clients.done():
            await asyncio.to_thread(harness.store.put, "swapped", files[swaps % len(files)])
            swaps += 1
        await clients
        assert len(requested) > 1
        assert harness.recorder.failures == []
