"""A batch over slots as one int32 array: all that the device must know, in one copy.

Integers only. On a CPU `adapters.packed.packing` does the same. There rows are ordered by length;
here they are ordered by slot, so that the tokens of one adapter are neighbours.

`section_sizes` defines the array: name, size and order of its sections. `SlottedBatch.write` fills
them and `adapters.slots.forward` reads them, both by name.

What passes the layers are entries, each for one row or for several with the same text
(`adapters.slots.sharing`). Heads are read row by row.
"""

from collections.abc import Mapping, Sequence
from enum import IntEnum, IntFlag, StrEnum
from functools import lru_cache
from itertools import groupby
from types import MappingProxyType
from typing import NamedTuple, TypeAlias

import msgspec
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
from adapters.slots.sharing import Stage, Texts, stage_of
from adapters.tokenizer import Encoding

Int32: TypeAlias = npt.NDArray[np.int32]

# Tokens in a tile of the grouped product; they all belong to one slot.
TILE = 64
# Sections start at multiples of this many int32: 16 bytes.
_ALIGNMENT = 4
# Kernels skip a row, an entry or a token that has this slot.
_NO_SLOT = -1
# Kernels skip an entry that comes from this one.
_NO_PARENT = -1
# The first changed layer of an adapter that changes none.
_NO_LAYER = 2**30
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
# The usual one is the smallest, and the mean the largest: a batch's largest tells what is in it.
_POOLINGS = {Pooling.ANSWER: 0, Pooling.FIRST: 1, Pooling.BEFORE_LAST: 2, Pooling.MEAN: 3}


class InsertionPoint(msgspec.Struct, frozen=True):
    """A layer before which some rows get their prompts, and the sources of these prompts."""

    layer: int
    sources: tuple[Source, ...]


