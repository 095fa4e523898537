"""Makes changes that hold on all replicas: prepare, wait until all are ready, commit, wait until
all have switched. The replica that does this for a change is its committer.
"""

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from time import monotonic
from typing import ParamSpec, TypeVar
from uuid import uuid4

from adapters.errors import RevisionConflict, StoreError, StoreUnreachable, UnknownOutcome
from adapters.faults import fault_point
from adapters.shared.log import SharedLog
from adapters.shared.records import Entry, Kind, NameRecord, ReplicaState
from service.catalog.entry import ChangeResult, Wait
from service.engine.observer import Observer, RolloutOutcome
from service.errors import RolloutRefused, RolloutTimeout
from service.replicas.follower import Follower, OwnChange
from service.replicas.preparations import Preparations
from service.replicas.watch import MARGIN, Watch, name_of

logger = logging.getLogger(__name__)

# Between two looks at the states, and more where a look takes longer.
_LOOK_SECONDS = 0.03
_THREADS = 4

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Decision:
    """What a change makes of a name as it is now.

    record: its new record; None: deleted. prepare: the revision that replicas load beforehand, if
    any. changes: there is something to commit.
    """

    record: NameRecord | None
    result: ChangeResult
    prepare: str | None = None
    changes: bool = True


class Rollouts:
    """
    Args:
        seconds: how long replicas may take to get ready.
        lease_seconds: of this replica.
    """

    def __init__(
        self,
        log: SharedLog,
        follower: Follower,
        preparations: Preparations,
        *,
        seconds: float,
        lease_seconds: float,
        observer: Observer,
    ) -> None:
        self._log = log
        self._follower = follower
        self._preparations = preparations
        self._watch = Watch(log.states, log.remove_state)
        self._looking = asyncio.Lock()
        self._seconds = seconds
        # The longest that is known of any replica.
        self._lease_seconds = lease_seconds
        self._observer = observer
        self._threads = ThreadPoolExecutor(_THREADS, "rollout")
        self._aborting: dict[str, asyncio.Task[None]] = {}

    async def run(
        self, name: str, operation: str, decide: Callable[[], Decision], *, wait: Wait
    ) -> ChangeResult:
        """Make a change.

        Args:
            decide: what it makes of the name as it is applied here now; called again whenever
                another entry came first. Its errors end the change.

        Raises:
            RolloutRefused, RolloutTimeout: nothing has changed.
            StoreUnreachable: nothing has changed; UnknownOutcome: this cannot be told.
        """
        # What is wrong by itself is no roll-out.
        decide()
        began = monotonic()
        outcome: RolloutOutcome = "failed"
        try:
            with self._follower.own(uuid4().hex) as own:
                decision = await self._decided(name, operation, decide, own, wait)
                written = monotonic()
                assert own.committed is not None
                await self._until_applied(own.committed, written, wait)
            outcome = "committed" if decision.changes else "unchanged"
            return decision.result
        except RolloutRefused:
            outcome = "refused"
            raise
        except RolloutTimeout:
            outcome = "timeout"
            raise
        except RevisionConflict:
            outcome = "conflict"
            raise
        finally:
            self._observer.rolled_out(outcome, monotonic() - began)

    def abort(self, entry: Entry) -> None:
        """Abort a prepare, in the background: its committer has given up or is gone."""
        if entry.change not in self._aborting:
            task = asyncio.create_task(self._abort(entry))
            self._aborting[entry.change] = task
            task.add_done_callback(lambda _: self._aborting.pop(entry.change, None))

    async def stop(self) -> None:
        for task in list(self._aborting.values()):
            task.cancel()
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _decided(
        self,
        name: str,
        operation: str,
        decide: Callable[[], Decision],
        own: OwnChange,
        wait: Wait,
    ) -> Decision:
        """Bring the commit into the log, and return what it makes of the name."""
        prepare: Entry | None = None
        prepared: str | None = None
        try:
            while True:
                decision = decide()
                if not decision.changes:
                    own.committed = self._follower.number
                    if prepare is not None:
                        # Somebody else has committed the same.
                        self.abort(prepare)
                    return decision
                kind: Kind = "commit"
                if decision.prepare is not None and wait != "none" and prepare is None:
                    kind = "prepare"
                elif prepare is not None and decision.prepare != prepared:
                    # What to roll back to is another revision now.
                    raise RevisionConflict(name, prepared or "", decision.prepare)
                entry = self._entry(kind, own.id, name, operation, decision.record)
                if kind == "prepare" and await self._append(entry, own):
                    prepare, prepared = entry, decision.prepare
                    fault_point("rollout.prepared")
                    await self._until_ready(entry, own, wait)
                    fault_point("rollout.ready")
                elif kind == "commit" and await self._append(entry, own):
                    return decision
                self._refuse_if_aborted(name, own)
        except BaseException as error:
            if prepare is not None and own.committed is None and not own.aborted:
                logger.info("roll-out aborted name=%s: %s", name, error)
                self.abort(prepare)
            raise

    def _refuse_if_aborted(self, name: str, own: OwnChange) -> None:
        if own.lost:
            raise UnknownOutcome(f"this replica was too slow to see what became of {name!r}")
        if own.aborted:
            raise RolloutTimeout(name, [self._follower.id], self._seconds)

    def _entry(
        self, kind: Kind, change: str, name: str, operation: str, record: NameRecord | None
    ) -> Entry:
        return Entry(
            number=self._follower.number + 1,
            kind=kind,
            change=change,
            name=name,
            operation=operation,
            record=record,
            by=self._follower.id,
            at=datetime.now(UTC).isoformat(timespec="milliseconds"),
        )

    async def _append(self, entry: Entry, own: OwnChange) -> bool:
        """Append an entry of this replica and read it back; False: another one came first.

        Raises:
            StoreUnreachable: a prepare cannot be written.
            UnknownOutcome: the same of a commit, which may be in the log or get there.
        """
        until = monotonic() + self._lease_seconds * MARGIN
        is_commit = entry.kind == "commit"
        while True:
            try:
                written = await self._call(self._log.append, entry)
                if written and is_commit:
                    # It is made, whether or not this replica can still read it.
                    own.committed = entry.number
                    with suppress(StoreError):
                        await self._follower.caught_up()
                    return True
                await self._follower.caught_up()
                return written or own.committed is not None
            except StoreUnreachable as error:
                if not is_commit:
                    # One that gets into the log later changes nothing either.
                    raise StoreUnreachable(
                        f"{entry.operation} of {entry.name!r} could not begin, and nothing has "
                        f"changed: {error.__cause__ or error}"
                    ) from None
                with suppress(StoreError):
                    await self._follower.caught_up()
                if own.committed is not None:
                    return True
                if self._follower.number >= entry.number:
                    return False
                if monotonic() >= until:
                    raise UnknownOutcome(
                        f"the shared store fails: whether {entry.operation} of {entry.name!r} "
                        f"happens cannot be told now: {error}"
                    ) from None
                await asyncio.sleep(_LOOK_SECONDS)

    async def _until_ready(self, prepare: Entry, own: OwnChange, wait: Wait) -> None:
        """
        Raises:
            RolloutRefused, RolloutTimeout, StoreUnreachable
        """
        until = monotonic() + self._seconds
        if wait == "one":
            await self._until_ready_here(prepare, until)
            return
        while True:
            began = monotonic()
            states = await self._look()
            for state in states:
                if (reason := state.refused.get(prepare.change)) is not None:
                    raise RolloutRefused(prepare.name, name_of(state), reason)
            waiting = [
                state
                for state in states
                if prepare.change not in state.ready
                and (
                    state.applied < prepare.number
                    or prepare.change in state.about.get("preparing", ())
                )
            ]
            if not waiting:
                return
            if monotonic() >= until or own.aborted:
                raise RolloutTimeout(prepare.name, list(map(name_of, waiting)), self._seconds)
            await asyncio.sleep(max(_LOOK_SECONDS, monotonic() - began))

    async def _until_ready_here(self, prepare: Entry, until: float) -> None:
        try:
            async with asyncio.timeout(max(0.0, until - monotonic())):
                here = await self._preparations.done(prepare.change)
        except TimeoutError:
            raise RolloutTimeout(prepare.name, [self._follower.id], self._seconds) from None
        if here is not None and here.status == "refused":
            raise RolloutRefused(prepare.name, self._follower.id, here.reason)

    async def _until_applied(self, number: int, written: float, wait: Wait) -> None:
        """Return when no replica (with `one`: not this one) answers from before this entry.

        Args:
            written: when the entry certainly was in the log.
        """
        if wait == "none":
            return
        if wait == "one":
            with suppress(TimeoutError):
                async with asyncio.timeout(self._lease_seconds * MARGIN):
                    await self._follower.delivered(number)
            return
        while True:
            began = monotonic()
            try:
                states = await self._look()
            except StoreError:
                # Nothing is known: each may be one that has not read the entry.
                if began >= written + self._lease_seconds * MARGIN:
                    return
            else:
                if all(
                    state.applied >= number or began >= written + state.lease_seconds * MARGIN
                    for state in states
                ):
                    return
            await asyncio.sleep(max(_LOOK_SECONDS, monotonic() - began))

    async def _look(self) -> list[ReplicaState]:
        async with self._looking:
            states = await self._call(self._watch.look)
        self._lease_seconds = max([self._lease_seconds, *(item.lease_seconds for item in states)])
        return states

    async def _abort(self, prepare: Entry) -> None:
        while prepare.change in self._preparations:
            entry = self._entry(
                "abort", prepare.change, prepare.name, prepare.operation, prepare.record
            )
            try:
                await self._call(self._log.append, entry)
                await self._follower.caught_up()
            except StoreError:
                # Whoever keeps the prepare for too long aborts it.
                return

    async def _call(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, lambda: function(*args, **kwargs))
