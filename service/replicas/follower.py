"""Follows the shared log in rounds, which write this replica's state, read what is new and renew
the lease.

A round writes first and reads then. So whoever has not seen a newer state of this replica when a
commit was in the log can rely on it: a read that renews the lease sees that commit. The argument is
in docs/replicas.md.
"""

import asyncio
import logging
import secrets
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

from adapters.errors import CollectedEntries, StoreError, StoreUnreachable
from adapters.shared.log import SharedLog
from adapters.shared.records import Entry, NameRecord, ReplicaState
from service.engine.observer import Observer
from service.replicas.lease import Lease, lease_time
from service.replicas.preparations import Preparations

logger = logging.getLogger(__name__)

# While a roll-out is on its way, a replica looks for changes so many times more often.
_HURRY = 10
_LEAST_SECONDS = 0.02
# States are written so many times in a lease even if nothing is new.
_BEATS = 4
# For the last state to be removed at the end.
_LEAVING_SECONDS = 2.0

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(slots=True, eq=False)
class OwnChange:
    """A change that this replica commits. committed: the number of its commit, once that was read
    in the log or written there. aborted: its abort was read. lost: its entries may be among those
    that were collected before they were read."""

    id: str
    committed: int | None = None
    aborted: bool = False
    lost: bool = False


