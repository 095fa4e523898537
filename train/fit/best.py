"""`fit --method best`: several methods, of which one is kept by the validation rows.

The cheapest is tried first. A dearer one replaces what is kept only if it is better by more than
the interval that chance gives to the figure on so many rows.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from train.config.settings import MethodName

# From the cheapest to serve to the dearest. Without vectors or LoRA, the states of the layers below
# the prompt are kept between epochs.
CANDIDATES = (
    MethodName.HEAD_ONLY,
    MethodName.VECTORS,
    MethodName.IDSPAM,
    MethodName.IDSPAM_VECTORS,
    MethodName.LORA,
)
# Of the normal distribution, for an interval of 95 %.
_DEVIATIONS = 1.96


@dataclass(frozen=True, slots=True)
class Candidate:
    """A trial of one method, which always trains to its end (`train.fit.search`)."""

    params: dict[str, Any]

    def report(self, value: float, step: int) -> None:
        """Nothing to learn from an epoch."""

    def should_prune(self) -> bool:
        return False


class Candidates:
    """The methods in turn, as a search's proposals.

    Args:
        rows: on which they are compared.
    """

    space = ("method",)

    def __init__(self, rows: int) -> None:
        self._rows = rows
        self._ended = 0

    def add(self, *_: object) -> None:
        """One has ended before this run was interrupted."""
        self._ended += 1

    def next(self) -> Candidate:
        return Candidate({"method": CANDIDATES[self._ended].value})

    def again(self, settings: Mapping[str, Any]) -> Candidate:
        return Candidate(dict(settings))

    def end(self, *_: object) -> None:
        """One has ended."""
        self._ended += 1

    def is_better(self, score: tuple[float, float], kept: tuple[float, float]) -> bool:
        """Whether a score is above the interval of what is kept."""
        return score[0] > upper_bound(kept[0], self._rows)


def upper_bound(share: float, rows: int) -> float:
    """The upper end of the 95 % interval of a share of so many rows.

    Source: Wilson, "Probable Inference, the Law of Succession, and Statistical Inference", 1927.
    """
    squared = _DEVIATIONS**2 / rows
    centre = share + squared / 2
    spread = math.sqrt(share * (1 - share) * squared + squared**2 / 4)
    return (centre + spread) / (1 + squared)
