"""Adapters in host memory: each file is read once however many requests want it, and the least
recently used adapter is evicted. One that is no longer served is discarded. An adapter is read from
its image (`service.engine.images`), and from its file where there is none.

An image whose adapter goes to the device at once passes host memory by. Its file is in the page
cache, from where a read is one copy into pinned memory, while memory that is kept is fresh memory,
which takes as long again. It is kept when it comes a second time; once host memory is full, when it
has come twice since the least recently used one was last used. So adapters stay that are used more
often than others.

All calls come from one event loop; files are read in threads.
"""

import asyncio
from collections import OrderedDict, deque
from functools import partial
from time import monotonic, perf_counter
from typing import NamedTuple

from adapters.format.files import parse
from adapters.format.store import AdapterStore
from service.engine.fair_executor import FairExecutor
from service.engine.images import Images
from service.engine.interface import AdapterKey
from service.engine.observer import Observer
from service.engine.runners.base import DeviceAdapter, HostAdapter, Loading, Runner
from service.engine.turns import NOBODY, Client

# Making images in the background, for adapters that nobody waits for, takes this share of the time.
_BACKGROUND_SHARE = 0.25
# An adapter that passed by so many times is kept in another one's place.
_PASSES = 2
# Of the adapters that passed by, so many times as many are remembered as host memory may hold.
_REMEMBERED = 4


class Read(NamedTuple):
    """An adapter that was read.

    kept: whether host memory holds it from now on. loaded: it in its slot, if it was loaded, too.
    """

    adapter: HostAdapter
    kept: bool
    loaded: DeviceAdapter | None = None


class _Loads:
    """Loads an adapter into a slot, and after it another one if the first was of no use."""

    def __init__(self, runner: Runner, slot: int | None) -> None:
        self._runner, self._slot = runner, slot
        self._loading: Loading | None = None
        self._error: Exception | None = None

    def begin(self, adapter: HostAdapter) -> None:
        """It raises nothing: what the device cannot load may be read well."""
        if self._slot is None:
            return
        try:
            self.wait()
            self._loading = self._runner.begin_load(self._slot, adapter)
        except Exception as error:
            self._error = error

    def wait(self) -> DeviceAdapter | None:
        """The adapter that was loaded last; None without a slot.

        Raises:
            Exception: what `Runner.begin_load` raised.
        """
        if self._error is not None:
            raise self._error
        return None if self._loading is None else self._loading.wait()


