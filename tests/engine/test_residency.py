"""Leases and tiers: leased adapters stay, each file is read once, a damaged one fails alone."""

import asyncio
import sys
import weakref
from collections.abc import Awaitable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters.adapter import PreparedAdapter
from adapters.backbone.model import Backbone
from adapters.format.files import serialize
from service.engine.device_loader import OnLoaded, Outcome
from service.engine.interface import AdapterKey
from service.engine.runners.base import HostAdapter
from service.engine.runners.packed import PackedRunner
from service.engine.turns import NOBODY
from service.errors import AdapterLoadFailed, InvalidRequest
from tests.support.residency_harness import OpenResidency, let_the_loop_run
from tests.support.tiny_models import make_adapter, make_backbone

# A test that hangs fails.
pytestmark = pytest.mark.timeout(30)


async def test_concurrent_requests_share_one_load(open_residency: OpenResidency) -> None:
    async with open_residency(active=2) as harness:
        harness.store.gate.clear()
        asking = [
            asyncio.create_task(harness.residency.acquire(harness.keys_of("a"))) for _ in range(5)
        ]
        await let_the_loop_run()
        assert not any(task.done() for task in asking)
        harness.store.gate.set()
        leases = await asyncio.gather(*asking)
        assert harness.store.reads == 1
        assert len({id(lease[harness.keys["a"]].adapter) for lease in leases}) == 1
        assert harness.recorder.loaded == [("a", "registered"), ("a", "active")]


async def test_the_least_recently_used_is_evicted_and_leased_adapters_stay(
    open_residency: OpenResidency,
) -> None:
    async with open_residency(active=3) as harness:
        held = await harness.residency.acquire(harness.keys_of("a"))
        for name in "bcb":
            await harness.use(name)
        await harness.use("d")
        assert harness.recorder.evicted == [("c", "active")]
        await harness.use("e")
        assert harness.recorder.evicted == [("c", "active"), ("b", "active")]
        harness.residency.release(held)
        assert harness.recorder.sizes["active"][0] == 3


async def test_threads_get_the_interpreter_sooner_while_adapters_are_loaded_and_only_then(
    open_residency: OpenResidency,
) -> None:
    usual = sys.getswitchinterval()
    async with open_residency(active=2) as harness:
        residency = harness.residency
        harness.store.gate.clear()
        one, other = (asyncio.create_task(residency.acquire(harness.keys_of(n))) for n in "ab")
        await harness.store.until_reads(2)
        assert sys.getswitchinterval() == pytest.approx(0.001)
        harness.store.gate.set()
        residency.release(await one)
        residency.release(await other)
        assert sys.getswitchinterval() == usual
        # One whose file is gone is a load that ends, too.
        harness.store.delete("c")
        with pytest.raises(AdapterLoadFailed):
            await residency.acquire(harness.keys_of("c"))
        assert sys.getswitchinterval() == usual
        await harness.use("a")
        assert sys.getswitchinterval() == usual


async def test_activating_a_registered_adapter_reads_no_file(open_residency: OpenResidency) -> None:
    async with open_residency(active=1, registered=2) as harness:
        for name in "aba":
            await harness.use(name)
        assert harness.store.reads == 2
        for name in "ca":
            await harness.use(name)
        # c pushed b out of host memory, not a, which was used later.
        assert harness.store.reads == 3
        assert [item for item in harness.recorder.evicted if item[1] == "registered"] == [
            ("b", "registered")
        ]
        assert harness.recorder.sizes["registered"][0] == 2
        assert harness.recorder.sizes["registered"][1] > harness.recorder.sizes["active"][1] > 0


async def test_more_adapters_than_can_ever_be_active_are_refused_at_once(
    open_residency: OpenResidency,
) -> None:
    async with open_residency(active=2) as harness:
        with pytest.raises(InvalidRequest, match="3 adapters in one request, at most 2"):
            await harness.residency.acquire(harness.keys_of("abc"))
        assert harness.store.reads == 0


@pytest.mark.parametrize("damage", ["damaged", "missing", "other backbone", "not an adapter"])
async def test_an_adapter_that_cannot_be_loaded_fails_by_name_and_leaves_no_trace(
    open_residency: OpenResidency, damage: str
) -> None:
    async with open_residency(active=2) as harness:
        path = harness.store.path("b", harness.keys["b"].revision)
        good = path.read_bytes()
        if damage == "damaged":
            path.write_bytes(good[:-1] + b"\x00")
        elif damage == "missing":
            path.unlink()
        else:
            data = b"{}"
            if damage == "other backbone":
                data = serialize(make_adapter(make_backbone(seed=1)))
            harness.store.put("b", data)
            harness.keys["b"] = AdapterKey("b", harness.store.current("b"))
        for _ in range(3):
            with pytest.raises(AdapterLoadFailed, match="adapter 'b'"):
                await harness.residency.acquire(harness.keys_of("ab"))
        lease = await harness.residency.acquire(harness.keys_of("ac"))
        harness.residency.release(lease)
        assert ("b", "active") not in harness.recorder.loaded
        harness.store.put("b", good)
        harness.keys["b"] = AdapterKey("b", harness.store.current("b"))
        await harness.use("ab")


