"""The changes that this replica prepares for: it fetches a revision, checks it and loads it, and
keeps what came of that until the change is committed or aborted, or its time is over.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from time import monotonic
from typing import Literal, TypeAlias

from adapters.errors import AdapterError, StoreUnreachable
from adapters.shared.records import Entry
from service.errors import ServiceError, Unavailable

logger = logging.getLogger(__name__)

# Between two tries to fetch a file from a store that does not answer.
_AGAIN_SECONDS = 0.5

Status: TypeAlias = Literal["preparing", "ready", "refused"]


@dataclass(slots=True, eq=False)
class Preparation:
    """entry: the prepare. reason: why it is refused. done: set when it is no longer `preparing`."""

    entry: Entry
    began: float
    status: Status = "preparing"
    reason: str = ""
    done: asyncio.Event = field(default_factory=asyncio.Event)
    task: "asyncio.Task[None] | None" = None


class Preparations:
    """By the id of the change.

    Args:
        prepare: fetches, checks and loads the revision of an entry.
        discard: called with an entry that is given up.
        changed: called whenever a status has changed.
        seconds: how long a preparation is kept.
    """

    def __init__(
        self,
        *,
        prepare: Callable[[Entry], Awaitable[None]],
        discard: Callable[[Entry], None],
        changed: Callable[[], None],
        seconds: float,
    ) -> None:
        self._prepare = prepare
        self._discard = discard
        self._changed = changed
        self._seconds = seconds
        self._open: dict[str, Preparation] = {}

    def __bool__(self) -> bool:
        return bool(self._open)

    def __contains__(self, change: str) -> bool:
        return change in self._open

    def of(self, status: Status) -> tuple[str, ...]:
        """The changes with this status."""
        return tuple(key for key, item in self._open.items() if item.status == status)

    def refused(self) -> dict[str, str]:
        """Why, by change."""
        return {key: item.reason for key, item in self._open.items() if item.status == "refused"}

    async def done(self, change: str) -> Preparation | None:
        """What came of a preparation, once something has; None if there is none."""
        preparation = self._open.get(change)
        if preparation is not None:
            await preparation.done.wait()
        return preparation

    def begin(self, entry: Entry) -> None:
        self.end(entry.change)
        preparation = Preparation(entry, monotonic())
        self._open[entry.change] = preparation
        preparation.task = asyncio.create_task(self._run(preparation))

    def follow(self, pending: Mapping[str, Entry]) -> None:
        """Prepare for these changes and no others."""
        for change in self._open.keys() - pending.keys():
            self.end(change, discard=True)
        for change in pending.keys() - self._open.keys():
            self.begin(pending[change])

    def end(self, change: str, *, discard: bool = False) -> None:
        """Forget a change that was committed or aborted.

        Args:
            discard: its revision is not needed after all.
        """
        preparation = self._open.pop(change, None)
        if preparation is None:
            return
        if discard:
            if preparation.task is not None:
                preparation.task.cancel()
            self._discard(preparation.entry)
        if preparation.status == "preparing":
            preparation.done.set()

    def expired(self) -> list[Entry]:
        """The prepares whose time is over; they stay open until they are ended."""
        until = monotonic() - self._seconds
        return [item.entry for item in self._open.values() if item.began < until]

    def stop(self) -> None:
        for change in list(self._open):
            self.end(change, discard=True)

    async def _run(self, preparation: Preparation) -> None:
        entry = preparation.entry
        try:
            while True:
                try:
                    await self._prepare(entry)
                    break
                except StoreUnreachable:
                    # The committer gives up when it takes too long.
                    await asyncio.sleep(_AGAIN_SECONDS)
                    if self._open.get(entry.change) is not preparation:
                        return
        except Unavailable:
            # This replica is ending: it does not vote.
            self.end(entry.change)
            self._changed()
            return
        except Exception as error:
            if not isinstance(error, (AdapterError, ServiceError)):
                logger.exception("a revision cannot be prepared")
            preparation.status = "refused"
            preparation.reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            logger.warning("revision refused name=%s: %s", entry.name, preparation.reason)
        else:
            preparation.status = "ready"
        preparation.done.set()
        self._changed()
