"""Waiting for a place on the device: in order of arrival, passed a bounded number of times, left at
any moment."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from adapters.backbone.model import Backbone
from service.engine.residency import MAX_OVERTAKEN
from service.errors import EngineUnavailable
from tests.support.residency_harness import opened, run, soon

Opened = Callable[..., Any]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, backbone: Backbone) -> Opened:
    return lambda **limits: opened(tmp_path_factory.mktemp("store"), backbone, **limits)


def test_who_waits_for_slots_is_served_in_order_of_arrival(place: Opened) -> None:
    async def test() -> None:
        async with place(active=2) as here:
            first = await here.residency.acquire(here.of("ab"))
            served: list[str] = []

            async def ask(names: str) -> None:
                lease = await here.residency.acquire(here.of(names))
                served.append(names)
                await asyncio.sleep(0.001)
                here.residency.release(lease)

            async with asyncio.TaskGroup() as tasks:
                for names in ("cd", "ce", "ac", "e"):
                    tasks.create_task(ask(names))
                await soon()
                assert served == []
                here.residency.release(first)
            assert served == ["cd", "ce", "ac", "e"]

    run(test())


def test_what_is_active_passes_who_waits_for_room_but_not_for_ever(place: Opened) -> None:
    async def test() -> None:
        async with place(active=2) as here:
            held = await here.residency.acquire(here.of("ab"))
            waiting = asyncio.create_task(here.residency.acquire(here.of("c")))
            await soon()
            # Always one lease of each, so that there is never room.
            for _ in range(MAX_OVERTAKEN):
                following = await asyncio.wait_for(here.residency.acquire(here.of("ab")), 5)
                here.residency.release(held)
                held = following
            passing = asyncio.create_task(here.residency.acquire(here.of("ab")))
            await soon()
            assert not passing.done()
            here.residency.release(held)
            here.residency.release(await asyncio.wait_for(waiting, 5))
            here.residency.release(await asyncio.wait_for(passing, 5))

    run(test())


def test_who_waits_for_room_finds_the_file_read(place: Opened) -> None:
    async def test() -> None:
        async with place(active=1) as here:
            held = await here.residency.acquire(here.of("a"))
            waiting = asyncio.create_task(here.residency.acquire(here.of("b")))
            await here.store.was_read(2)
            assert not waiting.done()
            here.residency.release(held)
            here.residency.release(await waiting)
            assert here.store.reads == 2

    run(test())


def test_what_somebody_waits_for_is_evicted_last(place: Opened) -> None:
    async def test() -> None:
        async with place(active=4) as here:
            for name in "ab":
                here.residency.release(await here.residency.acquire(here.of(name)))
            held = await here.residency.acquire(here.of("cd"))
            waiting = [
                asyncio.create_task(here.residency.acquire(here.of(names)))
                for names in ("efg", "ah")
            ]
            await soon()
            assert here.recorder.evicted == []
            here.residency.release(held)
            # a was used longest ago, but whoever is next wants it.
            first = await asyncio.wait_for(waiting[0], 5)
            assert [name for name, _ in here.recorder.evicted] == ["b", "c", "d"]
            here.residency.release(first)
            here.residency.release(await asyncio.wait_for(waiting[1], 5))
            assert [name for name, tier in here.recorder.loaded if tier == "active"].count("a") == 1

    run(test())


def test_requests_that_want_each_others_adapters_do_not_block_for_ever(place: Opened) -> None:
    async def test() -> None:
        async with place(active=2) as here:

            async def ask(names: str) -> None:
                lease = await here.residency.acquire(here.of(names))
                await asyncio.sleep(0)
                here.residency.release(lease)

            wanted = ("ab", "bc", "ca", "dc", "ad", "e", "ea", "cb") * 5
            await asyncio.wait_for(asyncio.gather(*(ask(names) for names in wanted)), 10)

    run(test())


@pytest.mark.parametrize("when", ["waiting for slots", "loading"])
def test_a_cancelled_request_leaves_no_lease_and_no_place_in_the_queue(
    place: Opened, when: str
) -> None:
    async def test() -> None:
        async with place(active=2) as here:
            held = None
            if when == "waiting for slots":
                held = await here.residency.acquire(here.of("ab"))
            else:
                here.store.gate.clear()
            cancelled = asyncio.create_task(here.residency.acquire(here.of("cd")))
            behind = asyncio.create_task(here.residency.acquire(here.of("a")))
            await soon()
            cancelled.cancel()
            await asyncio.gather(cancelled, return_exceptions=True)
            assert cancelled.cancelled()
            here.store.gate.set()
            here.residency.release(await asyncio.wait_for(behind, 5))
            if held is not None:
                here.residency.release(held)
            here.residency.release(await asyncio.wait_for(here.residency.acquire(here.of("be")), 5))

    run(test())


def test_a_cancel_in_the_moment_of_success_gives_the_lease_back(place: Opened) -> None:
    async def test() -> None:
        async with place(active=1) as here:
            held = await here.residency.acquire(here.of("a"))
            other = asyncio.create_task(here.residency.acquire(here.of("a")))
            blocked = asyncio.create_task(here.residency.acquire(here.of("b")))
            waiting = asyncio.create_task(here.residency.acquire(here.of("a")))
            await soon()
            here.residency.release(await other)
            # Both in one step of the loop: b is armed by the release, its task cancelled after it.
            here.residency.release(held)
            blocked.cancel()
            await asyncio.gather(blocked, return_exceptions=True)
            here.residency.release(await asyncio.wait_for(waiting, 5))

    run(test())


def test_everyone_who_waits_can_be_failed_at_once(place: Opened) -> None:
    async def test() -> None:
        async with place(active=1) as here:
            here.store.gate.clear()
            asking = [asyncio.create_task(here.residency.acquire(here.of(name))) for name in "abc"]
            await soon()
            here.residency.fail_all("gone")
            answers = await asyncio.gather(*asking, return_exceptions=True)
            assert [type(item) for item in answers] == [EngineUnavailable] * 3

    run(test())
