"""Which adapters are on the device, and which requests hold them there.

    stored --read, validate, fold (host_cache)--> registered --copy (device_loader)--> active

A request leases all its adapters at once or waits. Waiting requests are served one after the other,
in turns of their clients (`turns`), so they cannot deadlock over each other's adapters. A
leased or loading adapter stays; of the others the least recently used is evicted first, and those
that a waiting request wants are evicted last.
A retired adapter leaves both tiers as soon as no request holds it or waits for it.

A tier is limited by the number of adapters and by their bytes, so that many small ones fit where
few large ones do. Slots are handed out before sizes are known, so adapters that are leased may
exceed the limit of bytes: nothing that can be evicted stays beyond it.

Everything here runs on one event loop; reading and copying happen in threads.
"""

import asyncio
import logging
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from heapq import nlargest
from time import monotonic
from typing import TypeAlias

from adapters.errors import StoreUnreachable
from service.engine.device_loader import DeviceLoader, Outcome
from service.engine.host_cache import HostCache, Read
from service.engine.interface import AdapterKey
from service.engine.observer import Observer
from service.engine.promptness import LOADING_SECONDS, restore_turns, shorten_turns
from service.engine.runners.base import DeviceAdapter, HostAdapter, is_out_of_memory
from service.engine.turns import NOBODY, Client
from service.engine.waiting_line import WaitingLine
from service.errors import (
    AdapterLoadFailed,
    EngineUnavailable,
    InferenceFailed,
    InvalidRequest,
    ServiceError,
)

logger = logging.getLogger(__name__)

# At most this many requests whose adapters are all active overtake one that waits for slots.
MAX_OVERTAKEN = 64
# Of adapters that are in no slot.
_NO_SLOT = -1
# For the first requests of the queue, this many, files are read while they wait for slots.
_PREFETCHED = 64


@dataclass(slots=True, eq=False)
class Slot:
    """A slot of the device and the adapter that it is for.

    client: for whom it is loaded. adapter: None while it loads. leases: how many leases include the
    slot. waiters: requests that lease the slot and wait until it is loaded. arriving: the bytes
    that are expected while it is read.
    """

    key: AdapterKey
    index: int
    last_used: float
    client: Client = NOBODY
    adapter: DeviceAdapter | None = None
    leases: int = 0
    waiters: list["Waiter"] = field(default_factory=list)
    arriving: int = 0

    def take_waiters(self) -> list["Waiter"]:
        """Remove and return its waiters."""
        waiters, self.waiters = self.waiters, []
        return waiters


# What a request holds between `Residency.acquire` and `Residency.release`.
Lease: TypeAlias = dict[AdapterKey, Slot]


@dataclass(slots=True, eq=False)
class Waiter:
    """A request that waits: first for slots (lease is None), then until all of them are loaded.

    overtaken: how many requests have overtaken it.
    """

    keys: Sequence[AdapterKey]
    client: Client
    ready: asyncio.Future[None]
    lease: Lease | None
    overtaken: int = 0

    def fail(self, error: Exception) -> None:
        if not self.ready.done():
            self.ready.set_exception(error)


def _is_loaded(lease: Lease) -> bool:
    return all(slot.adapter is not None for slot in lease.values())


