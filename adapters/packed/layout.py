"""Where rows begin and end in a flat sequence without padding, and means over rows."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Indices: TypeAlias = npt.NDArray[np.int64]
# Takes a tensor on the host to its place on the device.
Put: TypeAlias = Callable[[Tensor], Tensor]


class Extents(Protocol):
    """What attention must know of the rows in a sequence of T positions."""

    @property
    def cumulative(self) -> Tensor:
        """int32 [rows + 1] on the device: `cu_seqlens` of the varlen attention kernels."""
        ...

    @property
    def longest(self) -> int:
        """No row has more positions."""
        ...

    def by_run(self, states: Tensor) -> list[Tensor]:
        """[T, ...] -> views [rows, length, ...] of neighbours of equal length."""
        ...


@dataclass(frozen=True, slots=True)
class Run:
    """`rows` neighbours of the same `length`."""

    rows: int
    length: int


@dataclass(frozen=True)
class Layout:
    """`Extents` whose lengths are known on the host.

    put: how arrays get to the device; None: each in a copy of its own. room: `longest` is at least
    this.
    """

    lengths: Indices  # [rows]
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    put: Put | None = None
    room: int = 0

    @cached_property
    def ends(self) -> Indices:
        """[rows]"""
        return self.lengths.cumsum()

    @cached_property
    def starts(self) -> Indices:
        """[rows]"""
        return self.ends - self.lengths

    @property
    def tokens(self) -> int:
        return int(self.ends[-1])

    @cached_property
    def edges(self) -> npt.NDArray[np.int32]:
        """[rows + 1]: the start of every row and the end of the last one."""
        edges = np.zeros(len(self.lengths) + 1, dtype=np.int32)
        edges[1:] = self.ends
        return edges

    @cached_property
    def cumulative(self) -> Tensor:
        return self._put(self.edges)

    def spans(self, starts: Indices) -> Indices:
        """Where the rows' positions are if row i begins at starts[i], int64 [tokens]."""
        return (starts - self.starts).repeat(self.lengths) + np.arange(self.tokens)

    @cached_property
    def longest(self) -> int:
        return max(int(self.lengths.max()), self.room)

    @cached_property
    def runs(self) -> tuple[Run, ...]:
        changes = np.flatnonzero(np.diff(self.lengths)) + 1
        bounds = [0, *changes.tolist(), len(self.lengths)]
        return tuple(
            Run(last - first, int(self.lengths[first]))
            for first, last in pairwise(bounds)
            if last > first
        )

    def by_run(self, states: Tensor) -> list[Tensor]:
        # One split, so that its gradient is one concatenation.
        pieces = states.split([run.rows * run.length for run in self.runs])
        return [
            piece.view(run.rows, run.length, *piece.shape[1:])
            for piece, run in zip(pieces, self.runs, strict=True)
        ]

    @cached_property
    def grid(self) -> "Grid":
        """The rows as a padded rectangle: on a GPU that is faster than run by run."""
        columns = np.arange(self.longest)
        real = columns < self.lengths[:, None]
        source = self.starts[:, None] + np.minimum(columns, self.lengths[:, None] - 1)
        cells = np.flatnonzero(real)
        arrays = (source.ravel(), cells, real, self.lengths.astype(np.float32))
        return Grid(*map(self._put, arrays))

    def _put(self, array: npt.NDArray[Any]) -> Tensor:
        tensor = torch.from_numpy(array)
        return tensor.to(self.device, non_blocking=True) if self.put is None else self.put(tensor)


@dataclass(frozen=True, slots=True)
class Grid:
    """Rows padded to the longest one.

    source: int64 [rows * longest], the token in each cell; padding repeats a row's last token.
    cells: int64 [T], the cell of each token. real: bool [rows, longest]. lengths: float32 [rows].
    """

    source: Tensor
    cells: Tensor
    real: Tensor
    lengths: Tensor

    def pad(self, states: Tensor) -> Tensor:
        """[T, d] -> [rows, longest, d]; what is computed from the padding must get no gradient."""
        padded: Tensor = _Pad.apply(states, self.source, self.cells)  # type: ignore[no-untyped-call]
        return padded.view(*self.real.shape, -1)

    def unpad(self, values: Tensor) -> Tensor:
        """[rows, longest] -> [T]"""
        return values.flatten().index_select(0, self.cells)


class _Pad(torch.autograd.Function):
    """[T, d] -> [rows * longest, d]. Autograd would add the gradients of a token and of all the
    padding that repeats it one by one, though those of the padding are zero."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, source: Tensor, cells: Tensor) -> Tensor:
        ctx.save_for_backward(cells)
        return states.index_select(0, source)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (cells,) = ctx.saved_tensors
        return gradient.index_select(0, cells), None, None


def row_means(states: Tensor, layout: Layout) -> Tensor:
    """The mean of every row's tokens, float32: [T, n] -> [rows, n]."""
    if states.is_cuda:
        grid = layout.grid
        sums = (grid.pad(states).float() * grid.real.unsqueeze(2)).sum(dim=1)
        return sums / grid.lengths.unsqueeze(1)
    return torch.cat([rows.float().mean(dim=1) for rows in layout.by_run(states)])


def pool_rows(states: Tensor, layout: Layout) -> Tensor:
    """The mean of every row, in the states' type; a single state stays as it is: [rows, n]."""
    return states if layout.longest == 1 else row_means(states, layout).to(states.dtype)
