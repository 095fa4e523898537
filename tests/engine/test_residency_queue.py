"""Waiting for slots of the device: order of arrival, turns of clients, overtaking, cancelling."""

import asyncio
import sys

import pytest

from service.engine import residency
from service.engine.residency import MAX_OVERTAKEN, Lease
from service.engine.turns import Client
from service.errors import EngineUnavailable
from tests.support.residency_harness import OpenResidency, let_the_loop_run

# A test that hangs fails.
pytestmark = pytest.mark.timeout(30)


async def test_requests_that_wait_for_slots_are_served_in_order_of_arrival(
    open_residency: OpenResidency,
) -> None:
    async with open_residency(active=2) as harness:
        first = await harness.residency.acquire(harness.keys_of("ab"))
        served: list[str] = []

        async def ask(names: str) -> None:
            lease = await harness.residency.acquire(harness.keys_of(names))
            served.append(names)
            await asyncio.sleep(0.001)
            harness.residency.release(lease)

        async with asyncio.TaskGroup() as tasks:
            for names in ("cd", "ce", "ac", "e"):
                tasks.create_task(ask(names))
            await let_the_loop_run()
            assert served == []
            harness.residency.release(first)
        assert served == ["cd", "ce", "ac", "e"]


@pytest.mark.parametrize("slots", [2, 8])
async def test_clients_take_turns_for_slots_and_for_the_threads_that_read(
    open_residency: OpenResidency, slots: int
) -> None:
    """One client asks for many adapters that are not loaded, and another one for one."""
    async with open_residency(active=slots) as harness:

        async def ask(name: str, client: str) -> None:
            lease = await harness.residency.acquire(harness.keys_of(name), Client(client, 1.0))
            harness.residency.release(lease)

        # Two of them are read, and all others wait: for slots, and for the two threads.
        harness.store.gate.clear()
        async with asyncio.TaskGroup() as tasks:
            for name in "abcdefg":
                tasks.create_task(ask(name, "noisy"))
            await harness.store.until_reads(2)
            tasks.create_task(ask("h", "quiet"))
            await let_the_loop_run()
            harness.store.gate.set()
        # One stands before it in the line, and begins at the same time.
        assert set(harness.store.read_names[:4]) == set("abch")


async def test_a_read_that_a_second_client_waits_for_has_its_turn(
    open_residency: OpenResidency,
) -> None:
    async with open_residency(active=8) as harness:
        harness.store.gate.clear()
        async with asyncio.TaskGroup() as tasks:
            for name, client in (*((name, "noisy") for name in "abcdefgh"), ("h", "quiet")):
                acquiring = harness.residency.acquire(harness.keys_of(name), Client(client, 1.0))
                tasks.create_task(acquiring)
            await harness.store.until_reads(2)
            await let_the_loop_run()
            harness.store.gate.set()
        assert set(harness.store.read_names[:4]) == set("abch")
        assert harness.store.reads == 8


async def test_requests_for_active_adapters_overtake_a_waiting_one_a_bounded_number_of_times(
    open_residency: OpenResidency,
) -> None:
    async with open_residency(active=2) as harness:
        held = await harness.residency.acquire(harness.keys_of("ab"))
        waiting = asyncio.create_task(harness.residency.acquire(harness.keys_of("c")))
        await let_the_loop_run()
        # Both slots are leased all the time, so there is never room.
        for _ in range(MAX_OVERTAKEN):
            following = await asyncio.wait_for(harness.residency.acquire(harness.keys_of("ab")), 5)
            harness.residency.release(held)
            held = following
        overtaking = asyncio.create_task(harness.residency.acquire(harness.keys_of("ab")))
        await let_the_loop_run()
        assert not overtaking.done()
        harness.residency.release(held)
        harness.residency.release(await asyncio.wait_for(waiting, 5))
        harness.residency.release(await asyncio.wait_for(overtaking, 5))


