"""What routes ask about drift, and the values that they get; all of them can cross a socket."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from adapters.profiles import Quantity
from service.drift.shift import Level

# Of a text that is kept: a longer one is cut.
MOST_CHARACTERS = 4096
# Labels that are kept with their scores, the best first.
MOST_SCORES = 5


@dataclass(frozen=True, slots=True)
class Bin:
    """reference, seen: the share of the texts of training, and of those that were answered."""

    bin: str
    reference: float
    seen: float


@dataclass(frozen=True, slots=True)
class QuantityShift:
    """How far one quantity has moved. chance: as of `service.drift.shift.Shift`."""

    quantity: Quantity
    psi: float
    chance: float
    level: Level
    bins: tuple[Bin, ...]


@dataclass(frozen=True, slots=True)
class DriftReport:
    """What one revision was asked, beside what its training saw.

    texts: that were counted since then, at most as many as the window holds. since: ISO 8601; None
    without texts. counting_since: when this engine began to count, at zero; ISO 8601.
    reference_texts: of the profile; 0 without one. note: why no quantity is there.
    """

    adapter: str
    revision: str
    texts: int
    since: str | None
    counting_since: str
    reference_texts: int
    quantities: tuple[QuantityShift, ...]
    note: str | None = None


@dataclass(frozen=True, slots=True)
class UncertainText:
    """A text that is worth a label. certainty: what it was chosen by, the lowest first.

    scores: of the best labels. cut: whether the text is longer than what is kept. time: ISO 8601.
    """

    adapter: str
    revision: str
    text: str
    text_pair: str | None
    label: str
    certainty: float
    scores: tuple[tuple[str, float], ...]
    time: str
    cut: bool = False


class DriftView(Protocol):
    """Drift and uncertain texts as the routes see them, whichever process counts."""

    async def report(self, name: str, revision: str) -> DriftReport:
        """
        Raises:
            EngineUnavailable: the engine's process does not answer.
        """

    def keep(self, texts: Sequence[UncertainText]) -> None:
        """Keep texts that the engine has asked for. Takes microseconds and never raises."""

    async def uncertain(self, name: str) -> list[UncertainText]:
        """The texts that are kept for a name, the least certain first; raises as `report`."""

    async def forget(self, name: str) -> int:
        """Forget the texts of a name, and return how many there were; raises as `report`."""
