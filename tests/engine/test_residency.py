"""Leases and tiers: what is held stays, who waits is served in order, a bad file hurts nobody."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters.backbone.model import Backbone
from adapters.format.files import serialize
from service.engine.interface import AdapterKey
from service.errors import AdapterLoadFailed, InvalidRequest
from tests.support.residency_harness import opened, run, soon
from tests.support.tiny_models import make_adapter, make_backbone

Opened = Callable[..., Any]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, backbone: Backbone) -> Opened:
    return lambda **limits: opened(tmp_path_factory.mktemp("store"), backbone, **limits)


def test_an_adapter_is_loaded_once_however_many_ask(place: Opened) -> None:
    async def test() -> None:
        async with place(active=2) as here:
            here.store.gate.clear()
            asking = [asyncio.create_task(here.residency.acquire(here.of("a"))) for _ in range(5)]
            await soon()
            assert not any(task.done() for task in asking)
            here.store.gate.set()
            leases = await asyncio.gather(*asking)
            assert here.store.reads == 1
            assert len({id(lease[here.keys["a"]].prepared) for lease in leases}) == 1
            assert here.recorder.loaded == [("a", "registered"), ("a", "active")]

    run(test())


def test_the_least_recently_used_goes_and_what_is_leased_stays(place: Opened) -> None:
    async def test() -> None:
        async with place(active=3) as here:
            held = await here.residency.acquire(here.of("a"))
            for name in "bcb":
                here.residency.release(await here.residency.acquire(here.of(name)))
            here.residency.release(await here.residency.acquire(here.of("d")))
            assert here.recorder.evicted == [("c", "active")]
            here.residency.release(await here.residency.acquire(here.of("e")))
            assert here.recorder.evicted == [("c", "active"), ("b", "active")]
            here.residency.release(held)
            assert here.recorder.sizes["active"][0] == 3

    run(test())


def test_coming_back_from_host_memory_reads_no_file(place: Opened) -> None:
    async def test() -> None:
        async with place(active=1, registered=2) as here:
            for name in "aba":
                here.residency.release(await here.residency.acquire(here.of(name)))
            assert here.store.reads == 2
            for name in "ca":
                here.residency.release(await here.residency.acquire(here.of(name)))
            # c pushed b out of host memory, not a, which was used later.
            assert here.store.reads == 3
            assert [item for item in here.recorder.evicted if item[1] == "registered"] == [
                ("b", "registered")
            ]
            assert here.recorder.sizes["registered"][0] == 2
            assert here.recorder.sizes["registered"][1] > here.recorder.sizes["active"][1] > 0

    run(test())


def test_more_adapters_than_can_ever_be_active_are_refused_at_once(place: Opened) -> None:
    async def test() -> None:
        async with place(active=2) as here:
            with pytest.raises(InvalidRequest, match="3 adapters in one request, at most 2"):
                await here.residency.acquire(here.of("abc"))
            assert here.store.reads == 0

    run(test())


@pytest.mark.parametrize("damage", ["rotten", "missing", "other backbone", "not an adapter"])
def test_a_file_that_cannot_be_loaded_fails_by_name_and_poisons_nothing(
    place: Opened, damage: str
) -> None:
    async def test() -> None:
        async with place(active=2) as here:
            path = here.store.path("b", here.keys["b"].revision)
            good = path.read_bytes()
            if damage == "rotten":
                path.write_bytes(good[:-1] + b"\x00")
            elif damage == "missing":
                path.unlink()
            else:
                data = b"{}"
                if damage == "other backbone":
                    data = serialize(make_adapter(make_backbone(seed=1)))
                here.store.put("b", data)
                here.keys["b"] = AdapterKey("b", here.store.current("b"))
            for _ in range(3):
                with pytest.raises(AdapterLoadFailed, match="adapter 'b'"):
                    await here.residency.acquire(here.of("ab"))
            lease = await here.residency.acquire(here.of("ac"))
            here.residency.release(lease)
            assert ("b", "active") not in here.recorder.loaded
            here.store.put("b", good)
            here.keys["b"] = AdapterKey("b", here.store.current("b"))
            here.residency.release(await here.residency.acquire(here.of("ab")))

    run(test())


def test_all_who_wait_for_a_bad_file_fail_and_their_other_leases_end(place: Opened) -> None:
    async def test() -> None:
        async with place(active=2) as here:
            here.store.path("b", here.keys["b"].revision).write_bytes(b"rotten")
            here.store.gate.clear()
            asking = [
                asyncio.create_task(here.residency.acquire(here.of(names)))
                for names in ("ab", "b", "ba", "cd")
            ]
            await soon()
            here.store.gate.set()
            answers = await asyncio.gather(*asking, return_exceptions=True)
            assert [type(item) for item in answers[:3]] == [AdapterLoadFailed] * 3
            # Only possible when the failed ones hold nothing any more.
            assert isinstance(answers[3], dict)

    run(test())


def test_room_is_there_until_every_slot_is_taken(place: Opened) -> None:
    async def test() -> None:
        async with place(active=2) as here:
            assert here.residency.has_room(here.keys["a"])
            here.residency.release(await here.residency.acquire(here.of("ab")))
            assert here.residency.has_room(here.keys["a"])
            assert not here.residency.has_room(here.keys["c"])

    run(test())


@given(
    wanted=st.lists(
        st.tuples(
            st.lists(st.sampled_from("abcde"), min_size=1, max_size=3, unique=True),
            st.integers(0, 3),
            st.booleans(),
        ),
        min_size=1,
        max_size=25,
    ),
    rotten=st.sampled_from(["", "c"]),
)
@settings(max_examples=30, deadline=None)
def test_any_mixture_ends_with_every_lease_returned(
    place: Opened, wanted: list[tuple[list[str], int, bool]], rotten: str
) -> None:
    async def test() -> None:
        async with place(active=3, registered=2) as here:
            for name in rotten:
                here.store.path(name, here.keys[name].revision).write_bytes(b"rotten")

            async def ask(names: list[str], steps: int) -> None:
                lease = await here.residency.acquire(here.of("".join(names)))
                try:
                    for key, slot in lease.items():
                        assert slot.key == key
                        assert slot.prepared is not None
                    for _ in range(steps):
                        await asyncio.sleep(0)
                        # Leased: still the slot that everybody else gets.
                        for key, slot in lease.items():
                            assert here.residency._active[key] is slot
                finally:
                    here.residency.release(lease)

            tasks: list[Awaitable[None]] = []
            for names, steps, cancelled in wanted:
                task = asyncio.create_task(ask(names, steps))
                tasks.append(task)
                await asyncio.sleep(0)
                if cancelled:
                    task.cancel()
            for answer in await asyncio.gather(*tasks, return_exceptions=True):
                assert answer is None or isinstance(
                    answer, (AdapterLoadFailed, asyncio.CancelledError)
                )
            slots = here.residency._active
            assert all(slot.leases == 0 for slot in slots.values())
            assert len(slots) <= 3
            assert not here.residency._queue
            assert not here.residency._arming

    run(test())
