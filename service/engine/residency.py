"""Which adapters are on disk, registered in host memory, active on the device. Knows no batch.

    stored --read, hash, validate--> registered --prepare--> active

Everything here happens on one event loop, the loading itself in threads. A request leases all its
adapters at once or waits; whoever waits is served in order of arrival, so requests cannot block
each other for ever. What is leased or loading stays; of the rest the least recently used goes.
"""

import asyncio
import logging
from collections import OrderedDict, deque
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from time import monotonic, perf_counter
from typing import TypeAlias

from adapters.adapter import Adapter, PreparedAdapter, prepare
from adapters.backbone import Backbone
from adapters.files import validate
from adapters.store import AdapterStore
from service.engine.interface import AdapterKey
from service.engine.observer import EngineObserver
from service.errors import AdapterLoadFailed, EngineUnavailable, InvalidRequest

logger = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class Slot:
    """A place on the device. prepared: None while it loads. leases: requests that hold it."""

    key: AdapterKey
    last_used: float
    prepared: PreparedAdapter | None = None
    nbytes: int = 0
    leases: int = 0


Lease: TypeAlias = dict[AdapterKey, Slot]


@dataclass(slots=True, eq=False)
class _Registered:
    adapter: Adapter
    nbytes: int
    last_used: float


@dataclass(slots=True, eq=False)
class _Applicant:
    """A request that waits: first for slots (lease None), then for those of its lease that load."""

    keys: Sequence[AdapterKey]
    ready: asyncio.Future[None]
    lease: Lease | None


@dataclass(frozen=True, slots=True)
class _Loaded:
    """What a loading thread made. read_seconds: None when the adapter was registered already."""

    adapter: Adapter
    prepared: PreparedAdapter
    read_seconds: float | None
    prepare_seconds: float


