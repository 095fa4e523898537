"""One call from its first attempt to its answer, without doing any input or output.

An exchange is a generator. It yields what is to be done, a `Request` to send or a `Wait`, is sent
what came of it, a `Reply` or a `Broken`, and returns the decoded answer. Whoever drives it may
block, await, or be a test.
"""

import random
import time
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Generic, TypeAlias, TypeVar

import msgspec

from service.client.errors import InvalidCall, Refused, UnexpectedAnswer, Unreachable, refusal_of
from service.client.types import ErrorBody, ErrorContent

# --- merged from service.client.retries

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


# --- merged from service.client.exchange

T = TypeVar("T")

# Of an answer that is not this service's: what is shown of it.
_SHOWN = 200


@dataclass(frozen=True, slots=True)
class Request:
    """path: below the service's address, quoted. seconds: the answer may take longer than others
    by so much."""

    method: str
    path: str
    params: Mapping[str, str] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes | None = None
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Wait:
    """Do nothing for so many seconds."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Reply:
    """headers: their names in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes


@dataclass(frozen=True, slots=True)
class Broken:
    """No reply. sent: the service may have got the request, and done what it asks for."""

    reason: str
    sent: bool


Step: TypeAlias = Request | Wait
Outcome: TypeAlias = Reply | Broken | None
Exchange: TypeAlias = Generator[Step, Outcome, T]


@dataclass(frozen=True, slots=True)
class Call(Generic[T]):
    """A request, how its answer is read, and what may be done when there is none.

    repeatable: having its effect twice is no harm. accepted: statuses beside 2xx that are answers.
    """

    request: Request
    decode: Callable[[Reply], T]
    repeatable: bool = True
    accepted: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class Exchanger:
    """Makes exchanges. url: what errors name."""

    url: str
    retries: Retries = field(default_factory=Retries)
    clock: Callable[[], float] = time.monotonic
    chance: Callable[[], float] = random.random

    def once(self) -> "Exchanger":
        """The same without repeating anything."""
        return Exchanger(self.url, ONCE, self.clock, self.chance)

    def __call__(self, call: Call[T]) -> Exchange[T]:
        """
        Raises:
            Refused, Unreachable: by the last attempt.
            UnexpectedAnswer: what came is not what this service answers.
        """
        began, attempt = self.clock(), 0
        while True:
            attempt += 1
            outcome = yield call.request
            assert outcome is not None, "a request has an outcome"
            said = None
            if isinstance(outcome, Broken):
                error: Unreachable | Refused = self._unreachable(outcome)
                again = call.repeatable or not outcome.sent
            elif 200 <= outcome.status < 300 or outcome.status in call.accepted:
                return self._decoded(call, outcome)
            else:
                error = _refused(outcome)
                said = error.retry_after
                again = error.status in BUSY and (
                    call.repeatable or error.status == 429 or error.type == NOT_READY
                )
            wait = self.retries.wait(
                attempt=attempt, elapsed=self.clock() - began, said=said, chance=self.chance()
            )
            if not again or wait is None:
                raise error
            yield Wait(wait)

    def _decoded(self, call: Call[T], reply: Reply) -> T:
        try:
            return call.decode(reply)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise UnexpectedAnswer(
                f"{self.url} answered {reply.status}, but not as this service does: {error}"
            ) from None

    def _unreachable(self, outcome: Broken) -> Unreachable:
        what = "the connection broke" if outcome.sent else "no service answers"
        return Unreachable(f"{what}: {self.url}: {outcome.reason}")


def _refused(reply: Reply) -> Refused:
    try:
        content = msgspec.json.decode(reply.body, type=ErrorBody).error
    except (msgspec.MsgspecError, UnicodeDecodeError):
        # A proxy's page, or another server.
        text = " ".join(reply.body[:_SHOWN].decode("utf-8", "replace").split())
        content = ErrorContent(type="", message=text or "no message")
    return refusal_of(reply.status)(
        reply.status,
        type=content.type,
        message=content.message,
        details=content.details,
        request_id=reply.headers.get("x-request-id"),
        retry_after=seconds_of(reply.headers.get("retry-after")),
    )
