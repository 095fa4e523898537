"""One call from its first attempt to its answer, without doing any input or output.

An exchange is a generator. It yields what is to be done, a `Request` to send or a `Wait`, is sent
what came of it, a `Reply` or a `Broken`, and returns the decoded answer. Whoever drives it may
block, await, or be a test.
"""

import random
import time
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeAlias, TypeVar

import msgspec

from service.client.errors import Refused, UnexpectedAnswer, Unreachable, refusal_of
from service.client.retries import BUSY, NOT_READY, ONCE, Retries, seconds_of
from service.client.shapes import ErrorBody, ErrorContent

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