class Signature(msgspec.Struct, frozen=True):
    """Two batches run the same kernels if their signatures are equal.

    A struct, as the others here: every batch is looked up by it, and hashing a dataclass is slow.

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


class BatchShape(msgspec.Struct, frozen=True):
    """The sizes of a batch, or of a bucket that batches are padded to.

    texts: entries before the first insertion. tokens: theirs. expanded: positions after each
    insertion. reads: positions that are read. longest: positions of the longest row, its prompt
    included. tiles: of a grouped product.
    """

    rows: int
    texts: int
    tokens: int
    expanded: tuple[int, ...]
    reads: int
    longest: int
    tiles: int

    def holds(self, other: "BatchShape") -> bool:
        """Whether a batch of the other shape fits into an array of this one."""
        return (
            other.rows <= self.rows
            and other.texts <= self.texts
            and other.tokens <= self.tokens
            and len(other.expanded) == len(self.expanded)
            and all(small <= big for small, big in zip(other.expanded, self.expanded, strict=True))
            and other.reads <= self.reads
            and other.longest <= self.longest
            and other.tiles <= self.tiles
        )


def section_sizes(shape: BatchShape, signature: Signature) -> dict[str, int]:
    """The sections of the array, in order: name and number of int32.

    Every `cumulative` holds the starts of the entries and the end of the last one. `slots` is -1
    for one that takes no part. A tile is a slot, its first position and the end of its positions.
    `owners` are the slots of a sequence's positions. `parents` says for each entry from which
    earlier one it comes: of the sequence before, or of the texts if its prompt is made from
    embeddings.
    """
    tiles = 3 * shape.tiles
    sizes = {
        "input_ids": shape.tokens,
        "token_type_ids": shape.tokens,
        "offsets": shape.tokens,  # of each token, within its text
        "text.cumulative": shape.texts + 1,
    }
    if signature.shifted:
        sizes["shifts"] = shape.tokens  # of each token's position
    if signature.table:
        sizes["table.owners"] = shape.tokens
    if signature.tuned:
        sizes["text.slots"] = shape.texts
        sizes["text.tiles"] = tiles
    if signature.vectors:
        sizes["text.owners"] = shape.tokens
    for point, positions in zip(signature.insertions, shape.expanded, strict=True):
        for source in point.sources:
            sizes[at_layer(point.layer, "slots", source)] = shape.rows
            if source is not Source.STATIC:
                sizes[at_layer(point.layer, "tiles", source)] = tiles
            if source is Source.EMBEDDINGS:
                sizes[at_layer(point.layer, "parents", source)] = shape.rows
        sizes[at_layer(point.layer, "parents")] = shape.rows
        # Prompts included.
        sizes[at_layer(point.layer, "cumulative")] = shape.rows + 1
        # Where the text begins, behind a prompt that is inserted here.
        sizes[at_layer(point.layer, "starts")] = shape.rows
        if signature.tuned:
            sizes[at_layer(point.layer, "slots")] = shape.rows
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


# Buckets come again and again.
@lru_cache(maxsize=512)
def section_slices(shape: BatchShape, signature: Signature) -> Mapping[str, slice]:
    """Where each section is in the array."""
    slices, start = {}, 0
    for name, size in section_sizes(shape, signature).items():
        slices[name] = slice(start, start + size)
        start += _aligned(size)
    return MappingProxyType(slices)


def array_size(shape: BatchShape, signature: Signature) -> int:
    """Number of int32 in the array."""
    # `slots` is its last section.
    return _aligned(section_slices(shape, signature)["slots"].stop)


def weight_slices(shape: BatchShape) -> list[slice]:
    """Where the token weights of each insertion are in `Outputs.weights`, position by position."""
    slices, start = [], 0
    for positions in shape.expanded:
        slices.append(slice(start, start + positions))
        start += _aligned(positions)
    return slices


def weights_end(shape: BatchShape) -> int:
    """Number of float32 in `Outputs.weights`."""
    places = weight_slices(shape)
    return places[-1].stop if places else 0


def blank_array(shape: BatchShape, signature: Signature) -> Int32:
    """A batch without rows, to capture a graph with."""
    array = np.zeros(array_size(shape, signature), dtype=np.int32)
    for name, place in section_slices(shape, signature).items():
        if name.endswith(("slots", "owners", "parents")):
            array[place] = -1
    return array


def _aligned(size: int) -> int:
    return size + -size % _ALIGNMENT


class Fact(IntEnum):
    """What a batch must know about an adapter, as columns of an int64 array.

    A batch looks up the facts of all its rows at once: reading each row's spec would take longer
    than everything else.

    source: index of `Source`. pooling: see `_POOLINGS`. dense: 1 if the head has two layers. shift:
    what is added to the positions of the text's tokens. lora: `LoraSites`. changes: the first layer
    that vectors or LoRA change.
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
    CHANGES = 13


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
        _NO_LAYER if tuning is None else tuning.layers[0],
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
        sharing: whether rows with the same text share what they can.

    Attributes:
        order: row i of the batch is row `order[i]` of the caller.
        facts: in the batch's order.
        shared: bool [rows], the rows that have states of a layer from another row; None: no row.
        signature, shape: the smallest shape that holds the batch.
    """

    def __init__(
        self,
        encodings: Sequence[Encoding],
        slots: Indices,
        facts: Indices,
        *,
        causal: bool = False,
        sharing: bool = True,
    ) -> None:
        self.order = slots.argsort(kind="stable")
        rows = [encodings[index] for index in self.order.tolist()]
        self._slots, self.facts = slots[self.order], facts[self.order]
        self._prompts, self._layers = self.facts[:, Fact.PROMPT], self.facts[:, Fact.LAYER]
        # Rows with the same layer and source get their prompts together.
        self._kinds = self._layers * len(_SOURCES) + self.facts[:, Fact.SOURCE]
        self._kinds[self._prompts == 0] = -1
        self._points = _points(self._kinds)
        self.signature = _signature(self._points, self.facts)
        shifts = self.facts[:, Fact.SHIFT]
        texts = Texts(rows, shifts, sharing=sharing)
        self._text = texts.layout
        self._stages = self._staged(texts.firsts)
        first = self._stages[0]
        self.shared = None if first.firsts is None else self._shared()
        tokens = texts.tokens_of(first)
        self._sections = {name: _Section(values, 0) for name, values in tokens.items()}
        self._sections["text.cumulative"] = _cumulative(first.layout)
        self._sections["slots"] = _Section(_int32(self._slots), _NO_SLOT)
        if self.signature.shifted:
            moved = _int32(first.of_entries(shifts)).repeat(first.layout.lengths)
            self._sections["shifts"] = _Section(moved, 0)
        if self.signature.table:
            owners = _int32(first.of_entries(self._slots)).repeat(first.layout.lengths)
            self._sections["table.owners"] = _Section(owners, _NO_SLOT)
        self._tiles = 0
        self._insert()
        reads = self._read(causal=causal)
        if self.signature.tuned:
            names = ["text", *(f"layer{point.layer}" for point in self._points)]
            for name, stage in zip(names, self._stages, strict=True):
                slots_here = stage.of_entries(self._slots)
                self._sections[f"{name}.slots"] = _Section(_int32(slots_here), _NO_SLOT)
                self._cover(name, slots_here, stage.layout)
            self._cover("reads", self._slots, reads)
        self.shape = BatchShape(
            rows=len(rows),
            texts=len(first.layout.lengths),
            tokens=first.layout.tokens,
            expanded=tuple([stage.layout.tokens for stage in self._stages[1:]]),
            reads=reads.tokens,
            longest=self._stages[-1].layout.longest,
            tiles=self._tiles,
        )

    @property
    def lengths(self) -> list[Indices]:
        """Lengths of the entries before the first insertion, then after each: int64 [entries]."""
        return [stage.layout.lengths for stage in self._stages]

    @property
    def explained(self) -> npt.NDArray[np.bool_]:
        """[rows]: whether the prompt is made from the text, so that its tokens have weights."""
        static = _SOURCES.index(Source.STATIC)
        made: npt.NDArray[np.bool_] = self.facts[:, Fact.SOURCE] != static
        return np.logical_and(self._prompts > 0, made)

    def weighed(self, shape: BatchShape) -> list[slice]:
        """Where each row's token weights are in `Outputs` of this shape, if it is explained."""
        starts = np.zeros(len(self._slots), dtype=np.int64)
        for point, stage, place in zip(
            self._points, self._stages[1:], weight_slices(shape), strict=True
        ):
            here = self._layers == point.layer
            ends = stage.of_rows(stage.layout.ends)[here]
            starts[here] = place.start + ends - self._text.lengths[here]
        ends = starts + self._text.lengths
        return [slice(*each) for each in zip(starts.tolist(), ends.tolist(), strict=True)]

    def write(self, out: Int32, shape: BatchShape) -> None:
        """Fill the first `array_size(shape, signature)` entries of `out`.

        Args:
            shape: holds `self.shape`.
        """
        for name, place in section_slices(shape, self.signature).items():
            values, tail = self._sections[name]
            end = place.start + len(values)
            out[place.start : end] = values
            out[end : place.stop] = tail

    def _staged(self, texts: Indices | None) -> list[Stage]:
        """The text alone, then the sequence after each insertion.

        Args:
            texts: None: no rows are shared.
        """
        lengths, stages = self._text.lengths, [Stage(self._text)]
        if texts is not None:
            apart = np.where(self._apart(0), self._slots, _NO_SLOT)
            stages = [stage_of(lengths, texts, apart)]
            if len(stages[0].layout.lengths) == len(lengths):
                texts, stages = None, [Stage(self._text)]
        for index, point in enumerate(self._points):
            here = self._layers <= point.layer
            longer = lengths + np.where(here, self._prompts, 0)
            if texts is None:
                stages.append(Stage(Layout(longer)))
            else:
                apart = self._apart(index + 1) | (here & (self._prompts > 0))
                stages.append(stage_of(longer, texts, np.where(apart, self._slots, _NO_SLOT)))
        return stages

    def _apart(self, stage: int) -> npt.NDArray[np.bool_]:
        """[rows]: what their adapters change up to the end of a stage, prompts aside."""
        end = self._points[stage].layer if stage < len(self._points) else _NO_LAYER
        changed: npt.NDArray[np.bool_] = self.facts[:, Fact.CHANGES] < end
        return changed | (self.facts[:, Fact.TABLE] > 0)

    def _shared(self) -> npt.NDArray[np.bool_]:
        # No layer runs before an insertion at layer 0.
        none = bool(self._points) and self._points[0].layer == 0
        shared: npt.NDArray[np.bool_] = np.logical_or.reduce(
            [stage.copied for stage in self._stages[none:]]
        )
        return shared

    def _insert(self) -> None:
        """Add all insertions' sections."""
        every = np.arange(len(self._slots))
        first = self._stages[0]
        # The entry that each row comes from.
        parents = texts = first.of_rows(every[: len(first.layout.lengths)])
        for point, stage in zip(self._points, self._stages[1:], strict=True):
            layer, layout = point.layer, stage.layout
            kinds, slots = stage.of_entries(self._kinds), stage.of_entries(self._slots)
            starts = layout.ends - stage.of_entries(self._text.lengths)
            for source in point.sources:
                here = kinds == layer * len(_SOURCES) + _SOURCES.index(source)
                owners = np.where(here, slots, _NO_SLOT)
                self._add(at_layer(layer, "slots", source), owners, _NO_SLOT)
                if source is not Source.STATIC:
                    tiles = _tiles(owners, starts, layout.ends)
                    self._tiles = max(self._tiles, len(tiles) // 3)
                    self._sections[at_layer(layer, "tiles", source)] = _Section(tiles, 0)
                if source is Source.EMBEDDINGS:
                    copied = np.where(here, stage.of_entries(texts), _NO_PARENT)
                    self._add(at_layer(layer, "parents", source), copied, _NO_PARENT)
            self._add(at_layer(layer, "parents"), stage.of_entries(parents), _NO_PARENT)
            self._sections[at_layer(layer, "cumulative")] = _cumulative(layout)
            self._add(at_layer(layer, "starts"), starts, 0)
            parents = stage.of_rows(every[: len(layout.lengths)])

    def _add(self, name: str, values: Indices, tail: int) -> None:
        self._sections[name] = _Section(_int32(values), tail)

    def _read(self, *, causal: bool) -> Layout:
        """Add the sections of the positions that are read; returns how many of each row are."""
        last, pooling = self._stages[-1], self.facts[:, Fact.POOLING]
        starts, ends = last.of_rows(last.layout.starts), last.of_rows(last.layout.ends)
        first = ends - 1 if causal else starts + self._prompts
        if pooling.any():
            first = np.where(pooling == _POOLINGS[Pooling.FIRST], starts, first)
            # A text of one token has only that to read.
            before_last = np.maximum(ends - 2, starts + self._prompts)
            first = np.where(pooling == _POOLINGS[Pooling.BEFORE_LAST], before_last, first)
        if not self.signature.mean:
            self._sections["reads"] = _Section(_int32(first), 0)
            return Layout(np.ones_like(first))
        mean = pooling == _POOLINGS[Pooling.MEAN]
        counts = Layout(np.where(mean, self._text.lengths, 1))
        first = np.where(mean, starts + self._prompts, first)
        self._sections["reads"] = _Section(_int32(counts.spans(first)), 0)
        self._sections["reads.cumulative"] = _cumulative(counts)
        return counts

    def _cover(self, name: str, slots: Indices, layout: Layout) -> None:
        """Add the tiles of all positions, and the slot of each if a kernel needs it."""
        tiles = _tiles(slots, layout.starts, layout.ends)
        self._tiles = max(self._tiles, len(tiles) // 3)
        self._sections[f"{name}.tiles"] = _Section(tiles, 0)
        if self.signature.vectors:
            owners = _int32(slots).repeat(layout.lengths)
            self._sections[f"{name}.owners"] = _Section(owners, _NO_SLOT)


def _points(kinds: Indices) -> tuple[InsertionPoint, ...]:
    """kinds: [rows], layer and source of each row's prompt; -1: it has none."""
    present = sorted(set(kinds.tolist()) - {-1})
    return tuple(
        InsertionPoint(layer, tuple(_SOURCES[kind % len(_SOURCES)] for kind in kinds_here))
        for layer, kinds_here in groupby(present, lambda kind: kind // len(_SOURCES))
    )


def _signature(insertions: tuple[InsertionPoint, ...], facts: Indices) -> Signature:
    largest = facts.max(axis=0).tolist()
    lora = LoraSites.NONE
    if largest[Fact.LORA]:
        lora = LoraSites(int(np.bitwise_or.reduce(facts[:, Fact.LORA])))
    return Signature(
        insertions,
        mean=largest[Fact.POOLING] == _POOLINGS[Pooling.MEAN],
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


def _tiles(slots: Indices, starts: Indices, ends: Indices) -> Int32:
    """[3 * tiles]: slot, first position, end, for neighbours that share a slot.

    starts, ends: [entries]. Between neighbours may be positions that nobody reads.
    """
    changes = (slots[1:] != slots[:-1]).nonzero()[0] + 1
    firsts = np.concatenate(([0], changes))
    owners, starts = slots[firsts], starts[firsts]
    ends = ends[np.concatenate((changes - 1, [len(slots) - 1]))]
    # Skipped entries get no tile.
    counts = np.where(owners < 0, 0, -(-(ends - starts) // TILE))
    group = np.arange(len(counts)).repeat(counts)
    within = np.arange(len(group)) - (counts.cumsum() - counts)[group]
    tiles = np.empty((len(group), 3), dtype=np.int32)
    tiles[:, 0] = owners[group]
    tiles[:, 1] = starts[group] + TILE * within
    np.minimum(tiles[:, 1] + TILE, ends[group], out=tiles[:, 2], casting="unsafe")
    return tiles.ravel()


def _int32(array: Indices) -> Int32:
    return array.astype(np.int32)
