"""One forward pass over slots as one array of int32: what is copied to a device for every batch.

Knows no weights and runs no model. `adapters.packing` is the same for a CPU, where rows stand by
length; here they stand by slot, so that tokens of one adapter are neighbours.

How the array is laid out: `adapters.caps`.
"""

from collections.abc import Sequence
from enum import IntEnum
from itertools import groupby
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from adapters.caps import TILE, Caps, Int32, Signature, Stop, aligned, section_sizes
from adapters.spec import AdapterSpec, GeneratorInput, HeadKind, Pooling
from adapters.tokenizer import Encoding

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
