"""A residency on a real store, whose reads a test can hold."""

import asyncio
from collections.abc import AsyncIterator, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from threading import Event
from typing import Any

from adapters.backbone.model import Backbone
from adapters.format.files import serialize
from adapters.format.store import AdapterStore
from service.engine.device_loader import Placing
from service.engine.host_cache import HostTier
from service.engine.interface import AdapterKey
from service.engine.observer import SilentObserver, Tier
from service.engine.residency import Residency
from service.engine.runners.packed import PackedRunner
from tests.support.tiny_models import make_adapter


class Recorder(SilentObserver):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.loaded: list[tuple[str, Tier]] = []
        self.evicted: list[tuple[str, Tier]] = []
        self.sizes: dict[Tier, tuple[int, int]] = {}

    def adapter_loaded(self, key: AdapterKey, tier: Tier, seconds: float) -> None:
        assert seconds >= 0.0
        self.loaded.append((key.name, tier))

    def adapter_evicted(self, key: AdapterKey, tier: Tier, age_seconds: float) -> None:
        assert age_seconds >= 0.0
        self.evicted.append((key.name, tier))

    def tier_size(self, tier: Tier, adapters: int, bytes_held: int) -> None:
        self.sizes[tier] = (adapters, bytes_held)


class GatedStore(AdapterStore):
    """A real store whose reads wait for a gate, as those of a slow disk would."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.gate = Event()
        self.gate.set()
        self.reads = 0
        self._reading = Event()

    async def was_read(self, number: int) -> None:
        """Return once so many files have been asked for."""
        while True:
            self._reading.clear()
            if self.reads >= number:
                return
            assert await asyncio.to_thread(self._reading.wait, 10)

    def read(self, name: str, revision: str) -> bytes:
        self.reads += 1
        self._reading.set()
        assert self.gate.wait(10)
        return super().read(name, revision)


class Place:
    """A residency with what stands around it."""

    def __init__(self, residency: Residency, store: GatedStore, recorder: Recorder) -> None:
        self.residency = residency
        self.store = store
        self.recorder = recorder
        self.keys = {name: AdapterKey(name, store.current(name)) for name in store.names()}

    def of(self, names: str) -> tuple[AdapterKey, ...]:
        return tuple(self.keys[name] for name in names)


@asynccontextmanager
async def opened(
    root: Path, backbone: Backbone, *, active: int, registered: int = 99
) -> AsyncIterator[Place]:
    """A residency over eight stored adapters, `a` to `h`."""
    store, recorder = GatedStore(root), Recorder()
    for seed, name in enumerate("abcdefgh"):
        store.put(name, serialize(make_adapter(backbone, seed=seed)))
    with ThreadPoolExecutor(2) as reading, ThreadPoolExecutor(1) as placing:
        runner = PackedRunner(backbone)
        host = HostTier(store, runner, reading=reading, observer=recorder, capacity=registered)
        residency = Residency(
            host, Placing(runner, placing), observer=recorder, places=active, spare=1
        )
        yield Place(residency, store, recorder)
        store.gate.set()


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(test, 30))


async def soon() -> None:
    """Let everything happen that can happen without a thread."""
    for _ in range(10):
        await asyncio.sleep(0)