class Follower:
    """One replica's place in the log. All methods are called from one event loop.

    Args:
        name: of this replica, for people.
        lease: renewed here, and read by whoever answers.
        follow_seconds: from one round to the next.
        open_log: checks, blocking, that the log is the right one.
        commit: makes an entry's record the one that is served, in the same turn of the loop.
        restore: the same with all records at once.
        everywhere: returns when all HTTP processes have what was committed here.
        renewed: called after each renewal of the lease.
        expired: called with a prepare whose committer seems to be gone.

    Attributes:
        number: the last entry that is applied here.
        trouble: why the store cannot be read now, if it cannot.
    """

    def __init__(
        self,
        log: SharedLog,
        name: str,
        lease: Lease,
        preparations: Preparations,
        *,
        follow_seconds: float,
        observer: Observer,
        open_log: Callable[[], None],
        commit: Callable[[Entry], None],
        restore: Callable[[Mapping[str, NameRecord]], Awaitable[None]],
        everywhere: Callable[[], Awaitable[None]],
        renewed: Callable[[], None],
        expired: Callable[[Entry], None],
    ) -> None:
        self.number = 0
        self.trouble: str | None = None
        self._log = log
        self._open_log = open_log
        self._is_open = self._is_loaded = False
        self._name = name
        self._lease = lease
        self._preparations = preparations
        self._follow_seconds = follow_seconds
        self._observer = observer
        self._commit = commit
        self._restore = restore
        self._everywhere = everywhere
        self._renewed = renewed
        self._expired = expired
        # A thread of its own, so that nothing else delays a renewal.
        self._thread = ThreadPoolExecutor(1, "follower")
        self._own: dict[str, OwnChange] = {}
        self._waiters: list[asyncio.Future[None]] = []
        # Those of the round that is on its way.
        self._served: list[asyncio.Future[None]] = []
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._has_left = False
        self._delivering: set[asyncio.Task[None]] = set()
        self._beat = 0
        self._applied = 0
        self._applied_changed = asyncio.Event()
        # Whether something must be said in the state, and when the last one that was written began.
        self._unsaid = True
        self._said = 0.0
        self._last_read = lease_time()
        self._begin_session()

    @property
    def id(self) -> str:
        """Of this replica, until its lease is over."""
        return self._id

    @property
    def silent_seconds(self) -> float:
        """How long ago the last successful read of the log began."""
        return lease_time() - self._last_read

    async def start(self) -> None:
        """Read the whole log, and follow it from now on.

        Raises:
            StoreError: the store cannot be reached or read, or belongs to others.
        """
        await self._open()
        # The state is there before the log is read, so that committers know of this replica.
        await self._write_state()
        await self._load()
        await self._round()
        self._task = asyncio.create_task(self._run())

    def start_later(self, error: StoreError) -> None:
        """The same as soon as the store can be reached; this error says why not now."""
        self._note(str(error))
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """Give up the lease and leave the cluster. Nothing may be answered any more. Stopping twice
        is fine."""
        if self._has_left:
            return
        self._has_left = True
        if self._task is not None:
            self._task.cancel()
        self._answer([*self._served, *self._waiters], "this replica is leaving")
        self._lease.end()
        for task in self._delivering:
            task.cancel()
        self._preparations.stop()
        with suppress(StoreError, TimeoutError):
            async with asyncio.timeout(_LEAVING_SECONDS):
                await self._call(self._log.remove_state, self._id)
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def caught_up(self) -> None:
        """Return when everything is applied that was in the log when this was called.

        Raises:
            StoreUnreachable: the store cannot be read now, or this replica is leaving.
        """
        if self._has_left:
            raise StoreUnreachable("this replica is leaving")
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        self._wake.set()
        await waiter

    async def delivered(self, number: int) -> None:
        """Return when all HTTP processes of this replica have this entry."""
        while self._applied < number:
            self._applied_changed.clear()
            await self._applied_changed.wait()

    @contextmanager
    def own(self, change: str) -> Iterator[OwnChange]:
        """Follow closely in this block, and say what becomes of a change."""
        self._own[change] = own = OwnChange(change)
        try:
            yield own
        finally:
            del self._own[change]

    def changed(self) -> None:
        """There is something to be said in the state."""
        self._unsaid = True
        self._wake.set()

    def _begin_session(self) -> None:
        self._id = f"{self._name}-{secrets.token_hex(4)}"
        self._lease.begin()
        self._unsaid = True

    async def _run(self) -> None:
        while True:
            self._wake.clear()
            self._served, self._waiters = self._waiters, []
            began = lease_time()
            trouble: str | None = None
            try:
                await self._round()
            except StoreError as error:
                trouble = str(error)
            except Exception as error:
                logger.exception("a round of the follower failed")
                trouble = f"an unexpected error: {str(error) or type(error).__name__}"
            self._note(trouble)
            self._answer(self._served, trouble)
            self._observer.followed(
                seconds=lease_time() - began,
                held=self._lease.held,
                applied=self._applied,
                ok=self.trouble is None,
            )
            with suppress(TimeoutError):
                async with asyncio.timeout(self._pause()):
                    await self._wake.wait()

    def _pause(self) -> float:
        if self.trouble is None and (self._own or self._preparations):
            return max(_LEAST_SECONDS, self._follow_seconds / _HURRY)
        return self._follow_seconds

    def _note(self, trouble: str | None) -> None:
        if trouble is None and self.trouble is not None:
            logger.info("the shared store can be read again")
        elif trouble is not None and self.trouble is None:
            logger.warning("the shared store cannot be read: %s", trouble)
        self.trouble = trouble

    def _answer(self, waiters: Iterable[asyncio.Future[None]], trouble: str | None) -> None:
        for waiter in waiters:
            if not waiter.done() and trouble is None:
                waiter.set_result(None)
            elif not waiter.done():
                waiter.set_exception(StoreUnreachable(trouble))

    async def _round(self) -> None:
        if self._lease.is_over:
            logger.warning("the lease is over: this replica begins again as another one")
            over = self._id
            self._begin_session()
            await self._call(self._log.remove_state, over)
        if not self._is_open:
            await self._open()
        if self._unsaid or lease_time() - self._said >= self._lease.seconds / _BEATS:
            await self._write_state()
        began = lease_time()
        if self._is_loaded:
            try:
                self._take(await self._call(self._log.read, self.number))
            except CollectedEntries:
                self._is_loaded = False
        if not self._is_loaded:
            await self._load()
        self._last_read = began
        if self._lease.renew(self._said):
            self._renewed()
        for entry in self._preparations.expired():
            self._expired(entry)

    async def _open(self) -> None:
        await self._call(self._open_log)
        self._is_open = True

    async def _write_state(self) -> None:
        began = lease_time()
        self._unsaid = False
        self._beat += 1
        state = ReplicaState(
            id=self._id,
            beat=self._beat,
            applied=self._applied,
            ready=self._preparations.of("ready"),
            refused=self._preparations.refused(),
            lease_seconds=self._lease.seconds,
            about={"name": self._name, "preparing": list(self._preparations.of("preparing"))},
        )
        try:
            await self._call(self._log.write_state, state)
        except BaseException:
            self._unsaid = True
            raise
        self._said = began

    async def _load(self) -> None:
        """Take over the newest snapshot and what follows it, whatever was known before."""
        number, names = await self._call(self._log.load)
        await self._restore(names)
        self.number = number
        self._preparations.follow(self._log.pending())
        self._is_loaded = True
        for own in self._own.values():
            own.lost = own.committed is None
        self._acknowledge()

    def _take(self, entries: Sequence[Entry]) -> None:
        """Apply entries in this turn of the loop."""
        settled = {entry.change for entry in entries if entry.kind != "prepare"}
        for entry in entries:
            own = self._own.get(entry.change)
            match entry.kind:
                case "prepare":
                    # Whoever catches up needs none that is committed or aborted already.
                    if entry.change not in settled:
                        self._preparations.begin(entry)
                case "commit":
                    self._commit(entry)
                    self._preparations.end(entry.change)
                    if own is not None:
                        own.committed = entry.number
                case "abort":
                    self._preparations.end(entry.change, discard=True)
                    if own is not None:
                        own.aborted = True
            self.number = entry.number
        if entries:
            self._acknowledge()

    def _acknowledge(self) -> None:
        task = asyncio.create_task(self._deliver(self.number))
        self._delivering.add(task)
        task.add_done_callback(self._delivering.discard)

    async def _deliver(self, number: int) -> None:
        await self._everywhere()
        if number > self._applied:
            self._applied = number
            self._applied_changed.set()
            self.changed()

    async def _call(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, lambda: function(*args, **kwargs))