async def test_files_are_read_while_a_request_waits_for_a_slot(
    open_residency: OpenResidency,
) -> None:
    async with open_residency(active=1) as harness:
        held = await harness.residency.acquire(harness.keys_of("a"))
        waiting = asyncio.create_task(harness.residency.acquire(harness.keys_of("b")))
        await harness.store.until_reads(2)
        assert not waiting.done()
        harness.residency.release(held)
        harness.residency.release(await waiting)
        assert harness.store.reads == 2


async def test_files_are_read_for_a_request_that_has_become_one_of_the_first(
    open_residency: OpenResidency, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(residency, "_PREFETCHED", 1)
    async with open_residency(active=1) as harness:
        held = await harness.residency.acquire(harness.keys_of("a"))
        first, second = (
            asyncio.create_task(harness.residency.acquire(harness.keys_of(name))) for name in "bc"
        )
        await harness.store.until_reads(2)
        await let_the_loop_run()
        assert harness.store.reads == 2
        first.cancel()
        await harness.store.until_reads(3)
        assert not second.done()
        harness.residency.release(held)
        harness.residency.release(await second)
        assert harness.store.reads == 3


async def test_adapters_that_a_waiting_request_wants_are_evicted_last(
    open_residency: OpenResidency,
) -> None:
    async with open_residency(active=4) as harness:
        for name in "ab":
            await harness.use(name)
        held = await harness.residency.acquire(harness.keys_of("cd"))
        waiting = [
            asyncio.create_task(harness.residency.acquire(harness.keys_of(names)))
            for names in ("efg", "ah")
        ]
        await let_the_loop_run()
        assert harness.recorder.evicted == []
        harness.residency.release(held)
        # a was used longest ago, but the next request in the queue wants it.
        first = await asyncio.wait_for(waiting[0], 5)
        assert [name for name, _ in harness.recorder.evicted] == ["b", "c", "d"]
        harness.residency.release(first)
        harness.residency.release(await asyncio.wait_for(waiting[1], 5))
        assert [name for name, tier in harness.recorder.loaded if tier == "active"].count("a") == 1


async def test_requests_for_each_others_adapters_do_not_deadlock(
    open_residency: OpenResidency,
) -> None:
    async with open_residency(active=2) as harness:

        async def ask(names: str) -> None:
            lease = await harness.residency.acquire(harness.keys_of(names))
            await asyncio.sleep(0)
            harness.residency.release(lease)

        requests = ("ab", "bc", "ca", "dc", "ad", "e", "ea", "cb") * 5
        await asyncio.wait_for(asyncio.gather(*(ask(names) for names in requests)), 10)


@pytest.mark.parametrize("when", ["waiting for slots", "loading"])
async def test_a_cancelled_request_leaves_no_lease_and_leaves_the_queue(
    open_residency: OpenResidency, when: str
) -> None:
    async with open_residency(active=2) as harness:
        held = None
        if when == "waiting for slots":
            held = await harness.residency.acquire(harness.keys_of("ab"))
        else:
            harness.store.gate.clear()
        cancelled = asyncio.create_task(harness.residency.acquire(harness.keys_of("cd")))
        behind = asyncio.create_task(harness.residency.acquire(harness.keys_of("a")))
        await let_the_loop_run()
        cancelled.cancel()
        await asyncio.gather(cancelled, return_exceptions=True)
        assert cancelled.cancelled()
        harness.store.gate.set()
        harness.residency.release(await asyncio.wait_for(behind, 5))
        if held is not None:
            harness.residency.release(held)
        harness.residency.release(
            await asyncio.wait_for(harness.residency.acquire(harness.keys_of("be")), 5)
        )


async def test_a_request_cancelled_just_after_it_got_its_lease_releases_it(
    open_residency: OpenResidency,
) -> None:
    async with open_residency(active=1) as harness:
        held = await harness.residency.acquire(harness.keys_of("a"))
        other = asyncio.create_task(harness.residency.acquire(harness.keys_of("a")))
        blocked = asyncio.create_task(harness.residency.acquire(harness.keys_of("b")))
        waiting = asyncio.create_task(harness.residency.acquire(harness.keys_of("a")))
        await let_the_loop_run()
        harness.residency.release(await other)
        # In one turn of the loop: the release gives b its slot, then its task is cancelled.
        harness.residency.release(held)
        blocked.cancel()
        await asyncio.gather(blocked, return_exceptions=True)
        harness.residency.release(await asyncio.wait_for(waiting, 5))


async def test_all_waiting_requests_can_be_failed_at_once(open_residency: OpenResidency) -> None:
    async with open_residency(active=1) as harness:
        harness.store.gate.clear()
        asking = [
            asyncio.create_task(harness.residency.acquire(harness.keys_of(name))) for name in "abc"
        ]
        await let_the_loop_run()
        harness.residency.fail_all("gone")
        answers = await asyncio.gather(*asking, return_exceptions=True)
        assert [type(answer) for answer in answers] == [EngineUnavailable] * 3


async def given_up(waiting: "asyncio.Task[Lease]") -> None:
    """A client leaves, or its deadline passes."""
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting


async def test_loads_that_nobody_waits_for_any_more_are_dropped(
    open_residency: OpenResidency,
) -> None:
    usual = sys.getswitchinterval()
    async with open_residency(active=6) as harness:
        residency = harness.residency
        harness.store.gate.clear()
        greedy = asyncio.create_task(residency.acquire(harness.keys_of("abcde")))
        # Both threads read; three wait for them.
        await harness.store.until_reads(2)
        other = asyncio.create_task(residency.acquire(harness.keys_of("e")))
        await let_the_loop_run()
        await given_up(greedy)
        # One that is dropped can be asked for at once.
        again = asyncio.create_task(residency.acquire(harness.keys_of("c")))
        await let_the_loop_run()
        harness.store.gate.set()
        for waiting in (other, again):
            residency.release(await waiting)
        # What was being read is loaded to its end.
        residency.release(await residency.acquire(harness.keys_of("ab")))
        assert harness.store.reads == 4
        assert sorted(harness.recorder.loaded) == [
            (name, tier) for name in "abce" for tier in ("active", "registered")
        ]
        assert sys.getswitchinterval() == usual
        # No slot is lost, and none is given twice.
        lease = await residency.acquire(harness.keys_of("abdfgh"))
        assert len({slot.index for slot in lease.values()}) == 6
        residency.release(lease)


async def test_an_adapter_that_is_retired_while_its_load_waits_is_forgotten_with_it(
    open_residency: OpenResidency,
) -> None:
    async with open_residency(active=3) as harness:
        harness.store.gate.clear()
        waiting = asyncio.create_task(harness.residency.acquire(harness.keys_of("abc")))
        await harness.store.until_reads(2)
        (key,) = harness.keys_of("c")
        harness.residency.retire(key)
        await given_up(waiting)
        assert key not in harness.residency._retired
        harness.store.gate.set()
        await harness.use("c")


async def test_files_that_were_read_for_a_queue_are_dropped_with_their_waiter(
    open_residency: OpenResidency,
) -> None:
    async with open_residency(active=2) as harness:
        residency = harness.residency
        held = await residency.acquire(harness.keys_of("ab"))
        harness.store.gate.clear()
        first, second, third = (
            asyncio.create_task(residency.acquire(harness.keys_of(names)))
            for names in ("cd", "ef", "fg")
        )
        await harness.store.until_reads(4)
        await given_up(second)
        harness.store.gate.set()
        residency.release(held)
        for waiting in (first, third):
            residency.release(await waiting)
        # f was wanted by another one, e by nobody.
        assert {name for name, _ in harness.recorder.loaded} == set("abcdfg")
