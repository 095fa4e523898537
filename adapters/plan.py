"""One forward pass over slots as one array of int32: what is copied to a device for every batch.

Knows no weights and runs no model. `adapters.packing` is the same for a CPU, where rows stand by
length; here they stand by slot, so that tokens of one adapter are neighbours.

The array consists of sections whose sizes follow from `Caps` alone: a batch written with caps
larger than it needs leaves tails that no row owns, and so every batch of the same caps and the same
`Signature` has the same shape.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from itertools import accumulate
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from adapters.spec import AdapterSpec, GeneratorInput, HeadKind, Pooling
from adapters.tokenizer import Encoding

Int32: TypeAlias = npt.NDArray[np.int32]
Int64: TypeAlias = npt.NDArray[np.int64]

# Tokens of one tile of the grouped product; a tile never crosses from one slot to another.
TILE = 64
# Sections start at multiples of so many int32: 16 bytes.
_ALIGNED = 4


class Fact(IntEnum):
    """What a batch must know of an adapter, as the columns of an int64 array: a batch's facts are
    then one look-up, where asking every row's spec takes longer than all the rest.

    embedded: 1 where the prompt is made from the embeddings. mean: 1 where tokens are read as their
    mean. dense: 1 where the head has two layers.
    """

    PROMPT = 0
    LAYER = 1
    EMBEDDED = 2
    MEAN = 3
    BOTTLENECK = 4
    LABELS = 5
    DENSE = 6


def facts_of(spec: AdapterSpec) -> tuple[int, ...]:
    """In the order of `Fact`."""
    return (
        spec.prompt_length,
        spec.insertion_layer,
        spec.generator_input is GeneratorInput.EMBEDDINGS,
        spec.pooling is Pooling.MEAN,
        spec.bottleneck,
        len(spec.labels),
        spec.head is HeadKind.MLP,
    )


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


@dataclass(frozen=True, slots=True)
class _Section:
    values: Int32
    # What the tail holds, up to the cap.
    fill: int


class Plan:
    """Index arrays of a batch.

    `order` is the rows' order inside: row `order[i]` of the caller stands i-th.

    Args:
        encodings: at least one; each holds at least one token.
        slots: int64 [rows], of their adapters.
        facts: int64 [rows, Fact], of the same.
        causal: the answer is read at the last token instead of at index t.

    Attributes:
        lengths: of every layout (text alone, behind each stop), int64 [rows].
        facts: in the plan's order.
        need: the smallest caps.
    """

    def __init__(
        self,
        encodings: Sequence[Encoding],
        slots: Int64,
        facts: Int64,
        *,
        causal: bool = False,
    ) -> None:
        self.order = np.argsort(slots, kind="stable")
        rows = [encodings[index] for index in self.order.tolist()]
        self._slots, self.facts = slots[self.order], facts[self.order]
        ids = [row.input_ids for row in rows]
        lengths = np.fromiter(map(len, ids), dtype=np.int64, count=len(ids))
        self._prompts = self.facts[:, Fact.PROMPT]
        self._mean = self.facts[:, Fact.MEAN] != 0
        self.lengths = [lengths]
        tokens = int(lengths.sum())
        starts = np.cumsum(lengths) - lengths
        self._sections = [
            _Section(_joined(ids), 0),
            _Section(_joined([row.token_type_ids for row in rows]), 0),
            _Section(np.arange(tokens, dtype=np.int32) - np.repeat(_int32(starts), lengths), 0),
            _Section(_cumulative(lengths), tokens),
        ]
        stops, tiles = self._stop_sections()
        reads = self._read_sections(causal=causal)
        self._sections.append(_Section(_int32(self._slots), -1))
        self.signature = Signature(stops, bool(self._mean.any()))
        self.need = Caps(
            rows=len(rows),
            tokens=tokens,
            expanded=tuple(int(behind.sum()) for behind in self.lengths[1:]),
            reads=reads,
            longest=int(self.lengths[-1].max()),
            tiles=tiles,
        )

    def write(self, out: Int32, caps: Caps) -> None:
        """Fill `out`, `size_of(caps, signature)` long.

        Args:
            caps: hold `need`.
        """
        at = 0
        sizes = section_sizes(caps, self.signature)
        for section, size in zip(self._sections, sizes, strict=True):
            used = len(section.values)
            out[at : at + used] = section.values
            out[at + used : at + size] = section.fill
            at += _aligned(size)

    def _stop_sections(self) -> tuple[tuple[Stop, ...], int]:
        layers = self.facts[:, Fact.LAYER]
        embedded = self.facts[:, Fact.EMBEDDED] != 0
        stops, most_tiles = [], 0
        for layer in sorted(set(layers.tolist())):
            here = layers == layer
            current = self.lengths[-1]
            following = self.lengths[0] + np.where(layers <= layer, self._prompts, 0)
            sources = []
            for source in GeneratorInput:
                chosen = here & (embedded == (source is GeneratorInput.EMBEDDINGS))
                if not chosen.any():
                    continue
                sources.append(source)
                slots = np.where(chosen, self._slots, -1)
                stands = self.lengths[0] if source is GeneratorInput.EMBEDDINGS else current
                tiles = _tiles(slots, stands)
                most_tiles = max(most_tiles, len(tiles) // 3)
                self._sections += [_Section(_int32(slots), -1), _Section(tiles, 0)]
            self._sections.append(_Section(_cumulative(following), int(following.sum())))
            self.lengths.append(following)
            stops.append(Stop(layer, tuple(sources)))
        return tuple(stops), most_tiles

    def _read_sections(self, *, causal: bool) -> int:
        last = self.lengths[-1]
        starts = np.cumsum(last) - last
        first = starts + (last - 1 if causal else self._prompts)
        if not self._mean.any():
            self._sections.append(_Section(_int32(first), 0))
            return len(first)
        counts = np.where(self._mean, self.lengths[0], 1)
        first = np.where(self._mean, starts + self._prompts, first)
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        total = int(counts.sum())
        self._sections += [
            _Section(_int32(np.repeat(first, counts) + within), 0),
            _Section(_cumulative(counts), total),
        ]
        return total


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
    starts = accumulate((_aligned(size) for size in sizes), initial=0)
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
    return sum(map(_aligned, section_sizes(caps, signature)))


def _skip_all(array: Int32, slots: tuple[int, int]) -> None:
    start, size = slots
    array[start : start + size] = -1


def _tiles(slots: Int64, lengths: Int64) -> Int32:
    """[3 * tiles]: slot, first token, behind the last one, of neighbours that share a slot."""
    edges = np.flatnonzero(slots[1:] != slots[:-1]) + 1
    ends = lengths.cumsum()
    bounds = np.concatenate(([0], ends[edges - 1], ends[-1:]))
    owners = slots[np.concatenate(([0], edges))]
    # What is skipped gets no tile.
    sizes = np.where(owners < 0, 0, bounds[1:] - bounds[:-1])
    counts = -(-sizes // TILE)
    group = np.arange(len(counts)).repeat(counts)
    within = np.arange(len(group)) - (counts.cumsum() - counts)[group]
    tiles = np.empty((len(group), 3), dtype=np.int32)
    tiles[:, 0] = owners[group]
    tiles[:, 1] = bounds[group] + TILE * within
    tiles[:, 2] = np.minimum(tiles[:, 1] + TILE, bounds[group + 1])
    return tiles.ravel()


def _cumulative(lengths: Int64) -> Int32:
    made = np.zeros(len(lengths) + 1, dtype=np.int32)
    np.cumsum(lengths, out=made[1:])
    return made


def _joined(arrays: Sequence[Int64]) -> Int32:
    return np.concatenate(arrays, dtype=np.int32, casting="unsafe")


def _int32(array: Int64) -> Int32:
    return array.astype(np.int32)


def _aligned(size: int) -> int:
    return size + -size % _ALIGNED
