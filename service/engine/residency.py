"""Which adapters have a place on the device. Knows no batch.

    stored --read, validate, fold (hosting)--> registered --copy (placing)--> active

Everything here happens on one event loop, the loading itself in threads. A request leases all its
adapters at once or waits; whoever waits is served in order of arrival, so requests cannot block
each other for ever. What is leased or loading stays; of the rest the least recently used goes,
first of all what nobody waits for.
"""

import asyncio
import logging
from collections import Counter, OrderedDict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from time import monotonic
from typing import TypeAlias

from service.engine.device_loader import Outcome, Placing
from service.engine.host_cache import HostTier
from service.engine.interface import AdapterKey
from service.engine.observer import EngineObserver
from service.engine.runners.base import Hosted, Placed
from service.errors import AdapterLoadFailed, EngineUnavailable, InvalidRequest

# --- merged from service.engine.leases


@dataclass(slots=True, eq=False)
class Slot:
    """A place on the device.

    prepared: None while it loads. leases: requests that hold it. awaited_by: those whose lease
    includes it and that wait for it.
    """

    key: AdapterKey
    place: int
    last_used: float
    prepared: Placed | None = None
    leases: int = 0
    awaited_by: list["Applicant"] = field(default_factory=list)

    def taken(self) -> Iterator["Applicant"]:
        """All who wait for it, leaving none behind."""
        while self.awaited_by:
            yield self.awaited_by.pop(0)


Lease: TypeAlias = dict[AdapterKey, Slot]


@dataclass(slots=True, eq=False)
class Applicant:
    """A request that waits: first for slots (lease None), then for those of its lease that load.

    overtaken: how many requests have been let past it.
    """

    keys: Sequence[AdapterKey]
    ready: asyncio.Future[None]
    lease: Lease | None
    overtaken: int = 0

    def fail(self, error: Exception) -> None:
        if not self.ready.done():
            self.ready.set_exception(error)


def is_armed(lease: Lease) -> bool:
    """Whether everything in it is ready to be used."""
    return all(slot.prepared is not None for slot in lease.values())


# --- merged from service.engine.residency

logger = logging.getLogger(__name__)

# Requests for what is active may pass one that waits for room, but not for ever.
MAX_OVERTAKEN = 64
# Those that wait for room have their files read meanwhile, as far down the queue as this.
_PREFETCHED = 64


