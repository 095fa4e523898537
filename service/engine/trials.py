"""Names that try a second revision: what the engine needs to know, and what it reports.

The second revision is the candidate. Its share of the texts is decided where names are resolved
(`service.catalog.traffic`); the report is judged in `service.catalog.trials`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

# Who read a text: the current revision or the candidate, which answered it, or either of them
# beside the one that answered.
Role: TypeAlias = Literal["current", "canary", "shadow"]
# Why a text was not read a second time: too many wait for an idle device; a request needed the
# memory, or the adapter is not on the device; the two revisions read different parts of the text.
DropReason: TypeAlias = Literal["load", "memory", "length"]

# Why a division ended: its rule (the first three); it was stopped; its revision became the current
# one; another one did; its revision can no longer be served, or the name is unloaded; the stored
# file of the division is damaged.
Cause: TypeAlias = Literal[
    "errors",
    "disagreement",
    "latency",
    "stopped",
    "promoted",
    "replaced",
    "unusable",
    "damaged",
]

# Pairs of answers that are counted each; all others are counted together, under this label.
MAX_DIRECTIONS = 20
OTHER_LABEL = "(other)"


class Trial(NamedTuple):
    """The trial that an entry is part of.

    candidate: the second revision. other: the revision that reads the text too, to be compared;
    None: the text is not compared. cost: of the text with that revision.
    """

    candidate: str
    other: str | None = None
    cost: int = 0


@dataclass(slots=True, eq=False)
class Pair:
    """One text that both revisions have read: float32 [labels], in each spec's order."""

    current: npt.NDArray[np.float32]
    candidate: npt.NDArray[np.float32]


class TrialListener:
    """What the engine reports about trials; this class ignores all of it.

    Methods are called on the event loop while requests wait: they take microseconds and never
    raise.
    """

    def read(
        self, name: str, candidate: str, role: Role, texts: int, seconds: float | None
    ) -> None:
        """Texts were read, or failed in reading. seconds: of the request from its admission, for a
        shadow of the batch; None if revisions share the request."""

    def failed(self, name: str, candidate: str, revision: str, role: Role, texts: int) -> None:
        """So many of the texts that this revision read had no scores."""

    def compared(self, name: str, candidate: str, pairs: Sequence[Pair]) -> None:
        """Both revisions have read these texts."""

    def dropped(self, name: str, candidate: str, texts: int, reason: DropReason) -> None:
        """Texts were not read a second time."""

    def unreadable(self, name: str, revision: str, reason: str) -> None:
        """A revision cannot be loaded."""
