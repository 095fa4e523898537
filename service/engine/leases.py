"""What requests hold of the device, and how they wait for it. Knows no tiers."""

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from service.engine.interface import AdapterKey
from service.engine.runner import Placed


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
