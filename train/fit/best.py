"""`fit --method best`: several methods, of which one is kept by the validation rows.

The cheapest is tried first. A dearer one replaces what is kept only if it is better by more than
chance: by the interval of a paired bootstrap, since both answer the same rows.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from train.config.settings import MethodName
from train.loop.loop import RowCounts
from train.metrics import TAILS, draw_rows

# From the cheapest to serve to the dearest. Without vectors or LoRA, the states of the layers below
# the prompt are kept between epochs.
CANDIDATES = (
    MethodName.HEAD_ONLY,
    MethodName.VECTORS,
    MethodName.IDSPAM,
    MethodName.IDSPAM_VECTORS,
    MethodName.LORA,
)
_SEED = 1


@dataclass(frozen=True, slots=True)
class Candidate:
    """A trial of one method, which always trains to its end (`train.fit.search`)."""

    params: dict[str, Any]

    def report(self, value: float, step: int) -> None:
        """Nothing to learn from an epoch."""

    def should_prune(self) -> bool:
        return False


class Candidates:
    """The methods in turn, as a search's proposals."""

    space = ("method",)

    def __init__(self) -> None:
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


def is_better(counts: RowCounts, kept: RowCounts) -> bool:
    """Whether a method's figure is above that of the kept one by more than chance: the 95 %
    interval of the difference, over resamples of the rows, is above zero."""
    drawn = np.concatenate(
        [
            _figures(counts, rows) - _figures(kept, rows)
            for rows in draw_rows(len(counts.hits), seed=_SEED)
        ]
    )
    return bool(np.quantile(drawn, TAILS[0]) > 0)


def _figures(counts: RowCounts, rows: NDArray[Any]) -> NDArray[Any]:
    """micro-F1, with one label a text the accuracy, of resamples: float64 [resamples].

    Args:
        rows: int64 [resamples, rows].
    """
    hits, occurs = np.array(counts.hits), np.array(counts.occurs)
    figures: NDArray[Any] = 2 * hits[rows].sum(axis=1) / np.maximum(occurs[rows].sum(axis=1), 1)
    return figures
