"""A residency over a real store, whose reads a test can hold."""

import asyncio
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from threading import Event

from adapters.backbone.model import Backbone
from adapters.format.files import serialize
from adapters.format.store import AdapterStore
from service.engine.device_loader import DeviceLoader
from service.engine.fair_executor import FairExecutor
from service.engine.host_cache import HostCache
from service.engine.interface import AdapterKey
from service.engine.observer import Observer, Tier
from service.engine.residency import Residency
from service.engine.runners.packed import PackedRunner
from tests.support.tiny_models import make_adapter


class RecordingObserver(Observer):
    """Keeps the tiers' events."""

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
    """A real store whose reads wait until a gate opens, like those of a slow disk."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.gate = Event()
        self.gate.set()
        self.reads = 0
        # The names, in the order in which their reads began.
        self.read_names: list[str] = []
        self._reading = Event()

    async def until_reads(self, number: int) -> None:
        """Return once this many reads have begun."""
        while True:
            self._reading.clear()
            if self.reads >= number:
                return
            assert await asyncio.to_thread(self._reading.wait, 10)

    def read(self, name: str, revision: str) -> bytes:
        self.reads += 1
        self.read_names.append(name)
        self._reading.set()
        assert self.gate.wait(10)
        return super().read(name, revision)


class ResidencyHarness:
    """A residency, its store, and what it told its observer."""

    def __init__(
        self,
        residency: Residency,
        loader: DeviceLoader,
        store: GatedStore,
        recorder: RecordingObserver,
    ) -> None:
        self.residency = residency
        self.loader = loader
        self.store = store
        self.recorder = recorder
        self.keys = {name: AdapterKey(name, store.current(name)) for name in store.names()}

    def keys_of(self, names: str) -> tuple[AdapterKey, ...]:
        """Of adapters with names of one letter."""
        return tuple(self.keys[name] for name in names)

    async def use(self, names: str) -> None:
        """Lease adapters and release them."""
        self.residency.release(await self.residency.acquire(self.keys_of(names)))


async def ended(reading: FairExecutor) -> None:
    """Shut it down, and return once what its threads have begun is delivered."""
    reading.shutdown()
    for thread in reading._threads:
        if thread.is_alive():
            await asyncio.to_thread(thread.join, 10)
    await asyncio.sleep(0)


@asynccontextmanager
async def open_residency(
    root: Path,
    backbone: Backbone,
    *,
    active: int,
    registered: int = 99,
    max_active_bytes: int | None = None,
    max_registered_bytes: int | None = None,
) -> AsyncIterator[ResidencyHarness]:
    """A residency over eight stored adapters, `a` to `h`."""
    store, recorder = GatedStore(root), RecordingObserver()
    for seed, name in enumerate("abcdefgh"):
        store.put(name, serialize(make_adapter(backbone, seed=seed)))
    reading = FairExecutor(2, name="reading")
    with ThreadPoolExecutor(1) as copying:
        runner = PackedRunner(backbone)
        host_cache = HostCache(
            store,
            runner,
            reading=reading,
            observer=recorder,
            capacity=registered,
            max_bytes=max_registered_bytes,
        )
        loader = DeviceLoader(runner, copying)
        residency = Residency(
            host_cache,
            loader,
            observer=recorder,
            slots=active,
            trial_slots=1,
            max_bytes=max_active_bytes,
        )
        yield ResidencyHarness(residency, loader, store, recorder)
        store.gate.set()
        await ended(reading)


# The fixture `open_residency`: it takes the numbers of adapters alone.
OpenResidency = Callable[..., AbstractAsyncContextManager[ResidencyHarness]]


async def let_the_loop_run() -> None:
    """Let everything happen that needs no thread."""
    for _ in range(10):
        await asyncio.sleep(0)
