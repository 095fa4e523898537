"""How much a batch over slots holds, and so where everything is in its array. Knows no rows.

The array consists of sections whose sizes follow from `Caps` alone: a batch written with caps
larger than it needs leaves tails that no row owns, and so every batch of the same caps and the same
`Signature` has the same shape.
"""

from dataclasses import dataclass
from itertools import accumulate
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from adapters.spec import GeneratorInput

Int32: TypeAlias = npt.NDArray[np.int32]

# Tokens of one tile of the grouped product; a tile never crosses from one slot to another.
TILE = 64
# Sections start at multiples of so many int32: 16 bytes.
_ALIGNED = 4


@dataclass(frozen=True, slots=True)
class Stop:
    """A layer in front of which some rows get their prompt, and what those are made from."""

    layer: int
    sources: tuple[GeneratorInput, ...]


@dataclass(frozen=True, slots=True)
class Signature:
    """What must be the same for two batches to run the same kernels. mean: some row is read as the
    mean of its tokens."""

    stops: tuple[Stop, ...]
    mean: bool


@dataclass(frozen=True, slots=True)
class Caps:
    """How much of everything there may be. tokens: of text. expanded: positions behind each stop.
    longest: positions of one row in the end. tiles: of the grouped product."""

    rows: int
    tokens: int
    expanded: tuple[int, ...]
    reads: int
    longest: int
    tiles: int

    def hold(self, need: "Caps") -> bool:
        """Whether a batch of this need can be written with these caps."""
        return (
            need.rows <= self.rows
            and need.tokens <= self.tokens
            and len(need.expanded) == len(self.expanded)
            and all(some <= most for some, most in zip(need.expanded, self.expanded, strict=True))
            and need.reads <= self.reads
            and need.longest <= self.longest
            and need.tiles <= self.tiles
        )


def section_sizes(caps: Caps, signature: Signature) -> list[int]:
    """How long the sections of such a batch are, in order.

    input_ids, token_type_ids, offsets [tokens]; cumulative lengths [rows + 1]; for every stop and
    each of its sources: slots [rows], tiles [3 * tiles]; then the cumulative lengths behind it
    [rows + 1]; positions that are read [reads]; where some row is read as a mean: their cumulative
    counts [rows + 1]; slots [rows].
    """
    sizes = [caps.tokens] * 3 + [caps.rows + 1]
    for stop in signature.stops:
        sizes += [caps.rows, 3 * caps.tiles] * len(stop.sources) + [caps.rows + 1]
    sizes.append(caps.reads)
    if signature.mean:
        sizes.append(caps.rows + 1)
    return [*sizes, caps.rows]


def section_offsets(caps: Caps, signature: Signature) -> list[tuple[int, int]]:
    """Where every section starts, and its size."""
    sizes = section_sizes(caps, signature)
    starts = accumulate((aligned(size) for size in sizes), initial=0)
    return list(zip(starts, sizes, strict=False))


def blank(caps: Caps, signature: Signature) -> Int32:
    """A batch without rows: what a graph is captured with."""
    array = np.zeros(size_of(caps, signature), dtype=np.int32)
    offsets = iter(section_offsets(caps, signature)[4:])
    for stop in signature.stops:
        for _ in stop.sources:
            _skip_all(array, next(offsets))
            next(offsets)  # tiles
        next(offsets)  # cumulative lengths
    _skip_all(array, section_offsets(caps, signature)[-1])
    return array


def size_of(caps: Caps, signature: Signature) -> int:
    """int32 that such a batch takes."""
    return sum(map(aligned, section_sizes(caps, signature)))


def _skip_all(array: Int32, slots: tuple[int, int]) -> None:
    start, size = slots
    array[start : start + size] = -1


def aligned(size: int) -> int:
    """What a section of this size takes."""
    return size + -size % _ALIGNED