async def test_requests_that_wait_for_a_damaged_file_fail_and_hold_nothing(
    open_residency: OpenResidency,
) -> None:
    async with open_residency(active=2) as harness:
        harness.store.path("b", harness.keys["b"].revision).write_bytes(b"damaged")
        harness.store.gate.clear()
        asking = [
            asyncio.create_task(harness.residency.acquire(harness.keys_of(names)))
            for names in ("ab", "b", "ba", "cd")
        ]
        await let_the_loop_run()
        harness.store.gate.set()
        answers = await asyncio.gather(*asking, return_exceptions=True)
        assert [type(answer) for answer in answers[:3]] == [AdapterLoadFailed] * 3
        # Only possible if the failed requests hold no slot.
        assert isinstance(answers[3], dict)


async def test_there_is_room_until_every_slot_is_taken(open_residency: OpenResidency) -> None:
    async with open_residency(active=2) as harness:
        assert harness.residency.has_room(harness.keys["a"])
        await harness.use("ab")
        assert harness.residency.has_room(harness.keys["a"])
        assert not harness.residency.has_room(harness.keys["c"])


@pytest.mark.slow
@pytest.mark.timeout(120)
@given(
    requests=st.lists(
        st.tuples(
            st.lists(st.sampled_from("abcde"), min_size=1, max_size=3, unique=True),
            st.integers(0, 3),
            st.booleans(),
        ),
        min_size=1,
        max_size=25,
    ),
    damaged=st.sampled_from(["", "c"]),
)
@settings(max_examples=30, deadline=None)
async def test_after_any_mixture_of_requests_every_lease_is_released(
    open_residency: OpenResidency, requests: list[tuple[list[str], int, bool]], damaged: str
) -> None:
    async with open_residency(active=3, registered=2) as harness:
        for name in damaged:
            harness.store.path(name, harness.keys[name].revision).write_bytes(b"damaged")

        async def ask(names: list[str], steps: int) -> None:
            lease = await harness.residency.acquire(harness.keys_of("".join(names)))
            try:
                for key, slot in lease.items():
                    assert slot.key == key
                    assert slot.adapter is not None
                for _ in range(steps):
                    await asyncio.sleep(0)
                    # While leased, it is still the slot that other requests get.
                    for key, slot in lease.items():
                        assert harness.residency._active[key] is slot
            finally:
                harness.residency.release(lease)

        tasks: list[Awaitable[None]] = []
        for names, steps, cancelled in requests:
            task = asyncio.create_task(ask(names, steps))
            tasks.append(task)
            await asyncio.sleep(0)
            if cancelled:
                task.cancel()
        for answer in await asyncio.gather(*tasks, return_exceptions=True):
            assert answer is None or isinstance(answer, (AdapterLoadFailed, asyncio.CancelledError))
        slots = harness.residency._active
        assert all(slot.leases == 0 for slot in slots.values())
        assert len(slots) <= 3
        assert not harness.residency._queue
        assert not harness.residency._loading


async def test_a_retired_adapter_leaves_both_tiers_and_memory(
    open_residency: OpenResidency,
) -> None:
    async with open_residency(active=2) as harness:
        lease = await harness.residency.acquire(harness.keys_of("a"))
        adapter = lease[harness.keys["a"]].adapter
        assert isinstance(adapter, PreparedAdapter)
        assert adapter.head is not None
        tensor = weakref.ref(adapter.head.out)
        del adapter
        harness.residency.release(lease)
        await harness.use("b")
        harness.residency.retire(harness.keys["a"])
        # The lease is still referred to, as by a lane's last batch.
        assert tensor() is None
        assert {tier: size for tier, (size, _) in harness.recorder.sizes.items()} == {
            "registered": 1,
            "active": 1,
        }
        assert harness.recorder.evicted == []
        # Its slot is free again.
        await harness.use("c")
        assert harness.recorder.evicted == []


async def test_a_retired_adapter_stays_while_requests_hold_it(
    open_residency: OpenResidency,
) -> None:
    async with open_residency(active=2) as harness:
        first = await harness.residency.acquire(harness.keys_of("a"))
        second = await harness.residency.acquire(harness.keys_of("ab"))
        harness.residency.retire(harness.keys["a"])
        for lease in (first, second):
            assert lease[harness.keys["a"]].adapter is not None
            harness.residency.release(lease)
        assert harness.residency.has_room(harness.keys["c"])
        assert harness.recorder.sizes["registered"][0] == 1
        assert harness.recorder.sizes["active"][0] == 1


