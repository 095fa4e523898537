"""Failed attempts by address: after too many, its next ones are refused without a look at them."""

import ipaddress
from collections import OrderedDict
from collections.abc import Callable
from time import monotonic

# Wrong keys of one address in a minute; also how many it may send at once.
FAILURES_PER_MINUTE = 20
MAX_ADDRESSES = 10_000


class Throttle:
    """A token bucket for each address; the table forgets the one that failed longest ago."""

    def __init__(
        self,
        *,
        per_minute: float = FAILURES_PER_MINUTE,
        addresses: int = MAX_ADDRESSES,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self._seconds = 60.0 / per_minute
        self._burst = per_minute
        self._addresses = addresses
        self._clock = clock
        # By network: when the bucket is full again.
        self._full_at: OrderedDict[str, float] = OrderedDict()

    def __len__(self) -> int:
        return len(self._full_at)

    def failed(self, address: str) -> None:
        """Count a failed attempt."""
        network, now = _network(address), self._clock()
        full_at = max(now, self._full_at.pop(network, now)) + self._seconds
        # Never later than for an empty bucket, so that a flood locks nobody out for longer.
        self._full_at[network] = min(full_at, now + self._burst * self._seconds)
        if len(self._full_at) > self._addresses:
            self._full_at.popitem(last=False)

    def wait(self, address: str) -> float:
        """Seconds until an address may try again; 0 if it may now."""
        if not self._full_at:
            return 0.0
        full_at = self._full_at.get(_network(address))
        if full_at is None:
            return 0.0
        room = (self._burst - 1) * self._seconds
        return max(0.0, full_at - self._clock() - room)


def _network(address: str) -> str:
    """An IPv6 client has at least 2**64 addresses, the rest of which it chooses itself."""
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(parsed, ipaddress.IPv4Address):
        return str(parsed)
    if parsed.ipv4_mapped is not None:
        return str(parsed.ipv4_mapped)
    return str(ipaddress.ip_network((parsed, 64), strict=False))