class HostCache:
    """The tier `registered`: adapters in host memory.

    Args:
        reading: has the threads that read, check and prepare files.
        capacity: adapters held.
        max_bytes: of their weights, unless a single one has more; None: no limit.
        images: None: every adapter is read from its file.
    """

    def __init__(
        self,
        store: AdapterStore,
        runner: Runner,
        *,
        reading: FairExecutor,
        observer: Observer,
        capacity: int,
        max_bytes: int | None = None,
        images: Images | None = None,
    ) -> None:
        self._store = store
        self._runner = runner
        self._reading = reading
        self._observer = observer
        self._capacity = capacity
        self._max_bytes = max_bytes
        self._images = images
        # Adapters whose images are to be made, and the task that has them made.
        self._without_image: deque[AdapterKey] = deque()
        self._making: asyncio.Task[None] | None = None
        # Adapters and when they were last used; the least recently used first.
        self._registered: OrderedDict[AdapterKey, tuple[HostAdapter, float]] = OrderedDict()
        self._nbytes = 0
        # What is read or waits for a thread.
        self._loading: dict[AdapterKey, asyncio.Future[Read]] = {}
        # Adapters that passed by, and when for the last two times; those first that did not for
        # longest.
        self._passed: OrderedDict[AdapterKey, tuple[float, ...]] = OrderedDict()

    def get(self, key: AdapterKey) -> HostAdapter | None:
        """A registered adapter, now the most recently used; None if it must be loaded."""
        if key not in self._registered:
            return None
        adapter, _ = self._registered.pop(key)
        self._registered[key] = adapter, monotonic()
        return adapter

    def peek(self, key: AdapterKey) -> HostAdapter | None:
        """A registered adapter, without counting as a use; None if it must be loaded."""
        adapter, _ = self._registered.get(key, (None, 0.0))
        return adapter

    def _is_too_full(self) -> bool:
        most = self._max_bytes
        return len(self._registered) > self._capacity or (most is not None and self._nbytes > most)

    def load(
        self, key: AdapterKey, client: Client = NOBODY, *, slot: int | None = None
    ) -> asyncio.Future[Read]:
        """Read an adapter that is not registered. Calls made meanwhile share one read.

        Args:
            client: takes turns with others where reads wait for a thread.
            slot: where it is loaded by the thread that reads it, unless it is being read already.
                Then it need not be kept.
        """
        if (loading := self._loading.get(key)) is not None:
            return loading
        started = perf_counter()
        passing = slot is not None and not self._is_worth_keeping(key)
        read = partial(self._read, key, slot=slot, passing=passing)
        self._loading[key] = loading = self._reading.submit(read, client)
        loading.add_done_callback(partial(self._loaded, key, started))
        return loading

    def advance(self, key: AdapterKey, client: Client) -> None:
        """Another client waits for a read, too: it has its turn then, if that comes sooner."""
        if (loading := self._loading.get(key)) is not None:
            self._reading.advance(loading, client)

    def cancel(self, key: AdapterKey) -> bool:
        """Drop a read that no thread has begun; whether there was one. Its future is cancelled."""
        loading = self._loading.get(key)
        if loading is None or not self._reading.cancel(loading):
            return False
        del self._loading[key]
        return True

    def add(self, key: AdapterKey, adapter: HostAdapter) -> None:
        """Register an adapter that was made of the same bytes as its stored file."""
        if key not in self._registered and key not in self._loading:
            self._register(key, adapter)

    def keep_image(self, key: AdapterKey, adapter: HostAdapter) -> None:
        """Write the image of such an adapter."""
        if (images := self._images) is not None:
            self._reading.submit(lambda: images.keep(key, images.source_of(key), adapter), NOBODY)

    def discard(self, key: AdapterKey) -> None:
        """Drop an adapter now, or as soon as it has been read. Not counted as an eviction."""
        if (loading := self._loading.get(key)) is not None:
            loading.add_done_callback(lambda _: self.discard(key))
            return
        if (registered := self._registered.pop(key, None)) is not None:
            self._nbytes -= registered[0].nbytes
            self._observer.tier_size("registered", len(self._registered), self._nbytes)
        self._passed.pop(key, None)
        if self._images is not None:
            self._images.discard(key)

    def make_image(self, key: AdapterKey) -> None:
        """Have the image of an adapter made when there is time, so that its first load is quick."""
        images = self._images
        if images is None or not images.writes or key in self._registered or key in self._loading:
            return
        self._without_image.append(key)
        if self._making is None or self._making.done():
            self._making = asyncio.create_task(self._make_images())

    def close(self) -> None:
        """Make no more images."""
        self._without_image.clear()
        if self._making is not None:
            self._making.cancel()
        if self._images is not None:
            self._images.close()

    async def _make_images(self) -> None:
        while self._without_image:
            key, started = self._without_image.popleft(), perf_counter()
            try:
                await self._reading.submit(partial(self._ensure, key), NOBODY)
            except Exception:
                # A request for it will get the error.
                continue
            await asyncio.sleep((perf_counter() - started) * (1 / _BACKGROUND_SHARE - 1))

    def _ensure(self, key: AdapterKey) -> None:
        """Runs in a reading thread."""
        assert self._images is not None
        if not self._images.is_full and not self._images.has(key):
            self._read(key)

    def _is_worth_keeping(self, key: AdapterKey) -> bool:
        """Whether this adapter is used again, and where there is no room, more than another one."""
        if not self._runner.copies:
            # The device uses the same memory.
            return True
        passed = self._passed.get(key, ())
        held = len(self._registered)
        mean = self._nbytes // max(1, held)
        full = self._max_bytes is not None and self._nbytes + mean > self._max_bytes
        if held < self._capacity and not full:
            return bool(passed)
        _, oldest = next(iter(self._registered.values()))
        return len(passed) == _PASSES and passed[0] > oldest

    def _read(self, key: AdapterKey, *, slot: int | None = None, passing: bool = False) -> Read:
        """Runs in a reading thread."""
        images, loads = self._images, _Loads(self._runner, slot)
        try:
            source = None if images is None else images.source_of(key)
            adapter = None
            if images is not None:
                adapter = images.load(key, source, passing=passing, begin=loads.begin)
            if adapter is None:
                # Whatever takes so long is kept.
                passing = False
                adapter = self._from_file(key)
                loads.begin(adapter)
                if images is not None:
                    images.keep(key, source, adapter)
        finally:
            # Also if it is of no use: nothing must write into the slot after this.
            loaded = loads.wait()
        return Read(adapter, not passing, loaded)

    def _from_file(self, key: AdapterKey) -> HostAdapter:
        # `parse` suffices: the file was validated before it was stored, and has the same hash.
        return self._runner.prepare(parse(self._store.read(key.name, key.revision)))

    def _loaded(self, key: AdapterKey, started: float, loading: asyncio.Future[Read]) -> None:
        # One that was dropped may be read again already.
        if self._loading.get(key) is loading:
            del self._loading[key]
        # The waiters get the exception; retrieving it here keeps asyncio from reporting it.
        if loading.cancelled() or loading.exception() is not None:
            return
        adapter, kept, _ = loading.result()
        if not kept:
            before = self._passed.pop(key, ())
            self._passed[key] = (*before, monotonic())[-_PASSES:]
            while len(self._passed) > _REMEMBERED * self._capacity:
                self._passed.popitem(last=False)
            return
        self._passed.pop(key, None)
        self._observer.adapter_loaded(key, "registered", perf_counter() - started)
        self._register(key, adapter)

    def _register(self, key: AdapterKey, adapter: HostAdapter) -> None:
        self._registered[key] = adapter, monotonic()
        self._nbytes += adapter.nbytes
        while len(self._registered) > 1 and self._is_too_full():
            evicted, (dropped, last_used) = self._registered.popitem(last=False)
            self._nbytes -= dropped.nbytes
            self._observer.adapter_evicted(evicted, "registered", monotonic() - last_used)
        self._observer.tier_size("registered", len(self._registered), self._nbytes)
