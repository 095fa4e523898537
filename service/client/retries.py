"""Whether and when a call is made again. Knows no HTTP library and no clock.

What nothing came of is always made again: the connection was refused, or the service said that it
took no request. Where a call may have had its effect, only one that may have it twice is.
"""

from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

from service.client.errors import InvalidCall

BUSY = frozenset({429, 503})
# Of the 503s the one that says that nothing was begun: with `unavailable` an engine may have ended
# in the middle.
NOT_READY = "not_ready"


@dataclass(frozen=True, slots=True)
class Retries:
    """How often a call is made, and for how many seconds in all, the waits in between included.

    first and longest: seconds of a wait where the service names none; it doubles from time to time,
    and half of it is left to chance.

    Raises:
        InvalidCall: numbers that are not positive.
    """

    attempts: int = 8
    seconds: float = 60.0
    first: float = 0.2
    longest: float = 8.0

    def __post_init__(self) -> None:
        if self.attempts < 1 or not (self.seconds > 0 and 0 < self.first <= self.longest):
            raise InvalidCall(f"{self}: expected an attempt or more, and positive seconds")

    def wait(
        self, *, attempt: int, elapsed: float, said: float | None, chance: float
    ) -> float | None:
        """Seconds until the next attempt; None: there is none.

        Args:
            attempt: the one that just failed, counted from 1.
            elapsed: seconds since the first one began.
            said: what the service asked for: kept, or the call is given up.
            chance: of [0, 1).
        """
        if attempt >= self.attempts:
            return None
        # An exponent over a thousand is no float.
        doubled = min(self.longest, self.first * 2.0 ** min(attempt - 1, 60))
        seconds = doubled * (0.5 + chance / 2) if said is None else said
        return None if elapsed + seconds > self.seconds else seconds


ONCE = Retries(attempts=1)


def seconds_of(header: str | None, *, now: datetime | None = None) -> float | None:
    """What `Retry-After` asks for: seconds, or a date; None when it says neither."""
    if header is None:
        return None
    header = header.strip()
    if header.isascii() and header.isdecimal():
        return float(header[:9])
    try:
        date = parsedate_to_datetime(header)
    except ValueError:
        return None
    aware = date if date.tzinfo else date.replace(tzinfo=UTC)
    return max(0.0, (aware - (now or datetime.now(UTC))).total_seconds())