class Residency:
    """The places of one device.

    Args:
        places: adapters on the device at once.
        spare: further places, for adapters that are tried out.
    """

    def __init__(
        self,
        host: HostTier,
        placing: Placing,
        *,
        observer: EngineObserver,
        places: int,
        spare: int,
    ) -> None:
        self._host = host
        self._placing = placing
        self._observer = observer
        self._places = places
        self._free = list(reversed(range(places)))
        self._spare: asyncio.Queue[int] = asyncio.Queue()
        for place in range(places, places + spare):
            self._spare.put_nowait(place)
        self._active: dict[AdapterKey, Slot] = {}
        # Those of them that are ready and not leased, least recently used first.
        self._idle: OrderedDict[AdapterKey, Slot] = OrderedDict()
        self._nbytes = 0
        self._queue: deque[Applicant] = deque()
        self._queued_for: Counter[AdapterKey] = Counter()
        self._arming: set[Applicant] = set()

    async def acquire(self, keys: Sequence[AdapterKey]) -> Lease:
        """Lease all of these distinct adapters at once. What is not active is loaded first.

        Raises:
            InvalidRequest: more adapters than can ever be active together.
            AdapterLoadFailed: one of them cannot be loaded; nothing is leased.
        """
        if len(keys) > self._places:
            raise InvalidRequest(
                [f"{len(keys)} adapters in one request, at most {self._places} can be active"]
            )
        lease = self._reserve(keys) if self._may_pass(keys) else None
        if lease is not None and is_armed(lease):
            return lease
        applicant = Applicant(keys, asyncio.get_running_loop().create_future(), lease)
        if lease is None:
            self._enqueue(applicant)
        else:
            self._await_slots(applicant)
        try:
            await applicant.ready
        except BaseException:
            self._abandon(applicant)
            raise
        assert applicant.lease is not None
        return applicant.lease

    async def try_out(self, key: AdapterKey, hosted: Hosted) -> Lease:
        """Place an adapter that no store holds: a lease on a slot that no tier counts."""
        place = await self._spare.get()
        tried = Slot(key, place, monotonic(), leases=1)
        ready: asyncio.Future[Placed] = asyncio.get_running_loop().create_future()

        def done(outcome: Outcome, _: float) -> None:
            if isinstance(outcome, BaseException):
                self._spare.put_nowait(place)
                if not ready.done():
                    ready.set_exception(outcome)
            elif ready.done():
                self._spare.put_nowait(place)
            else:
                ready.set_result(outcome)

        self._placing.place(place, hosted, done)
        tried.prepared = await ready
        return {key: tried}

    def release(self, lease: Lease) -> None:
        """Give a lease back: from now on its adapters may be evicted."""
        now = monotonic()
        for slot in lease.values():
            slot.leases -= 1
            slot.last_used = now
            assert slot.leases >= 0
            if slot.place >= self._places:
                self._spare.put_nowait(slot.place)
            elif slot.leases == 0 and slot.prepared is not None:
                self._idle[slot.key] = slot
        self._serve_queue()

    def has_room(self, key: AdapterKey) -> bool:
        """Whether this adapter is active or could be without evicting another."""
        return key in self._active or (not self._queue and bool(self._free))

    def fail_all(self, reason: str) -> None:
        """Fail every request that waits for slots or loads with EngineUnavailable."""
        waiting = [*self._queue, *self._arming]
        self._queue.clear()
        self._queued_for.clear()
        self._arming.clear()
        for applicant in waiting:
            applicant.fail(EngineUnavailable(reason))

    def _may_pass(self, keys: Sequence[AdapterKey]) -> bool:
        """Whether a request that has just come may take slots before those that wait for some."""
        if not self._queue:
            return True
        first = self._queue[0]
        if first.overtaken >= MAX_OVERTAKEN or any(key not in self._active for key in keys):
            return False
        first.overtaken += 1
        return True

    def _enqueue(self, applicant: Applicant) -> None:
        self._queue.append(applicant)
        self._queued_for.update(applicant.keys)
        if len(self._queue) <= _PREFETCHED:
            for key in applicant.keys:
                if key not in self._active and self._host.get(key) is None:
                    self._host.load(key)

    def _dequeue(self, applicant: Applicant) -> None:
        self._queue.remove(applicant)
        self._queued_for -= Counter(applicant.keys)

    def _reserve(self, keys: Sequence[AdapterKey]) -> Lease | None:
        """Take slots for all keys, evicting and starting loads as needed, or change nothing."""
        missing = [key for key in keys if key not in self._active]
        if len(missing) > len(self._free) and not self._evict(
            len(missing) - len(self._free), keep=frozenset(keys)
        ):
            return None
        for key in missing:
            self._active[key] = slot = Slot(key, self._free.pop(), monotonic())
            self._load(slot)
        lease = {}
        for key in keys:
            lease[key] = slot = self._active[key]
            slot.leases += 1
            self._idle.pop(key, None)
        return lease

    def _evict(self, number: int, *, keep: frozenset[AdapterKey]) -> bool:
        if len(self._idle) - sum(key in self._idle for key in keep) < number:
            return False
        now = monotonic()
        for key in self._candidates(number, keep):
            slot = self._idle.pop(key)
            assert slot.prepared is not None
            del self._active[key]
            self._free.append(slot.place)
            self._nbytes -= slot.prepared.nbytes
            self._observer.adapter_evicted(key, "active", now - slot.last_used)
        return True

    def _candidates(self, number: int, keep: frozenset[AdapterKey]) -> list[AdapterKey]:
        """Whom to evict: what somebody waits for goes last."""
        chosen: list[AdapterKey] = []
        awaited: list[AdapterKey] = []
        for key in self._idle:
            if key in keep:
                continue
            (awaited if key in self._queued_for else chosen).append(key)
            if len(chosen) == number:
                return chosen
        return chosen + awaited[: number - len(chosen)]

    def _serve_queue(self) -> None:
        """Arm whoever waits, strictly in order of arrival, until one has to wait on."""
        while self._queue:
            applicant = self._queue[0]
            # A cancelled one leaves the queue itself as soon as its task runs again.
            if not applicant.ready.done():
                applicant.lease = self._reserve(applicant.keys)
                if applicant.lease is None:
                    return
                self._await_slots(applicant)
            self._dequeue(applicant)

    def _await_slots(self, applicant: Applicant) -> None:
        assert applicant.lease is not None
        self._arming.add(applicant)
        for slot in applicant.lease.values():
            if slot.prepared is None:
                slot.awaited_by.append(applicant)
        self._arm(applicant)

    def _arm(self, applicant: Applicant) -> None:
        assert applicant.lease is not None
        if is_armed(applicant.lease):
            self._arming.discard(applicant)
            if not applicant.ready.done():
                applicant.ready.set_result(None)

    def _abandon(self, applicant: Applicant) -> None:
        if applicant in self._queue:
            self._dequeue(applicant)
        self._arming.discard(applicant)
        if applicant.lease is not None:
            self.release(applicant.lease)
        else:
            self._serve_queue()

    def _load(self, slot: Slot) -> None:
        """Start loading; whoever leases the slot meanwhile waits for the same load."""
        hosted = self._host.get(slot.key)
        if hosted is not None:
            self._place(slot, hosted)
            return

        def read(loading: asyncio.Future[Hosted]) -> None:
            try:
                self._place(slot, loading.result())
            except (Exception, asyncio.CancelledError) as error:
                self._give_up(slot, error)

        self._host.load(slot.key).add_done_callback(read)

    def _place(self, slot: Slot, hosted: Hosted) -> None:
        def done(outcome: Outcome, seconds: float) -> None:
            if isinstance(outcome, BaseException):
                self._give_up(slot, outcome)
            else:
                self._activate(slot, outcome, seconds)

        self._placing.place(slot.place, hosted, done)

    def _activate(self, slot: Slot, placed: Placed, seconds: float) -> None:
        slot.prepared = placed
        self._nbytes += placed.nbytes
        if slot.leases == 0:
            self._idle[slot.key] = slot
        self._observer.adapter_loaded(slot.key, "active", seconds)
        self._observer.tier_size("active", len(self._active), self._nbytes)
        for applicant in slot.taken():
            self._arm(applicant)
        self._serve_queue()

    def _give_up(self, slot: Slot, error: BaseException) -> None:
        """The slot is free again and the next request tries anew; those that wait for it fail."""
        del self._active[slot.key]
        self._free.append(slot.place)
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        logger.warning(
            "adapter %s (%s) cannot be loaded: %s", slot.key.name, slot.key.revision, reason
        )
        for applicant in slot.taken():
            self._arming.discard(applicant)
            applicant.fail(AdapterLoadFailed(slot.key.name, slot.key.revision, reason))
        self._serve_queue()