async def test_an_adapter_that_is_retired_while_it_loads_leaves_once_it_was_used(
    open_residency: OpenResidency,
) -> None:
    async with open_residency(active=1) as harness:
        harness.store.gate.clear()
        waiting, behind = (
            asyncio.create_task(harness.residency.acquire(harness.keys_of(name))) for name in "ab"
        )
        await let_the_loop_run()
        for name in "ab":
            harness.residency.retire(harness.keys[name])
        harness.store.gate.set()
        for task in (waiting, behind):
            harness.residency.release(await task)
        assert harness.recorder.loaded.count(("b", "active")) == 1
        assert harness.recorder.sizes["registered"] == (0, 0)
        assert harness.recorder.sizes["active"] == (0, 0)


async def test_a_retired_adapter_that_nobody_waits_for_leaves_once_it_is_read(
    open_residency: OpenResidency,
) -> None:
    async with open_residency(active=1) as harness:
        harness.store.gate.clear()
        leaving = asyncio.create_task(harness.residency.acquire(harness.keys_of("a")))
        await harness.store.until_reads(1)
        leaving.cancel()
        await let_the_loop_run()
        harness.residency.retire(harness.keys["a"])
        harness.store.gate.set()
        for _ in range(10_000):
            if harness.recorder.sizes.get("active") == (0, 0):
                break
            await asyncio.sleep(0.001)
        assert harness.recorder.sizes == {"registered": (0, 0), "active": (0, 0)}


async def test_a_retired_adapter_that_is_published_again_stays(
    open_residency: OpenResidency,
) -> None:
    async with open_residency(active=1) as harness:
        lease = await harness.residency.acquire(harness.keys_of("a"))
        harness.residency.retire(harness.keys["a"])
        await harness.residency.preload(harness.keys["a"])
        harness.residency.release(lease)
        await harness.use("a")
        assert harness.store.reads == 1


async def test_bytes_limit_the_device_as_well_and_leased_adapters_stay(
    open_residency: OpenResidency,
) -> None:
    async with open_residency(active=8) as harness:
        await harness.use("a")
        one = harness.recorder.sizes["active"][1]
    # Room for two and a half.
    async with open_residency(active=8, max_active_bytes=5 * one // 2) as harness:
        for name in "abc":
            await harness.use(name)
        assert harness.recorder.evicted == [("a", "active")]
        assert not harness.residency.has_room(harness.keys["d"])
        held = await harness.residency.acquire(harness.keys_of("bcde"))
        # One request may take more than fits; afterwards only two stay.
        assert harness.recorder.sizes["active"] == (4, 4 * one)
        harness.residency.release(held)
        assert harness.recorder.evicted == [("a", "active"), ("b", "active"), ("c", "active")]
        await harness.use("de")
        assert harness.recorder.loaded.count(("d", "active")) == 1
        assert harness.recorder.loaded.count(("e", "active")) == 1


async def test_bytes_limit_host_memory_as_well(open_residency: OpenResidency) -> None:
    async with open_residency(active=1) as harness:
        await harness.use("a")
        one = harness.recorder.sizes["registered"][1]
    async with open_residency(active=1, max_registered_bytes=2 * one) as harness:
        for name in "abc":
            await harness.use(name)
        assert ("a", "registered") in harness.recorder.evicted
        assert harness.recorder.sizes["registered"] == (2, 2 * one)


async def test_the_reported_size_is_that_after_adapters_were_evicted_for_their_bytes(
    open_residency: OpenResidency, backbone: Backbone
) -> None:
    one = PackedRunner(backbone).prepare(make_adapter(backbone)).nbytes
    async with open_residency(active=8, max_active_bytes=one) as harness:
        await harness.use("abc")
        assert harness.recorder.sizes["active"] == (1, one)


async def test_a_load_that_failed_leaves_no_adapter_in_the_reported_size(
    open_residency: OpenResidency,
) -> None:
    async with open_residency(active=1) as harness:
        await harness.use("a")
        key = harness.keys["b"]
        harness.store.path("b", key.revision).write_bytes(b"rotten")
        with pytest.raises(AdapterLoadFailed):
            await harness.use("b")
        assert harness.recorder.sizes["active"] == (0, 0)


async def test_a_trial_that_is_cancelled_once_it_is_loaded_gives_its_slot_back(
    open_residency: OpenResidency, backbone: Backbone
) -> None:
    adapter = PackedRunner(backbone).prepare(make_adapter(backbone))
    async with open_residency(active=1) as harness:
        residency, load = harness.residency, harness.loader.load

        def load_and_cancel(slot: int, tried: HostAdapter, on_loaded: OnLoaded, *of: Any) -> None:
            def loaded(outcome: Outcome, seconds: float) -> None:
                on_loaded(outcome, seconds)
                # Its client leaves now, before the task that waits for this has run.
                task.cancel()

            load(slot, tried, loaded, *of)

        for revision in ("1", "2"):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(harness.loader, "load", load_and_cancel)
                key = AdapterKey("tried", revision)
                task = asyncio.create_task(residency.try_out(key, adapter, NOBODY))
                with pytest.raises(asyncio.CancelledError):
                    await task
        async with asyncio.timeout(10):
            lease = await residency.try_out(AdapterKey("tried", "3"), adapter, NOBODY)
        residency.release(lease)
