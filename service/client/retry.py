"""One call from its first attempt to its answer, without I/O.

An exchange is a generator. It yields attempts, is sent the outcome of each, a `Reply` or a
`NoReply`, and returns the decoded answer. A blocking client, an async one or a test can drive it.
"""

import html
import random
import re
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from typing import Generic, TypeAlias, TypeVar

import msgspec

from service.client.errors import InvalidCall, Refused, UnexpectedAnswer, Unreachable, refusal_of
from service.client.types import ErrorBody, ErrorContent

T = TypeVar("T")

_BUSY = frozenset({429, 503})
# The only 503 after which nothing was begun: an `unavailable` engine may have stopped halfway.
_NOT_READY = "not_ready"
# A disk does not mend while a client waits, and uploads are large.
_DISK_TYPES = frozenset({"store_failed", "audit_failed"})
# How much of another server's page an error quotes.
_QUOTED_CHARACTERS = 200
_SEARCHED_BYTES = 4096
_TITLE = re.compile(r"<title[^>]*>(.*?)</title>", re.IGNORECASE | re.DOTALL)
_HEADING = re.compile(r"<h1[^>]*>(.*?)</h1>", re.IGNORECASE | re.DOTALL)
_TAG = re.compile(r"<style.*?</style>|<script.*?</script>|<[^>]*>", re.IGNORECASE | re.DOTALL)


@dataclass(frozen=True, slots=True)
class Request:
    """path: below the service's address, quoted. seconds: added to the client's time limit."""

    method: str
    path: str
    params: Mapping[str, str | Sequence[str]] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes | None = None
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Attempt:
    """Wait for `delay` seconds, then send the request."""

    request: Request
    delay: float


@dataclass(frozen=True, slots=True)
class Reply:
    """headers: with names in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes


@dataclass(frozen=True, slots=True)
class NoReply:
    """sent: the service may have received the request, and acted on it."""

    reason: str
    sent: bool


Outcome: TypeAlias = Reply | NoReply
Exchange: TypeAlias = Generator[Attempt, Outcome, T]


@dataclass(frozen=True, slots=True)
class Call(Generic[T]):
    """A request, how to read its answer, and whether it may be sent again.

    repeatable: sending it twice is harmless. accepted: statuses besides 2xx that are answers.
    """

    request: Request
    decode: Callable[[Reply], T]
    repeatable: bool = True
    accepted: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class Retries:
    """How often a call is attempted, and for how many seconds in all, waits included.

    first, longest: seconds of the first and of the longest wait, if the service names none. Waits
    double; half of each is random.

    Raises:
        InvalidCall: numbers that are not positive.
    """

    attempts: int = 8
    seconds: float = 60.0
    first: float = 0.2
    longest: float = 8.0

    def __post_init__(self) -> None:
        if self.attempts < 1 or not (self.seconds > 0 and 0 < self.first <= self.longest):
            raise InvalidCall(f"{self}: expected at least one attempt, and positive seconds")

    def wait(
        self, *, attempt: int, elapsed: float, retry_after: float | None, chance: float
    ) -> float | None:
        """Seconds until the next attempt; None if there is none.

        Args:
            attempt: the one that just failed, counted from 1.
            elapsed: seconds since the first attempt began.
            retry_after: seconds that the service asked for; the wait is exactly that long.
            chance: a random number from 0 up to 1.
        """
        if attempt >= self.attempts:
            return None
        # A float overflows beyond 2.0 ** 1023.
        doubled = min(self.longest, self.first * 2.0 ** min(attempt - 1, 60))
        seconds = doubled * (0.5 + chance / 2) if retry_after is None else retry_after
        return None if elapsed + seconds > self.seconds else seconds


ONCE = Retries(attempts=1)


@dataclass(frozen=True, slots=True)
class Exchanger:
    """Turns calls into exchanges. url, via: the service's address and the way there, for errors."""

    url: str
    retries: Retries = field(default_factory=Retries)
    via: str = ""
    clock: Callable[[], float] = time.monotonic
    chance: Callable[[], float] = random.random

    def __call__(self, call: Call[T]) -> Exchange[T]:
        """
        Raises:
            Refused, Unreachable: from the last attempt.
            UnexpectedAnswer: the reply is not one of this service's.
        """
        began, attempt, delay = self.clock(), 0, 0.0
        while True:
            attempt += 1
            outcome = yield Attempt(call.request, delay)
            retry_after = None
            if isinstance(outcome, NoReply):
                reason = "the connection broke" if outcome.sent else "no service answers"
                error: Unreachable | Refused = Unreachable(
                    f"{reason}: {self._place}: {outcome.reason}"
                )
                again = call.repeatable or not outcome.sent
            elif 200 <= outcome.status < 300 or outcome.status in call.accepted:
                return self._decoded(call, outcome)
            else:
                error = refused(outcome, self.via)
                retry_after = error.retry_after
                again = (
                    error.status in _BUSY
                    and error.type not in _DISK_TYPES
                    and (call.repeatable or error.status == 429 or error.type == _NOT_READY)
                )
            wait = self.retries.wait(
                attempt=attempt,
                elapsed=self.clock() - began,
                retry_after=retry_after,
                chance=self.chance(),
            )
            if not again or wait is None:
                raise error
            delay = wait

    @property
    def _place(self) -> str:
        return f"{self.url} {self.via}".rstrip()

    def _decoded(self, call: Call[T], reply: Reply) -> T:
        try:
            return call.decode(reply)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise UnexpectedAnswer(
                f"{self._place} answered {reply.status}, but not as this service does: {error}"
            ) from None


def refused(reply: Reply, via: str = "") -> Refused:
    """The error of a reply that is none of this service's answers. via: the way there."""
    try:
        error = msgspec.json.decode(reply.body, type=ErrorBody).error
        content = ErrorContent(type="", message=error) if isinstance(error, str) else error
    except (msgspec.MsgspecError, UnicodeDecodeError):
        # A proxy's page, or another server.
        message = _foreign(reply)
        content = ErrorContent(type="", message=f"{message}, {via}" if via else message)
    return refusal_of(reply.status)(
        reply.status,
        type=content.type,
        message=content.message,
        details=content.details,
        request_id=reply.headers.get("x-request-id"),
        retry_after=parse_retry_after(reply.headers.get("retry-after")),
    )


def _foreign(reply: Reply) -> str:
    """What another server says, in one line: a page's title, or the beginning of a text."""
    if 300 <= reply.status < 400 and (location := reply.headers.get("location")):
        return f"redirected to {_plain(location)}"
    text = reply.body[:_SEARCHED_BYTES].decode("utf-8", "replace")
    if text.lstrip().startswith("<"):
        title = _TITLE.search(text) or _HEADING.search(text)
        text = title[1] if title else _TAG.sub(" ", text)
    text = _plain(html.unescape(text)).removeprefix(str(reply.status)).strip()
    return text or _reason_phrase(reply.status)


def _plain(text: str) -> str:
    """A text as one short line without control characters."""
    printable = "".join(char if char.isprintable() else " " for char in text)
    return " ".join(printable.split())[:_QUOTED_CHARACTERS]


def _reason_phrase(status: int) -> str:
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return "no message"


def parse_retry_after(header: str | None, *, now: datetime | None = None) -> float | None:
    """Seconds from a `Retry-After` header, which holds seconds or a date; None if it is neither."""
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
