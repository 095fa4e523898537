"""Whether a replica may answer. All times are of `lease_time`."""

import time

# It runs on while the machine is suspended, as the clocks of the others do.
_CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


def lease_time() -> float:
    """Seconds on the clock of leases, which all processes of a machine share."""
    return time.clock_gettime(_CLOCK)


class Lease:
    """Held from a renewal until `seconds` after what the renewal says that it began with.

    It is renewed only while it is held. Once it is over it stays so, because others may have
    stopped waiting for this replica; `begin` starts another one, under another id.

    Attributes:
        until: when it ends or has ended.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.until = 0.0
        self._is_new = True

    @property
    def held(self) -> bool:
        return lease_time() < self.until

    @property
    def is_over(self) -> bool:
        """Whether it was held, and is no longer."""
        return not self._is_new and not self.held

    def begin(self) -> None:
        """A new lease, not held before its first renewal."""
        self._is_new, self.until = True, 0.0

    def renew(self, began: float) -> bool:
        """Extend it to `seconds` after `began`, unless it is over; returns whether it is held."""
        if self.is_over:
            return False
        self._is_new = False
        self.until = max(self.until, began + self.seconds)
        return self.held

    def end(self) -> None:
        """Give it up."""
        self._is_new, self.until = False, 0.0