class Residency:
    """The slots of one device and the host memory behind them.

    Args:
        loading: where files are read and adapters are moved to the device.
        max_active, max_registered: adapters on the device and in host memory.
    """

    def __init__(
        self,
        store: AdapterStore,
        backbone: Backbone,
        *,
        loading: Executor,
        observer: EngineObserver,
        max_active: int,
        max_registered: int,
    ) -> None:
        self._store = store
        self._backbone = backbone
        self._loading = loading
        self._observer = observer
        self._max_active = max_active
        self._max_registered = max_registered
        # Both least recently used first.
        self._active: OrderedDict[AdapterKey, Slot] = OrderedDict()
        self._registered: OrderedDict[AdapterKey, _Registered] = OrderedDict()
        self._queue: deque[_Applicant] = deque()
        self._arming: set[_Applicant] = set()

    async def acquire(self, keys: Sequence[AdapterKey]) -> Lease:
        """Lease all of these distinct adapters at once. What is not active is loaded first.

        Raises:
            InvalidRequest: more adapters than can ever be active together.
            AdapterLoadFailed: one of them cannot be loaded; nothing is leased.
        """
        if len(keys) > self._max_active:
            raise InvalidRequest(
                [f"{len(keys)} adapters in one request, at most {self._max_active} can be active"]
            )
        lease = None if self._queue else self._reserve(keys)
        if lease is not None and _armed(lease):
            return lease
        applicant = _Applicant(keys, asyncio.get_running_loop().create_future(), lease)
        if lease is None:
            self._queue.append(applicant)
        else:
            self._arming.add(applicant)
        try:
            await applicant.ready
        except BaseException:
            self._abandon(applicant)
            raise
        assert applicant.lease is not None
        return applicant.lease

    async def try_out(self, key: AdapterKey, data: bytes) -> Lease:
        """Prepare bytes that no store holds: a lease on a slot that no tier counts.

        Raises:
            InvalidAdapter, IncompatibleAdapter: with every fault.
        """
        prepared = await asyncio.get_running_loop().run_in_executor(
            self._loading, lambda: prepare(validate(data), self._backbone)
        )
        return {key: Slot(key, monotonic(), prepared, prepared.nbytes, leases=1)}

    def release(self, lease: Lease) -> None:
        """Give a lease back: from now on its adapters may be evicted."""
        now = monotonic()
        for slot in lease.values():
            slot.leases -= 1
            slot.last_used = now
            assert slot.leases >= 0
        self._serve_queue()

    def has_room(self, key: AdapterKey) -> bool:
        """Whether this adapter is active or could be without evicting another."""
        return key in self._active or (not self._queue and len(self._active) < self._max_active)

    def fail_all(self, reason: str) -> None:
        """Fail every request that waits for slots or loads with EngineUnavailable."""
        waiting = [*self._queue, *self._arming]
        self._queue.clear()
        self._arming.clear()
        for applicant in waiting:
            if not applicant.ready.done():
                applicant.ready.set_exception(EngineUnavailable(reason))

    def _reserve(self, keys: Sequence[AdapterKey]) -> Lease | None:
        """Take slots for all keys, evicting and starting loads as needed, or change nothing."""
        missing = [key for key in keys if key not in self._active]
        if missing and not self._make_room(len(missing), keep=frozenset(keys)):
            return None
        for key in missing:
            self._active[key] = slot = Slot(key, monotonic())
            self._load(slot)
        lease = {}
        for key in keys:
            lease[key] = slot = self._active[key]
            slot.leases += 1
            self._active.move_to_end(key)
        return lease

    def _make_room(self, slots: int, *, keep: frozenset[AdapterKey]) -> bool:
        excess = len(self._active) + slots - self._max_active
        if excess <= 0:
            return True
        idle = [
            slot
            for slot in self._active.values()
            if slot.leases == 0 and slot.prepared is not None and slot.key not in keep
        ]
        if len(idle) < excess:
            return False
        now = monotonic()
        for slot in idle[:excess]:
            del self._active[slot.key]
            self._observer.adapter_evicted(slot.key, "active", now - slot.last_used)
        return True

    def _serve_queue(self) -> None:
        """Arm whoever waits, strictly in order of arrival, until one has to wait on."""
        while self._queue:
            applicant = self._queue[0]
            # A cancelled one leaves the queue itself as soon as its task runs again.
            if not applicant.ready.done():
                applicant.lease = self._reserve(applicant.keys)
                if applicant.lease is None:
                    return
                self._arming.add(applicant)
                self._arm(applicant)
            self._queue.popleft()

    def _arm(self, applicant: _Applicant) -> None:
        assert applicant.lease is not None
        if _armed(applicant.lease):
            self._arming.discard(applicant)
            if not applicant.ready.done():
                applicant.ready.set_result(None)

    def _abandon(self, applicant: _Applicant) -> None:
        if applicant in self._queue:
            self._queue.remove(applicant)
        self._arming.discard(applicant)
        if applicant.lease is not None:
            self.release(applicant.lease)
        else:
            self._serve_queue()

    def _load(self, slot: Slot) -> None:
        """Start loading; whoever leases the slot meanwhile waits for the same load."""
        registered = self._registered.get(slot.key)
        loading = asyncio.get_running_loop().run_in_executor(
            self._loading,
            self._read_and_prepare,
            slot.key,
            None if registered is None else registered.adapter,
        )
        loading.add_done_callback(partial(self._loaded, slot))

    def _read_and_prepare(self, key: AdapterKey, adapter: Adapter | None) -> _Loaded:
        """In a loading thread."""
        started, read_seconds = perf_counter(), None
        if adapter is None:
            adapter = validate(self._store.read(key.name, key.revision))
            read_seconds = perf_counter() - started
        prepared = prepare(adapter, self._backbone)
        seconds = perf_counter() - started
        return _Loaded(adapter, prepared, read_seconds, seconds - (read_seconds or 0.0))

    def _loaded(self, slot: Slot, loading: asyncio.Future[_Loaded]) -> None:
        try:
            loaded = loading.result()
        except (Exception, asyncio.CancelledError) as error:
            self._give_up(slot, error)
        else:
            self._activate(slot, loaded)
        self._observer.tier_size(
            "active", len(self._active), sum(item.nbytes for item in self._active.values())
        )
        self._observer.tier_size(
            "registered",
            len(self._registered),
            sum(item.nbytes for item in self._registered.values()),
        )
        self._serve_queue()

    def _activate(self, slot: Slot, loaded: _Loaded) -> None:
        slot.prepared, slot.nbytes = loaded.prepared, loaded.prepared.nbytes
        if loaded.read_seconds is not None:
            self._observer.adapter_loaded(slot.key, "registered", loaded.read_seconds)
        self._observer.adapter_loaded(slot.key, "active", loaded.prepare_seconds)
        self._register(slot.key, loaded.adapter)
        for applicant in self._holders(slot):
            self._arm(applicant)

    def _register(self, key: AdapterKey, adapter: Adapter) -> None:
        nbytes = sum(tensor.nbytes for tensor in adapter.tensors.values())
        self._registered[key] = _Registered(adapter, nbytes, monotonic())
        self._registered.move_to_end(key)
        if len(self._registered) > self._max_registered:
            evicted, held = self._registered.popitem(last=False)
            self._observer.adapter_evicted(evicted, "registered", monotonic() - held.last_used)

    def _give_up(self, slot: Slot, error: BaseException) -> None:
        """The slot is free again and the next request tries anew; those that wait for it fail."""
        del self._active[slot.key]
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        logger.warning(
            "adapter %s (%s) cannot be loaded: %s", slot.key.name, slot.key.revision, reason
        )
        for applicant in self._holders(slot):
            self._arming.discard(applicant)
            if not applicant.ready.done():
                failure = AdapterLoadFailed(slot.key.name, slot.key.revision, reason)
                applicant.ready.set_exception(failure)

    def _holders(self, slot: Slot) -> list[_Applicant]:
        return [
            applicant
            for applicant in self._arming
            if applicant.lease is not None and applicant.lease.get(slot.key) is slot
        ]


def _armed(lease: Lease) -> bool:
    return all(slot.prepared is not None for slot in lease.values())