class Residency:
    """The slots of one device.

    Args:
        slots: adapters on the device at once.
        max_bytes: of their weights; None: no limit.
        trial_slots: further slots, for adapters that are tried out before they are published.
        built_in: adapters that are always on the device, and in no slot.

    Attributes:
        on_shortage: called when a request has to wait for slots, so that leases which nobody waits
            for are released.
    """

    def __init__(
        self,
        host_cache: HostCache,
        loader: DeviceLoader,
        *,
        observer: Observer,
        slots: int,
        trial_slots: int,
        max_bytes: int | None = None,
        built_in: Mapping[AdapterKey, DeviceAdapter] | None = None,
    ) -> None:
        self._built_in = {
            key: Slot(key, _NO_SLOT, 0.0, adapter=adapter)
            for key, adapter in (built_in or {}).items()
        }
        self._host_cache = host_cache
        self._loader = loader
        self._observer = observer
        self._slots = slots
        self._free = list(reversed(range(slots)))
        self._free_trial: asyncio.Queue[int] = asyncio.Queue()
        for index in range(slots, slots + trial_slots):
            self._free_trial.put_nowait(index)
        self._active: dict[AdapterKey, Slot] = {}
        # The active slots that are loaded and not leased, least recently used first.
        self._evictable: OrderedDict[AdapterKey, Slot] = OrderedDict()
        # Of the loaded adapters, and of those that are being copied.
        self._nbytes = self._arriving = 0
        self._max_bytes = max_bytes
        # Waiters for slots, and how many of them need each adapter.
        self._queue: WaitingLine[Waiter] = WaitingLine()
        self._wanted: Counter[AdapterKey] = Counter()
        # Retired adapters that requests still hold or wait for.
        self._retired: set[AdapterKey] = set()
        # Waiters that have their slots, some of which still load.
        self._loading: set[Waiter] = set()
        self.on_shortage: Callable[[], None] = lambda: None

    def active_names(self, most: int) -> list[str]:
        """Names of the active adapters, most recently used first, at most so many."""
        # A name may have two revisions there.
        slots = nlargest(2 * most, self._active.values(), key=lambda slot: slot.last_used)
        return list(dict.fromkeys(slot.key.name for slot in slots))[:most]

    def acquire_loaded(self, keys: Sequence[AdapterKey]) -> Lease | None:
        """As `acquire`, if all of them are on the device and no request waits for slots; mostly so.

        If not, nothing is leased.
        """
        if self._queue:
            return None
        lease = {}
        for key in keys:
            slot = self._active.get(key)
            if slot is None or slot.adapter is None:
                return None
            lease[key] = slot
        for key, slot in lease.items():
            if slot.leases == 0:
                self._evictable.pop(key, None)
            slot.leases += 1
        return lease

    async def acquire(self, keys: Sequence[AdapterKey], client: Client = NOBODY) -> Lease:
        """Lease all of these distinct adapters at once, loading those that are not active.

        Args:
            client: takes turns with others where requests wait for slots or for files.

        Raises:
            InvalidRequest: more adapters than can ever be active together.
            AdapterLoadFailed: one of them cannot be loaded; nothing is leased.
        """
        if built_in := [key for key in keys if key in self._built_in]:
            others = [key for key in keys if key not in self._built_in]
            leased = await self.acquire(others, client) if others else {}
            return leased | {key: self._built_in[key] for key in built_in}
        if len(keys) > self._slots:
            raise InvalidRequest(
                [f"{len(keys)} adapters in one request, at most {self._slots} can be active"]
            )
        lease = self._reserve(keys, client) if self._may_overtake(keys) else None
        if lease is not None and _is_loaded(lease):
            return lease
        waiter = Waiter(keys, client, asyncio.get_running_loop().create_future(), lease)
        if lease is None:
            self._enqueue(waiter)
            self.on_shortage()
        else:
            self._wait_for_loads(waiter, lease)
        try:
            await waiter.ready
        except BaseException:
            self._abandon(waiter)
            raise
        assert waiter.lease is not None
        return waiter.lease

    async def try_out(self, key: AdapterKey, adapter: HostAdapter, client: Client) -> Lease:
        """Lease a trial slot for an adapter that is not in the store. No tier counts it.

        Raises:
            InferenceFailed: the device cannot take it. EngineUnavailable: the engine has ended.
        """
        index = await self._free_trial.get()
        ready: asyncio.Future[DeviceAdapter] = asyncio.get_running_loop().create_future()

        def loaded(outcome: Outcome, _: float) -> None:
            if ready.done():
                self._free_trial_slot(index)
            elif isinstance(outcome, BaseException):
                self._free_trial.put_nowait(index)
                ready.set_exception(_refusal_of(outcome))
            else:
                ready.set_result(outcome)

        self._loader.load(index, adapter, loaded, client)
        try:
            tried = await ready
        except asyncio.CancelledError:
            # Cancelled after it was loaded, before this went on: nobody else gives the slot back.
            if not ready.cancelled() and ready.exception() is None:
                self._free_trial_slot(index)
            raise
        return {key: Slot(key, index, monotonic(), adapter=tried, leases=1)}

    def _free_trial_slot(self, index: int) -> None:
        self._loader.unload(index)
        self._free_trial.put_nowait(index)

    def release(self, lease: Lease) -> None:
        """End a lease: from now on its adapters may be evicted."""
        now = monotonic()
        for slot in lease.values():
            if slot.index == _NO_SLOT:
                continue
            slot.leases -= 1
            slot.last_used = now
            assert slot.leases >= 0
            if slot.index >= self._slots:
                # What still refers to this slot, such as a lane's last batch, must not keep a tried
                # out adapter in memory.
                slot.adapter = None
                self._free_trial_slot(slot.index)
            elif slot.leases == 0 and slot.adapter is not None:
                self._evictable[slot.key] = slot
                self._drop_if_retired(slot.key)
        self._make_room(0)
        self._serve_queue()

    def lease_idle(self, key: AdapterKey) -> Lease | None:
        """Lease an adapter that is on the device, unless a request waits for slots."""
        slot = self._active.get(key)
        if slot is None or slot.adapter is None or self._queue:
            return None
        return self._reserve((key,), NOBODY)

    async def preload(self, key: AdapterKey) -> None:
        """Activate an adapter if that evicts no other. It is served again if it was retired."""
        self._retired.discard(key)
        if self.has_room(key):
            self.release(await self.acquire((key,)))

    def retire(self, key: AdapterKey) -> None:
        """Give back an adapter's memory: now, or once no request holds it or waits for it."""
        self._retired.add(key)
        self._drop_if_retired(key)
        self._serve_queue()

    def has_room(self, key: AdapterKey) -> bool:
        """Whether this adapter is active, or could be loaded without evicting another."""
        if key in self._active:
            return True
        return not self._queue and bool(self._free) and not self._exceeds(self._size_of(key))

    def _size_of(self, key: AdapterKey) -> int:
        """Bytes of an adapter; if it is not in host memory, the mean of the active ones."""
        adapter = self._host_cache.peek(key)
        if adapter is not None:
            return adapter.nbytes
        return self._nbytes // max(1, len(self._active))

    def in_use(self, name: str) -> frozenset[str]:
        """The revisions of a name that requests hold or wait for."""
        leased = (key for key, slot in self._active.items() if slot.leases)
        return frozenset(key.revision for key in (*leased, *self._wanted) if key.name == name)

    def fail_all(self, reason: str) -> None:
        """Fail every request that waits for slots or loads with EngineUnavailable."""
        waiters = [*self._queue, *self._loading]
        self._queue.clear()
        self._wanted.clear()
        self._loading.clear()
        for waiter in waiters:
            waiter.fail(EngineUnavailable(reason))

    def _may_overtake(self, keys: Sequence[AdapterKey]) -> bool:
        """Whether a request that has just arrived may take slots before waiting requests do."""
        if not self._queue:
            return True
        first = self._queue[0]
        if first.overtaken >= MAX_OVERTAKEN or any(key not in self._active for key in keys):
            return False
        first.overtaken += 1
        return True

    def _enqueue(self, waiter: Waiter) -> None:
        ahead = self._queue.add(waiter, waiter.client, adapters=len(waiter.keys))
        self._wanted.update(waiter.keys)
        if ahead < _PREFETCHED:
            self._prefetch(waiter)

    def _prefetch(self, waiter: Waiter) -> None:
        """Read the files that a waiter will need."""
        for key in waiter.keys:
            if key not in self._active and self._host_cache.get(key) is None:
                self._host_cache.load(key, waiter.client)

    def _dequeue(self, waiter: Waiter) -> None:
        ahead = self._queue.remove(waiter)
        for key in waiter.keys:
            self._wanted[key] -= 1
            if self._wanted[key] == 0:
                del self._wanted[key]
        if ahead < _PREFETCHED <= len(self._queue):
            # It has become one of the first.
            self._prefetch(self._queue[_PREFETCHED - 1])
        for key in waiter.keys:
            self._drop_if_retired(key)

    def _reserve(self, keys: Sequence[AdapterKey], client: Client) -> Lease | None:
        """Lease slots for all keys, evicting and starting loads as needed, or change nothing."""
        missing = [key for key in keys if key not in self._active]
        if len(missing) > len(self._free) and not self._evict(
            len(missing) - len(self._free), keep=frozenset(keys)
        ):
            return None
        # Before the loads, which may evict others to make room.
        for key in keys:
            self._evictable.pop(key, None)
        for key in missing:
            self._active[key] = slot = Slot(key, self._free.pop(), monotonic(), client)
            self._load(slot)
        lease = {}
        for key in keys:
            lease[key] = slot = self._active[key]
            slot.leases += 1
        return lease

    def _evict(self, number: int, *, keep: frozenset[AdapterKey]) -> bool:
        """Evict this many adapters other than `keep`, or none if there are too few."""
        if len(self._evictable) - sum(key in self._evictable for key in keep) < number:
            return False
        now = monotonic()
        for key in self._victims(number, keep):
            slot = self._evictable.pop(key)
            assert slot.adapter is not None
            del self._active[key]
            self._free.append(slot.index)
            self._nbytes -= slot.adapter.nbytes
            self._observer.adapter_evicted(key, "active", now - slot.last_used)
        return True

    def _drop_if_retired(self, key: AdapterKey) -> None:
        slot = self._active.get(key)
        if key not in self._retired or key in self._wanted:
            return
        if slot is not None:
            if key not in self._evictable:
                return
            assert slot.adapter is not None
            del self._active[key], self._evictable[key]
            self._free.append(slot.index)
            self._nbytes -= slot.adapter.nbytes
            # As for a trial slot: a lane's last batch may still refer to it.
            slot.adapter = None
            self._loader.unload(slot.index)
            self._report_size()
        self._retired.remove(key)
        self._host_cache.discard(key)

    def _exceeds(self, nbytes: int) -> bool:
        """Whether so many bytes more are too many."""
        most = self._max_bytes
        return most is not None and self._nbytes + self._arriving + nbytes > most

    def _make_room(self, nbytes: int) -> None:
        """Evict until so many bytes more fit, or nothing can be evicted."""
        before = self._nbytes
        while self._exceeds(nbytes) and self._evict(1, keep=frozenset()):
            # A slot keeps its memory for the next adapter. Here it is the memory that is wanted.
            self._loader.unload(self._free[-1])
        if self._nbytes != before:
            self._report_size()

    def _report_size(self) -> None:
        self._observer.tier_size("active", len(self._active), self._nbytes)

    def _victims(self, number: int, keep: frozenset[AdapterKey]) -> list[AdapterKey]:
        """The least recently used; those that a waiter needs only if nothing else is left."""
        unwanted: list[AdapterKey] = []
        wanted: list[AdapterKey] = []
        for key in self._evictable:
            if key in keep:
                continue
            (wanted if key in self._wanted else unwanted).append(key)
            if len(unwanted) == number:
                return unwanted
        return unwanted + wanted[: number - len(unwanted)]

    def _serve_queue(self) -> None:
        """Give slots to waiters, strictly in the order of the line, until one must keep waiting."""
        while self._queue:
            waiter = self._queue[0]
            # A waiter that failed or was cancelled gets no slots: it only leaves the queue.
            if not waiter.ready.done():
                waiter.lease = lease = self._reserve(waiter.keys, waiter.client)
                if lease is None:
                    return
                self._wait_for_loads(waiter, lease)
            self._dequeue(waiter)

    def _wait_for_loads(self, waiter: Waiter, lease: Lease) -> None:
        self._loading.add(waiter)
        for slot in lease.values():
            if slot.adapter is None:
                slot.waiters.append(waiter)
                if slot.client.name != waiter.client.name:
                    # That one may wait for many.
                    self._host_cache.advance(slot.key, waiter.client)
                    self._loader.advance(slot.index, waiter.client)
        self._resume_if_loaded(waiter)

    def _resume_if_loaded(self, waiter: Waiter) -> None:
        assert waiter.lease is not None
        if _is_loaded(waiter.lease):
            self._loading.discard(waiter)
            if not waiter.ready.done():
                waiter.ready.set_result(None)

    def _abandon(self, waiter: Waiter) -> None:
        """Clean up after a request that failed or was cancelled while it waited."""
        if waiter in self._queue:
            self._dequeue(waiter)
        self._loading.discard(waiter)
        if waiter.lease is not None:
            self.release(waiter.lease)
        self._drop_unwanted(waiter.keys)
        self._serve_queue()

    def _load(self, slot: Slot) -> None:
        """Start a load. Other requests that lease the slot meanwhile wait for it too."""
        shorten_turns(LOADING_SECONDS)
        adapter = self._host_cache.get(slot.key)
        if adapter is not None:
            self._copy(slot, adapter)
            return

        # How large it is shows once it is read.
        nbytes, started = self._size_of(slot.key), monotonic()
        self._make_room(nbytes)
        slot.arriving = nbytes
        self._arriving += nbytes

        def read(reading: asyncio.Future[Read]) -> None:
            if self._active.get(slot.key) is not slot:
                # It was dropped while it waited for a thread.
                return
            self._arriving -= nbytes
            try:
                adapter, _, loaded = reading.result()
            except (Exception, asyncio.CancelledError) as error:
                self._load_failed(slot, error)
                return
            if loaded is None:
                # It was being read for someone who had no slot for it.
                self._copy(slot, adapter)
                return
            self._activate(slot, loaded, monotonic() - started)
            self._make_room(0)

        self._host_cache.load(slot.key, slot.client, slot=slot.index).add_done_callback(read)

    def _copy(self, slot: Slot, adapter: HostAdapter) -> None:
        nbytes = adapter.nbytes
        self._make_room(nbytes)
        self._arriving += nbytes

        def copied(outcome: Outcome, seconds: float) -> None:
            self._arriving -= nbytes
            if isinstance(outcome, BaseException):
                self._load_failed(slot, outcome)
            else:
                self._activate(slot, outcome, seconds)

        self._loader.load(slot.index, adapter, copied, slot.client)

    def _activate(self, slot: Slot, adapter: DeviceAdapter, seconds: float) -> None:
        restore_turns(LOADING_SECONDS)
        slot.adapter = adapter
        self._nbytes += adapter.nbytes
        if slot.leases == 0:
            self._evictable[slot.key] = slot
        self._observer.adapter_loaded(slot.key, "active", seconds)
        self._report_size()
        for waiter in slot.take_waiters():
            self._resume_if_loaded(waiter)
        self._drop_if_retired(slot.key)
        self._serve_queue()

    def _load_failed(self, slot: Slot, error: BaseException) -> None:
        """Fail the waiters and free the slot, so that the next request tries again."""
        self._free_unloaded(slot)
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        logger.warning(
            "adapter %s (%s) cannot be loaded: %s", slot.key.name, slot.key.revision, reason
        )
        for waiter in slot.take_waiters():
            self._loading.discard(waiter)
            if isinstance(error, (StoreUnreachable, EngineUnavailable)):
                # Nothing is wrong with the adapter: it cannot be fetched or copied now.
                waiter.fail(EngineUnavailable(reason))
            else:
                waiter.fail(AdapterLoadFailed(slot.key.name, slot.key.revision, reason))
        self._drop_if_retired(slot.key)
        self._serve_queue()

    def _drop_unwanted(self, keys: Sequence[AdapterKey]) -> None:
        """Drop loads that nobody waits for any more and that no thread has begun.

        One request may name a thousand adapters and give up after a second: those of others would
        wait behind all of them.
        """
        for key in keys:
            slot = self._active.get(key)
            loaded = slot is not None and slot.adapter is not None
            if key in self._wanted or loaded or (slot is not None and slot.leases):
                continue
            if self._host_cache.cancel(key) and slot is not None:
                self._arriving -= slot.arriving
                self._free_unloaded(slot)
                self._drop_if_retired(key)

    def _free_unloaded(self, slot: Slot) -> None:
        restore_turns(LOADING_SECONDS)
        del self._active[slot.key]
        self._loader.unload(slot.index)
        self._free.append(slot.index)
        self._report_size()


def _refusal_of(error: BaseException) -> ServiceError:
    """What an adapter that is tried out fails with if it cannot be copied to the device."""
    if isinstance(error, ServiceError):
        return error
    if is_out_of_memory(error):
        return InferenceFailed("the device has no memory for this adapter", reason="out_of_memory")
    return InferenceFailed(f"the adapter cannot be copied to the device: {type(error).__name__}")
