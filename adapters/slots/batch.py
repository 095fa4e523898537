"""A batch over slots as one int32 array: all that the device must know, in one copy.

Integers only. On a CPU `adapters.packed.packing` does the same. There rows are ordered by length;
here they are ordered by slot, so that the tokens of one adapter are neighbours.

`section_sizes` defines the array: name, size and order of its sections. `SlottedBatch.write` fills
them and `adapters.slots.forward` reads them, both by name.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum, IntFlag, StrEnum
from itertools import groupby
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from adapters.format.spec import (
    AdapterSpec,
    AttentionPrompt,
    HeadKind,
    LoraTuning,
    Pooling,
    Prompt,
    RoutedPrompt,
    Site,
    StaticPrompt,
    VectorTuning,
)
from adapters.packed.layout import Indices, Layout
from adapters.tokenizer import Encoding

Int32: TypeAlias = npt.NDArray[np.int32]

# Tokens in a tile of the grouped product; they all belong to one slot.
TILE = 64
# Sections start at multiples of this many int32: 16 bytes.
_ALIGNMENT = 4
# Kernels skip a row or a token that has this slot.
_NO_SLOT = -1
# Ranks that the kernels of LoRA are compiled for. A product of blocks is at least 16 wide.
RANKS = (16, 32, 64)


class Source(StrEnum):
    """What a prompt is made from. `static`: from nothing; all texts get the same."""

    HIDDEN = "hidden"
    EMBEDDINGS = "embeddings"
    STATIC = "static"


_SOURCES = tuple(Source)


class LoraSites(IntFlag):
    """The linear maps that LoRA changes somewhere in a batch. Queries, keys and values are one."""

    NONE = 0
    PROJECTION = 1
    DENSE = 2
    UP = 4
    DOWN = 8


_LORA_SITES = {
    Site.QUERY: LoraSites.PROJECTION,
    Site.KEY: LoraSites.PROJECTION,
    Site.VALUE: LoraSites.PROJECTION,
    Site.DENSE: LoraSites.DENSE,
    Site.UP: LoraSites.UP,
    Site.DOWN: LoraSites.DOWN,
}
_POOLINGS = {Pooling.ANSWER: 0, Pooling.MEAN: 1, Pooling.FIRST: 2, Pooling.BEFORE_LAST: 3}


@dataclass(frozen=True, slots=True)
class InsertionPoint:
    """A layer before which some rows get their prompts, and the sources of these prompts."""

    layer: int
    sources: tuple[Source, ...]


@dataclass(frozen=True, slots=True)
class Signature:
    """Two batches run the same kernels if their signatures are equal.

    mean: at least one row is read as the mean of its tokens. vectors: at least one adapter has
    vectors. lora: what LoRA changes. rank: one of `RANKS`, 0 without LoRA. routed: at least one
    prompt is picked by a router. shifted: the positions of at least one text do not count from 0.
    table: at least one adapter adds to the word embeddings.
    """

    insertions: tuple[InsertionPoint, ...]
    mean: bool
    vectors: bool = False
    lora: LoraSites = LoraSites.NONE
    rank: int = 0
    routed: bool = False
    shifted: bool = False
    table: bool = False

    @property
    def tuned(self) -> bool:
        """Whether an adapter changes the layers."""
        return self.vectors or bool(self.lora)


@dataclass(frozen=True, slots=True)
class BatchShape:
    """The sizes of a batch, or of a bucket that batches are padded to.

    tokens: of the texts. expanded: positions after each insertion. reads: positions that are read.
    longest: positions of the longest row, its prompt included. tiles: of a grouped product.
    """

    rows: int
    tokens: int
    expanded: tuple[int, ...]
    reads: int
    longest: int
    tiles: int

    def holds(self, other: "BatchShape") -> bool:
        """Whether a batch of the other shape fits into an array of this one."""
        return (
            other.rows <= self.rows
            and other.tokens <= self.tokens
            and len(other.expanded) == len(self.expanded)
            and all(small <= big for small, big in zip(other.expanded, self.expanded, strict=True))
            and other.reads <= self.reads
            and other.longest <= self.longest
            and other.tiles <= self.tiles
        )


def section_sizes(shape: BatchShape, signature: Signature) -> dict[str, int]:
    """The sections of the array, in order: name and number of int32.

    Every `cumulative` holds the starts of the rows and the end of the last one. `slots` is -1 for a
    row that takes no part. A tile is a slot, its first token and the end of its tokens. `owners`
    are the slots of a sequence's positions.
    """
    tiles = 3 * shape.tiles
    sizes = {
        "input_ids": shape.tokens,
        "token_type_ids": shape.tokens,
        "offsets": shape.tokens,  # of each token, within its text
        "text.cumulative": shape.rows + 1,
    }
    if signature.shifted:
        sizes["shifts"] = shape.tokens  # of each token's position
    if signature.table:
        sizes["table.owners"] = shape.tokens
    if signature.tuned:
        sizes["text.tiles"] = tiles
    if signature.vectors:
        sizes["text.owners"] = shape.tokens
    for point, positions in zip(signature.insertions, shape.expanded, strict=True):
        for source in point.sources:
            sizes[at_layer(point.layer, "slots", source)] = shape.rows
            if source is not Source.STATIC:
                sizes[at_layer(point.layer, "tiles", source)] = tiles
        # Prompts included.
        sizes[at_layer(point.layer, "cumulative")] = shape.rows + 1
        if signature.tuned:
            sizes[at_layer(point.layer, "tiles")] = tiles
        if signature.vectors:
            sizes[at_layer(point.layer, "owners")] = positions
    sizes["reads"] = shape.reads
    if signature.mean:
        sizes["reads.cumulative"] = shape.rows + 1
    if signature.tuned:
        sizes["reads.tiles"] = tiles
    if signature.vectors:
        sizes["reads.owners"] = shape.reads
    sizes["slots"] = shape.rows
    return sizes


def at_layer(layer: int, name: str, source: Source | None = None) -> str:
    """Name of a section that belongs to an insertion: `layer3.hidden.slots`."""
    return f"layer{layer}.{name}" if source is None else f"layer{layer}.{source.value}.{name}"


def section_slices(shape: BatchShape, signature: Signature) -> dict[str, slice]:
    """Where each section is in the array."""
    slices, start = {}, 0
    for name, size in section_sizes(shape, signature).items():
        slices[name] = slice(start, start + size)
        start += _aligned(size)
    return slices


def array_size(shape: BatchShape, signature: Signature) -> int:
    """Number of int32 in the array."""
    return sum(map(_aligned, section_sizes(shape, signature).values()))


def blank_array(shape: BatchShape, signature: Signature) -> Int32:
    """A batch without rows, to capture a graph with."""
    array = np.zeros(array_size(shape, signature), dtype=np.int32)
    for name, place in section_slices(shape, signature).items():
        if name.endswith(("slots", "owners")):
            array[place] = _NO_SLOT
    return array


def _aligned(size: int) -> int:
    return size + -size % _ALIGNMENT


class Fact(IntEnum):
    """What a batch must know about an adapter, as columns of an int64 array.

    A batch looks up the facts of all its rows at once: reading each row's spec would take longer
    than everything else.

    source: index of `Source`. pooling: see `_POOLINGS`. dense: 1 if the head has two layers. shift:
    what is added to the positions of the text's tokens. lora: `LoraSites`.
    """

    PROMPT = 0
    LAYER = 1
    SOURCE = 2
    POOLING = 3
    BOTTLENECK = 4
    LABELS = 5
    DENSE = 6
    SHIFT = 7
    ROUTED = 8
    TABLE = 9
    VECTORS = 10
    LORA = 11
    RANK = 12


def facts_of(spec: AdapterSpec) -> tuple[int, ...]:
    """In the order of `Fact`."""
    prompt, tuning = spec.prompt, spec.tuning
    static = prompt if isinstance(prompt, StaticPrompt) else None
    lora = LoraSites.NONE
    if isinstance(tuning, LoraTuning):
        for site in tuning.sites:
            lora |= _LORA_SITES[site]
    return (
        spec.prompt_length,
        0 if prompt is None else prompt.layer,
        _SOURCES.index(_source_of(prompt)),
        _POOLINGS[spec.head.pooling],
        _bottleneck_of(prompt),
        len(spec.labels),
        spec.head.kind is HeadKind.MLP,
        static.length if static is not None and static.shifts_text else 0,
        isinstance(prompt, RoutedPrompt),
        static is not None and static.table is not None,
        isinstance(tuning, VectorTuning),
        lora,
        tuning.rank if isinstance(tuning, LoraTuning) else 0,
    )


def _source_of(prompt: Prompt | None) -> Source:
    match prompt:
        case AttentionPrompt():
            return Source(prompt.source.value)
        case RoutedPrompt():
            return Source.EMBEDDINGS
        case StaticPrompt():
            return Source.STATIC
        case _:
            return Source.HIDDEN


def _bottleneck_of(prompt: Prompt | None) -> int:
    match prompt:
        case None | StaticPrompt():
            return 0
        case RoutedPrompt():
            return prompt.prompts
        case _:
            return prompt.bottleneck


class _Section(NamedTuple):
    """tail: what fills the rest of a section that is larger than its values."""

    values: Int32
    tail: int


class SlottedBatch:
    """Index arrays of a batch over slots.

    Args:
        encodings: at least one; each holds at least one token.
        slots: int64 [rows], the slot of each row's adapter.
        facts: int64 [rows, Fact], the facts of each row's adapter.
        causal: the answer is read at the last token instead of at index t.

    Attributes:
        order: row i of the batch is row `order[i]` of the caller.
        facts: in the batch's order.
        signature, shape: the smallest shape that holds the batch.
    """

    def __init__(
        self, encodings: Sequence[Encoding], slots: Indices, facts: Indices, *, causal: bool = False
    ) -> None:
        self.order = slots.argsort(kind="stable")
        rows = [encodings[index] for index in self.order.tolist()]
        self._slots, self.facts = slots[self.order], facts[self.order]
        self._prompts = self.facts[:, Fact.PROMPT]
        ids = [row.input_ids for row in rows]
        text = Layout(np.fromiter(map(len, ids), dtype=np.int64, count=len(ids)))
        # The layout of the text alone, then the layout after each insertion.
        self._layouts = [text]
        offsets = np.arange(text.tokens, dtype=np.int32) - _int32(text.starts).repeat(text.lengths)
        self._sections = {
            "input_ids": _Section(_joined(ids), 0),
            "token_type_ids": _Section(_joined([row.token_type_ids for row in rows]), 0),
            "offsets": _Section(offsets, 0),
            "text.cumulative": _cumulative(text),
            "slots": _Section(_int32(self._slots), _NO_SLOT),
        }
        insertions, self._tiles = self._insert()
        self.signature = _signature(insertions, self.facts)
        reads = self._read(causal=causal)
        if self.signature.tuned:
            self._cover("text", text)
            for point, layout in zip(insertions, self._layouts[1:], strict=True):
                self._cover(f"layer{point.layer}", layout)
            self._cover("reads", reads)
        if self.signature.table:
            self._sections["table.owners"] = self._owners(text)
        if self.signature.shifted:
            shifts = _int32(self.facts[:, Fact.SHIFT]).repeat(text.lengths)
            self._sections["shifts"] = _Section(shifts, 0)
        self.shape = BatchShape(
            rows=len(rows),
            tokens=text.tokens,
            expanded=tuple([layout.tokens for layout in self._layouts[1:]]),
            reads=reads.tokens,
            longest=self._layouts[-1].longest,
            tiles=self._tiles,
        )

    @property
    def lengths(self) -> list[Indices]:
        """Row lengths of the text alone, then after each insertion: int64 [rows] each."""
        return [layout.lengths for layout in self._layouts]

    @property
    def explained(self) -> npt.NDArray[np.bool_]:
        """[rows]: whether the prompt is made from the text, so that its tokens have weights."""
        static = _SOURCES.index(Source.STATIC)
        made: npt.NDArray[np.bool_] = self.facts[:, Fact.SOURCE] != static
        return np.logical_and(self._prompts > 0, made)

    def write(self, out: Int32, shape: BatchShape) -> None:
        """Fill `out`, which has `array_size(shape, signature)` entries.

        Args:
            shape: holds `self.shape`.
        """
        for name, place in section_slices(shape, self.signature).items():
            values, tail = self._sections[name]
            end = place.start + len(values)
            out[place.start : end] = values
            out[end : place.stop] = tail

    def _insert(self) -> tuple[tuple[InsertionPoint, ...], int]:
        """Add all insertions' sections; returns the insertions, and the most tiles of any one."""
        layers, text = self.facts[:, Fact.LAYER], self._layouts[0]
        # Rows with the same layer and source get their prompts together.
        kinds = layers * len(_SOURCES) + self.facts[:, Fact.SOURCE]
        kinds[self._prompts == 0] = -1
        present = sorted(set(kinds.tolist()) - {-1})
        insertions, most_tiles = [], 0
        for layer, kinds_here in groupby(present, lambda kind: kind // len(_SOURCES)):
            sources = []
            for kind in kinds_here:
                source = _SOURCES[kind % len(_SOURCES)]
                slots = np.where(kinds == kind, self._slots, _NO_SLOT)
                self._sections[at_layer(layer, "slots", source)] = _Section(_int32(slots), _NO_SLOT)
                if source is not Source.STATIC:
                    layout = text if source is Source.EMBEDDINGS else self._layouts[-1]
                    tiles = _tiles(slots, layout)
                    most_tiles = max(most_tiles, len(tiles) // 3)
                    self._sections[at_layer(layer, "tiles", source)] = _Section(tiles, 0)
                sources.append(source)
            expanded = Layout(text.lengths + np.where(layers <= layer, self._prompts, 0))
            self._layouts.append(expanded)
            self._sections[at_layer(layer, "cumulative")] = _cumulative(expanded)
            insertions.append(InsertionPoint(layer, tuple(sources)))
        return tuple(insertions), most_tiles

    def _read(self, *, causal: bool) -> Layout:
        """Add the sections of the positions that are read; returns how many of each row are."""
        last, pooling = self._layouts[-1], self.facts[:, Fact.POOLING]
        first = last.ends - 1 if causal else last.starts + self._prompts
        first = np.where(pooling == _POOLINGS[Pooling.FIRST], last.starts, first)
        # A text of one token has only that to read.
        before_last = np.maximum(last.ends - 2, last.starts + self._prompts)
        first = np.where(pooling == _POOLINGS[Pooling.BEFORE_LAST], before_last, first)
        if not self.signature.mean:
            self._sections["reads"] = _Section(_int32(first), 0)
            return Layout(np.ones_like(first))
        mean = pooling == _POOLINGS[Pooling.MEAN]
        counts = Layout(np.where(mean, self._layouts[0].lengths, 1))
        first = np.where(mean, last.starts + self._prompts, first)
        within = np.arange(counts.tokens) - counts.starts.repeat(counts.lengths)
        reads = _int32(first.repeat(counts.lengths) + within)
        self._sections["reads"] = _Section(reads, 0)
        self._sections["reads.cumulative"] = _cumulative(counts)
        return counts

    def _cover(self, name: str, layout: Layout) -> None:
        """Add the tiles of all positions, and the slot of each if a kernel needs it."""
        tiles = _tiles(self._slots, layout)
        self._tiles = max(self._tiles, len(tiles) // 3)
        self._sections[f"{name}.tiles"] = _Section(tiles, 0)
        if self.signature.vectors:
            self._sections[f"{name}.owners"] = self._owners(layout)

    def _owners(self, layout: Layout) -> _Section:
        return _Section(_int32(self._slots).repeat(layout.lengths), _NO_SLOT)


def _signature(insertions: tuple[InsertionPoint, ...], facts: Indices) -> Signature:
    largest = facts.max(axis=0).tolist()
    lora = LoraSites(int(np.bitwise_or.reduce(facts[:, Fact.LORA])))
    return Signature(
        insertions,
        mean=bool((facts[:, Fact.POOLING] == _POOLINGS[Pooling.MEAN]).any()),
        vectors=bool(largest[Fact.VECTORS]),
        lora=lora,
        rank=next(rank for rank in RANKS if rank >= largest[Fact.RANK]) if lora else 0,
        routed=bool(largest[Fact.ROUTED]),
        shifted=bool(largest[Fact.SHIFT]),
        table=bool(largest[Fact.TABLE]),
    )


def _cumulative(layout: Layout) -> _Section:
    """[rows + 1]; the rows of the padding are empty."""
    return _Section(layout.edges, layout.tokens)


def _tiles(slots: Indices, layout: Layout) -> Int32:
    """[3 * tiles]: slot, first token, end, for neighbours that share a slot."""
    changes = (slots[1:] != slots[:-1]).nonzero()[0] + 1
    firsts = np.concatenate(([0], changes))
    owners, starts = slots[firsts], layout.starts[firsts]
    ends = np.concatenate((starts[1:], layout.ends[-1:]))
    # Skipped rows get no tile.
    counts = np.where(owners < 0, 0, -(-(ends - starts) // TILE))
    group = np.arange(len(counts)).repeat(counts)
    within = np.arange(len(group)) - (counts.cumsum() - counts)[group]
    tiles = np.empty((len(group), 3), dtype=np.int32)
    tiles[:, 0] = owners[group]
    tiles[:, 1] = starts[group] + TILE * within
    np.minimum(tiles[:, 1] + TILE, ends[group], out=tiles[:, 2], casting="unsafe")
    return tiles.ravel()


def _joined(arrays: Sequence[Indices]) -> Int32:
    return np.concatenate(arrays, dtype=np.int32, casting="unsafe")


def _int32(array: Indices) -> Int32:
    return array.astype(np.int32)
