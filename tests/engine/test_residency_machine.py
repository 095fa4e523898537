"""The residency under any order of requests: leases hold, no slot is shared, nobody starves, and
what is retired leaves."""

import asyncio
import tempfile
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from adapters.format.files import serialize
from service.engine.residency import Lease
from service.errors import AdapterLoadFailed
from tests.support.residency_harness import let_the_loop_run, open_residency
from tests.support.tiny_models import make_adapter, make_backbone

SLOTS = 3
# Two adapters and a half: with three, one is evicted as soon as nothing leases it.
MAX_BYTES = 20_000
NAMES = "abcde"
# One folder for all examples: publishing the same file again repairs it.
ROOT = tempfile.TemporaryDirectory()
BACKBONE = make_backbone()
FILES = {name: serialize(make_adapter(BACKBONE, seed=seed)) for seed, name in enumerate("abcdefgh")}


class ResidencyMachine(RuleBasedStateMachine):
    """asked: requests that wait, or have not been looked at since they waited."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.stack = AsyncExitStack()
        opened = open_residency(
            Path(ROOT.name), BACKBONE, active=SLOTS, registered=4, max_active_bytes=MAX_BYTES
        )
        self.harness = self.loop.run_until_complete(self.stack.enter_async_context(opened))
        self.asked: list[tuple[str, asyncio.Task[Lease]]] = []
        self.held: list[Lease] = []
        self.damaged: set[str] = set()
        self.ever_damaged = False

    def run_loop(self) -> None:
        self.loop.run_until_complete(let_the_loop_run())
        self.collect()

    def collect(self) -> None:
        for names, task in [item for item in self.asked if item[1].done()]:
            self.asked.remove((names, task))
            if task.cancelled():
                continue
            error = task.exception()
            if error is None:
                lease = task.result()
                assert {key.name for key in lease} == set(names)
                self.held.append(lease)
            else:
                assert isinstance(error, AdapterLoadFailed), error
                assert error.name in names
                assert self.ever_damaged, "nothing was ever damaged"

    @rule(names=st.sets(st.sampled_from(NAMES), min_size=1, max_size=SLOTS).map(sorted))
    def acquire(self, names: list[str]) -> None:
        keys = self.harness.keys_of("".join(names))
        task = self.loop.create_task(self.harness.residency.acquire(keys))
        self.asked.append(("".join(names), task))
        self.run_loop()

    # Threads decide who has been served: what a rule draws must not depend on it.
    @rule(index=st.integers(0, 9))
    def release(self, index: int) -> None:
        if self.held:
            self.loop.run_until_complete(self.end(self.held.pop(index % len(self.held))))
        self.run_loop()

    async def end(self, lease: Lease) -> None:
        self.harness.residency.release(lease)

    @rule(index=st.integers(0, 9))
    def leave(self, index: int) -> None:
        """A client disconnects; its request may have been served in this very moment."""
        if self.asked:
            self.asked[index % len(self.asked)][1].cancel()
        self.run_loop()

    @rule(name=st.sampled_from(NAMES))
    def retire(self, name: str) -> None:
        self.harness.residency.retire(self.harness.keys[name])
        self.run_loop()

    @rule(open_=st.booleans())
    def disk(self, open_: bool) -> None:
        """Reads wait, or those that wait go on."""
        (self.harness.store.gate.set if open_ else self.harness.store.gate.clear)()
        self.run_loop()

    @rule(name=st.sampled_from(NAMES))
    def damage(self, name: str) -> None:
        key = self.harness.keys[name]
        self.harness.store.path(name, key.revision).write_bytes(b"rotten")
        self.damaged.add(name)
        self.ever_damaged = True

    @rule()
    def repair(self) -> None:
        for name in self.damaged:
            self.harness.store.put(name, FILES[name])
        self.damaged.clear()

    @rule()
    def wait(self) -> None:
        self.loop.run_until_complete(asyncio.sleep(0.002))
        self.collect()

    @invariant()
    def slots_are_free_or_of_one_adapter(self) -> None:
        residency = self.harness.residency
        used = [slot.index for slot in residency._active.values()]
        assert sorted(used + residency._free) == list(range(SLOTS))

    @invariant()
    def the_reported_size_is_the_real_one(self) -> None:
        residency, reported = self.harness.residency, self.harness.recorder.sizes.get("active")
        if all(slot.adapter is not None for slot in residency._active.values()):
            assert (reported or (0, 0)) == (len(residency._active), residency._nbytes)

    @invariant()
    def what_is_retired_is_held_or_wanted(self) -> None:
        residency = self.harness.residency
        for key in residency._retired:
            slot = residency._active.get(key)
            assert key in residency._wanted or (slot and (slot.leases or slot.adapter is None))

    @invariant()
    def what_is_leased_stays_loaded(self) -> None:
        residency = self.harness.residency
        for lease in self.held:
            for key, slot in lease.items():
                assert residency._active[key] is slot
                assert slot.adapter is not None
                assert key not in residency._evictable
                assert slot.leases >= sum(key in other for other in self.held)

    def teardown(self) -> None:
        """Everybody is served in the end, and nothing stays leased."""
        self.repair()
        self.harness.store.gate.set()

        async def finish() -> None:
            async with asyncio.timeout(10):
                while self.asked or self.held:
                    self.collect()
                    for lease in self.held:
                        self.harness.residency.release(lease)
                    self.held.clear()
                    await asyncio.sleep(0.001)

        self.loop.run_until_complete(finish())
        residency = self.harness.residency
        assert not residency._queue
        assert not residency._loading
        assert not residency._wanted
        self.loop.run_until_complete(asyncio.sleep(0.01))
        assert all(slot.leases == 0 for slot in residency._active.values())
        assert not residency._retired
        self.slots_are_free_or_of_one_adapter()
        self.loop.run_until_complete(self.stack.aclose())
        self.loop.close()


TestResidency = pytest.mark.slow(ResidencyMachine.TestCase)
TestResidency.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
