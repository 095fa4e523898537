"""One forward pass over slots as one array of int32: what is copied to a device for every batch.

Knows no weights and runs no model. `adapters.packed.packing` is the same for a CPU, where rows stand by
length; here they stand by slot, so that tokens of one adapter are neighbours.

How the array is laid out: `adapters.slots.batch`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from itertools import accumulate, groupby
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from adapters.backbone.tokenizer import Encoding
from adapters.format.spec import AdapterSpec, GeneratorInput, HeadKind, Pooling

# --- merged from adapters.caps

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


# --- merged from adapters.plan

Int64: TypeAlias = npt.NDArray[np.int64]


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


class _Section(NamedTuple):
    """fill: what the tail holds, up to the cap."""

    values: Int32
    fill: int


class _Layout(NamedTuple):
    """Rows one behind the other: int64 [rows] each."""

    lengths: Int64
    ends: Int64

    @classmethod
    def of(cls, lengths: Int64) -> "_Layout":
        return cls(lengths, lengths.cumsum())

    @property
    def total(self) -> int:
        return int(self.ends[-1])

    @property
    def starts(self) -> Int64:
        return self.ends - self.lengths

    def cumulative(self) -> _Section:
        """[rows + 1]; rows of the tail are empty."""
        made = np.zeros(len(self.ends) + 1, dtype=np.int32)
        made[1:] = self.ends
        return _Section(made, self.total)


class Plan:
    """Index arrays of a batch.

    `order` is the rows' order inside: row `order[i]` of the caller stands i-th.

    Args:
        encodings: at least one; each holds at least one token.
        slots: int64 [rows], of their adapters.
        facts: int64 [rows, Fact], of the same.
        causal: the answer is read at the last token instead of at index t.

    Attributes:
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
        self.order = slots.argsort(kind="stable")
        rows = [encodings[index] for index in self.order.tolist()]
        self._slots, self.facts = slots[self.order], facts[self.order]
        self._prompts = self.facts[:, Fact.PROMPT]
        ids = [row.input_ids for row in rows]
        text = _Layout.of(np.fromiter(map(len, ids), dtype=np.int64, count=len(ids)))
        self._layouts = [text]
        offsets = np.arange(text.total, dtype=np.int32) - _int32(text.starts).repeat(text.lengths)
        self._sections = [
            _Section(_joined(ids), 0),
            _Section(_joined([row.token_type_ids for row in rows]), 0),
            _Section(offsets, 0),
            text.cumulative(),
        ]
        stops, tiles = self._stop_sections()
        mean = self.facts[:, Fact.MEAN]
        self.signature = Signature(stops, bool(mean.any()))
        reads = self._read_sections(mean != 0, causal=causal)
        self._sections.append(_Section(_int32(self._slots), -1))
        self.need = Caps(
            rows=len(rows),
            tokens=text.total,
            expanded=tuple([layout.total for layout in self._layouts[1:]]),
            reads=reads,
            longest=int(self._layouts[-1].lengths.max()),
            tiles=tiles,
        )

    @property
    def lengths(self) -> list[Int64]:
        """Of every layout (text alone, behind each stop), int64 [rows]."""
        return [layout.lengths for layout in self._layouts]

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
            at += aligned(size)

    def _stop_sections(self) -> tuple[tuple[Stop, ...], int]:
        layers, text = self.facts[:, Fact.LAYER], self._layouts[0]
        # Rows of one kind get their prompts together; kinds of one layer are neighbours.
        kinds = layers * 2 + self.facts[:, Fact.EMBEDDED]
        distinct = sorted(set(kinds.tolist()))
        stops, most_tiles = [], 0
        for layer, here in groupby(distinct, lambda kind: kind // 2):
            sources = []
            for kind in here:
                embedded = kind % 2 == 1
                sources.append(GeneratorInput.EMBEDDINGS if embedded else GeneratorInput.HIDDEN)
                slots = np.where(kinds == kind, self._slots, -1)
                tiles = _tiles(slots, text if embedded else self._layouts[-1])
                most_tiles = max(most_tiles, len(tiles) // 3)
                self._sections += [_Section(_int32(slots), -1), _Section(tiles, 0)]
            following = _Layout.of(text.lengths + np.where(layers <= layer, self._prompts, 0))
            self._layouts.append(following)
            self._sections.append(following.cumulative())
            stops.append(Stop(layer, tuple(sources)))
        return tuple(stops), most_tiles

    def _read_sections(self, mean: npt.NDArray[np.bool_], *, causal: bool) -> int:
        last = self._layouts[-1]
        first = last.ends - 1 if causal else last.starts + self._prompts
        if not self.signature.mean:
            self._sections.append(_Section(_int32(first), 0))
            return len(first)
        counts = _Layout.of(np.where(mean, self._layouts[0].lengths, 1))
        first = np.where(mean, last.starts + self._prompts, first)
        within = np.arange(counts.total) - counts.starts.repeat(counts.lengths)
        reads = _int32(first.repeat(counts.lengths) + within)
        self._sections += [_Section(reads, 0), counts.cumulative()]
        return counts.total


def _tiles(slots: Int64, layout: _Layout) -> Int32:
    """[3 * tiles]: slot, first token, behind the last one, of neighbours that share a slot."""
    edges = (slots[1:] != slots[:-1]).nonzero()[0] + 1
    firsts = np.concatenate(([0], edges))
    owners, start = slots[firsts], layout.starts[firsts]
    behind = np.concatenate((start[1:], layout.ends[-1:]))
    # What is skipped gets no tile.
    counts = np.where(owners < 0, 0, -(-(behind - start) // TILE))
    group = np.arange(len(counts)).repeat(counts)
    within = np.arange(len(group)) - (counts.cumsum() - counts)[group]
    tiles = np.empty((len(group), 3), dtype=np.int32)
    tiles[:, 0] = owners[group]
    tiles[:, 1] = start[group] + TILE * within
    np.minimum(tiles[:, 1] + TILE, behind[group], out=tiles[:, 2], casting="unsafe")
    return tiles.ravel()


def _joined(arrays: Sequence[Int64]) -> Int32:
    return np.concatenate(arrays, dtype=np.int32, casting="unsafe")


def _int32(array: Int64) -> Int32:
    return array.astype(np.int32)
