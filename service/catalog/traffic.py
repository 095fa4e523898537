"""How the texts of a name are divided between its current revision and a second one.

A text's share is decided by a hash of its request key, so equal keys get the same revision, here
and on every other machine. Growing the percentage moves texts to the second revision and none
back.
"""

from dataclasses import dataclass, replace
from datetime import UTC, datetime
from hashlib import blake2b
from typing import Annotated, TypeAlias

import msgspec
from msgspec import Meta

from service.engine.trials import Cause

# Of a hash of eight bytes.
_WHOLE = 2**64

Share: TypeAlias = Annotated[float, Meta(ge=0, le=1)]
Percent: TypeAlias = Annotated[float, Meta(ge=0, le=100)]


class InvalidTraffic(ValueError):
    """The text is not a stored division of traffic."""


@dataclass(frozen=True, slots=True)
class Rule:
    """When the second revision is taken back without anyone's doing. None: no such limit.

    max_error_rate: of its texts that fail. max_disagreement: of the texts that both revisions read,
    the share with another answer. max_latency_ratio: its latency divided by the current one's.
    min_texts: nothing is decided on fewer. window_seconds: what was seen earlier no longer counts.
    """

    max_error_rate: Share | None = 0.02
    max_disagreement: Share | None = 0.2
    max_latency_ratio: Annotated[float, Meta(gt=0, le=1000)] | None = 2.0
    min_texts: Annotated[int, Meta(ge=1, le=10**6)] = 30
    window_seconds: Annotated[float, Meta(ge=1, le=7 * 86400)] = 600.0


@dataclass(frozen=True, slots=True)
class Ending:
    """cause: for programs. reason: one sentence. at: the time (UTC, ISO 8601), for people."""

    cause: Cause
    reason: str
    at: str


@dataclass(frozen=True, slots=True)
class Traffic:
    """The division of one name's texts. It is in force until it has ended.

    revision: the second one, whole. baseline: the revision that was current when it began; once
    another one is current, it is over. percent: of all texts, those that the second revision reads.
    shadow: its answers are only compared, and the current revision answers all texts. staged: the
    second one was stored without becoming current. since: as `Ending.at`.
    """

    revision: str
    baseline: str
    percent: Percent
    shadow: bool = False
    rule: Rule = Rule()
    staged: bool = False
    since: str = ""
    ended: Ending | None = None

    @property
    def in_force(self) -> bool:
        return self.ended is None

    @property
    def never_current(self) -> bool:
        """Whether the second revision has answered nothing but its share."""
        return self.staged and not (self.ended and self.ended.cause == "promoted")

    def takes(self, name: str, request_key: bytes) -> bool:
        """Whether the second revision reads the texts of this request key.

        The name and the revision are hashed too, so that divisions do not all try the same texts.
        """
        if self.percent >= 100:
            return True
        seed = f"{name}\0{self.revision}\0".encode()
        digest = blake2b(seed + request_key, digest_size=8).digest()
        return int.from_bytes(digest) < self.percent / 100 * _WHOLE

    def end(self, cause: Cause, reason: str) -> "Traffic":
        """The same once it has ended; the first ending stays."""
        return self if self.ended else replace(self, ended=Ending(cause, reason, now()))

    def to_json(self) -> str:
        return msgspec.json.encode(self, order="sorted").decode()

    @classmethod
    def from_json(cls, text: str | bytes) -> "Traffic":
        """Fields that this version does not know are ignored.

        Raises:
            InvalidTraffic: it is not what `to_json` writes.
        """
        try:
            return msgspec.json.decode(text, type=cls)
        except (msgspec.MsgspecError, UnicodeError) as error:
            raise InvalidTraffic(str(error)) from None


@dataclass(frozen=True, slots=True)
class Reading:
    """What one role has read. latency_ms: the geometric mean of its requests, or of a shadow's
    batches; None without any."""

    texts: int
    errors: int
    latency_ms: float | None


@dataclass(frozen=True, slots=True)
class Direction:
    """So many texts got the answer `after` where the current revision says `before`."""

    before: str
    after: str
    texts: int


@dataclass(frozen=True, slots=True)
class Figures:
    """What was seen of a division within its rule's window, in one engine.

    shadow: texts that the revision which did not answer them has read too. dropped: those that it
    has not. score_difference: mean over the compared texts of the candidate's score minus the
    current revision's, for the current one's best label. directions: the most frequent first, since
    the division began.
    """

    current: Reading
    canary: Reading
    shadow: Reading
    dropped: int
    compared: int
    disagreements: int
    disagreement_rate: float | None
    disagreement_low: float | None
    disagreement_high: float | None
    score_difference: float | None
    directions: tuple[Direction, ...]


def now() -> str:
    """The wall clock, for people."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def key_of_text(text: str, text_pair: str | None) -> bytes:
    """The request key of an input that comes without one: the input itself."""
    pair = "" if text_pair is None else f"\0{text_pair}"
    return f"{text}{pair}".encode("utf-8", "surrogatepass")
