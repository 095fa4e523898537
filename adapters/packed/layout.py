"""The rows' extents in a flat sequence, and what follows from them. Knows no prompt."""

from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Indices: TypeAlias = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Run:
    """`rows` neighbours of the same `length`."""

    rows: int
    length: int


@dataclass(frozen=True)
class Layout:
    """The rows' extents in one flat sequence of `tokens` positions.

    Attention sees nothing else of a batch.
    """

    lengths: Indices  # [rows]
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @cached_property
    def starts(self) -> Indices:
        """[rows]"""
        return np.cumsum(self.lengths) - self.lengths

    @property
    def tokens(self) -> int:
        return int(self.lengths.sum())

    @cached_property
    def runs(self) -> tuple[Run, ...]:
        edges = np.flatnonzero(np.diff(self.lengths)) + 1
        bounds = [0, *edges.tolist(), len(self.lengths)]
        return tuple(
            Run(last - first, int(self.lengths[first]))
            for first, last in pairwise(bounds)
            if last > first
        )

    def by_run(self, states: Tensor) -> list[Tensor]:
        """[T, ...] -> one view [rows, length, ...] a run.

        One split, so that its gradient is one concatenation.
        """
        pieces = states.split([run.rows * run.length for run in self.runs])
        return [
            piece.view(run.rows, run.length, *piece.shape[1:])
            for piece, run in zip(pieces, self.runs, strict=True)
        ]

    @cached_property
    def cumulative(self) -> Tensor:
        """int32 [rows + 1] on the device: `cu_seqlens` of the varlen attention kernels."""
        edges = np.concatenate([[0], np.cumsum(self.lengths)]).astype(np.int32)
        return torch.from_numpy(edges).to(self.device, non_blocking=True)

    @cached_property
    def longest(self) -> int:
        return int(self.lengths.max())

    @cached_property
    def grid(self) -> "Grid":
        """The rows as a rectangle, for what a GPU would rather do at once than by runs."""
        within = np.arange(self.longest)
        real = within < self.lengths[:, None]
        taken = self.starts[:, None] + np.minimum(within, self.lengths[:, None] - 1)
        places = np.flatnonzero(real)
        arrays = (taken.ravel(), places, real, self.lengths.astype(np.float32))
        return Grid(*(torch.from_numpy(item).to(self.device, non_blocking=True) for item in arrays))


@dataclass(frozen=True, slots=True)
class Grid:
    """Rows padded to the longest. taken: int64 [rows * longest], the token at every place, a row's
    last one behind its end. places: int64 [T], where each token is. real: bool [rows, longest].
    lengths: float32 [rows]."""

    taken: Tensor
    places: Tensor
    real: Tensor
    lengths: Tensor

    def of(self, states: Tensor) -> Tensor:
        """[T, d] -> [rows, longest, d]"""
        return states.index_select(0, self.taken).view(*self.real.shape, -1)

    def back(self, states: Tensor) -> Tensor:
        """[rows, longest] -> [T]"""
        return states.flatten().index_select(0, self.places)


def row_means(states: Tensor, layout: Layout) -> Tensor:
    """The mean of every row's tokens, float32: [T, n] -> [rows, n]."""
    if states.is_cuda:
        grid = layout.grid
        sums = (grid.of(states).float() * grid.real.unsqueeze(2)).sum(dim=1)
        return sums / grid.lengths.unsqueeze(1)
    return torch.cat([rows.float().mean(dim=1) for rows in layout.by_run(states)])
