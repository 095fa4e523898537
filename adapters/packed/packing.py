"""The position of every token and every prompt vector in a packed batch.

Integers only. The rows of a batch form one flat sequence without padding. Below its insertion layer
m a row consists of its tokens; from there on, t prompt vectors precede them. So the sequence grows
at every layer where rows insert; between two such layers it has one `Layout`. Rows are ordered by
length, so that rows of equal length are neighbours: attention takes each such run as one view.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from adapters.format.spec import (
    AdapterSpec,
    AttentionPrompt,
    FirstTokenPrompt,
    Pooling,
    RoutedPrompt,
    StaticPrompt,
)
from adapters.packed.layout import Indices, Layout, Put
from adapters.tokenizer import Encoding


class PromptSource(StrEnum):
    """What a prompt is made from.

    All of a text's embeddings, all its states at layer m, the state of its first token there, or
    nothing of it.
    """

    EMBEDDINGS = "embeddings"
    HIDDEN = "hidden"
    FIRST_TOKEN = "first-token"
    NOTHING = "nothing"


@dataclass(frozen=True, slots=True)
class RowShape:
    """What decides the positions of a row's tokens and prompt.

    prompt_length: t; 0 if there is no prompt: the text passes every layer alone. insertion_layer:
    m. pooling: what the head reads. shifts_text: the text's positions count from t on.
    """

    prompt_length: int = 0
    insertion_layer: int = 0
    source: PromptSource = PromptSource.HIDDEN
    pooling: Pooling = Pooling.ANSWER
    shifts_text: bool = False

    @classmethod
    def of(cls, spec: AdapterSpec) -> Self:
        """The shape of the rows of an adapter."""
        prompt, pooling = spec.prompt, spec.head.pooling
        match prompt:
            case None:
                return cls(pooling=pooling)
            case AttentionPrompt():
                source = PromptSource(prompt.source.value)
            case FirstTokenPrompt():
                source = PromptSource.FIRST_TOKEN
            case RoutedPrompt():
                # At layer 0 both are the same states, and these need not be kept.
                source = PromptSource.EMBEDDINGS if prompt.layer else PromptSource.HIDDEN
            case StaticPrompt():
                source = PromptSource.NOTHING
        shifts = isinstance(prompt, StaticPrompt) and prompt.shifts_text
        return cls(prompt.length, prompt.layer, source, pooling, shifts)


@dataclass(frozen=True, slots=True)
class Row:
    """One text to classify: its tokens, its shape, and its adapter's index."""

    encoding: Encoding
    shape: RowShape
    adapter: int


@dataclass(frozen=True, slots=True)
class Group:
    """Among rows that insert together: how many rows and tokens belong to one adapter."""

    adapter: int
    rows: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Grouping:
    """Indices that reorder rows into groups (adapter by adapter) and back, all int64."""

    rows: Tensor  # [rows], into the rows' order
    tokens: Tensor  # [tokens], into the rows' order
    tokens_back: Tensor  # [tokens], into the groups' order
    prompts_back: Tensor  # [prompt positions], into the groups' order


@dataclass(frozen=True, slots=True)
class Generation:
    """Prompts that are made from one source."""

    source: PromptSource
    rows: Indices  # among the batch's rows
    tokens: Tensor | None  # int64, the rows' tokens in the source; None: all of them
    layout: Layout  # of those tokens; one a row if the prompts are made from the first or nothing
    groups: tuple[Group, ...]
    grouping: Grouping | None  # None: there is only one group


@dataclass(frozen=True, slots=True)
class Insertion:
    """Some rows get their prompts, before layer `layer`."""

    layer: int
    generations: tuple[Generation, ...]
    expand: Tensor  # int64 [tokens of `layout`], into concat(sequence, prompts of all generations)
    layout: Layout  # from this layer on


class PackedBatch:
    """Index arrays of one forward pass over any mixture of adapters, layers and prompt lengths.

    Attributes:
        order: row i of the batch is row `order[i]` of the caller.
        reads: int64, the positions of the last layer that are read, row by row (`read_layout`).

    Args:
        rows: at least one; every encoding holds at least one token.
        causal: the answer is read at the last token instead of at index t.
        device: of the index tensors.
        put: how they get there; None: each in a copy of its own.
        room: what is launched for the longest text is launched for at least this many tokens.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        *,
        causal: bool = False,
        device: torch.device | None = None,
        put: Put | None = None,
        room: int = 0,
    ) -> None:
        assert rows, "a batch has at least one row"
        self.device = device or torch.device("cpu")
        self._putting, self._room = put, room
        lengths = np.array([len(row.encoding) for row in rows], dtype=np.int64)
        prompts = np.array([row.shape.prompt_length for row in rows], dtype=np.int64)
        layers = np.array([row.shape.insertion_layer for row in rows], dtype=np.int64)
        self.order: Indices = np.lexsort((layers, lengths, prompts))
        self.rows: tuple[Row, ...] = tuple(rows[i] for i in self.order)
        self._lengths, self._prompts, self._layers = (
            lengths[self.order],
            prompts[self.order],
            layers[self.order],
        )
        self.layout = self._layout(self._lengths, room)
        self.insertions = self._insertions()
        self._read(causal=causal)

    # The inputs of the embeddings are built on demand: training mostly has the trunk's states, and
    # every array is a copy to the device.
    @cached_property
    def input_ids(self) -> Tensor:
        """int64 [T]"""
        return self._put(np.concatenate([row.encoding.input_ids for row in self.rows]))

    @cached_property
    def token_type_ids(self) -> Tensor:
        """int64 [T]"""
        return self._put(np.concatenate([row.encoding.token_type_ids for row in self.rows]))

    @cached_property
    def offsets(self) -> Tensor:
        """Each token's distance from the start of its row: int64 [T]."""
        return self._put(
            np.arange(self.layout.tokens) - np.repeat(self.layout.starts, self._lengths)
        )

    @cached_property
    def shifts(self) -> Tensor | None:
        """int64 [T]: each token's position minus its offset. None: no row shifts its text."""
        if not any(row.shape.shifts_text for row in self.rows):
            return None
        shifts = np.array(
            [row.shape.prompt_length if row.shape.shifts_text else 0 for row in self.rows]
        )
        return self._put(np.repeat(shifts, self._lengths))

    @property
    def final_layout(self) -> Layout:
        """The layout of the last layer."""
        return self.insertions[-1].layout if self.insertions else self.layout

    @property
    def prompt_positions(self) -> int:
        """Prompt positions after the last insertion."""
        return int(self._prompts.sum())

    def _read(self, *, causal: bool) -> None:
        last = self.final_layout
        mean = np.array([row.shape.pooling is Pooling.MEAN for row in self.rows])
        counts = np.where(mean, self._lengths, 1)
        at = last.lengths - 1 if causal else self._prompts
        poolings = [row.shape.pooling for row in self.rows]
        at = np.where([pooling is Pooling.FIRST for pooling in poolings], 0, at)
        # A text of one token has only that to read.
        before_last = np.maximum(last.lengths - 2, self._prompts)
        at = np.where([pooling is Pooling.BEFORE_LAST for pooling in poolings], before_last, at)
        first = last.starts + np.where(mean, self._prompts, at)
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        self.reads = self._put(np.repeat(first, counts) + within)
        self.read_layout = self._layout(counts, self._room if mean.any() else 0)

    def _insertions(self) -> tuple[Insertion, ...]:
        current, inserted = self.layout, np.zeros(len(self.rows), dtype=bool)
        insertions = []
        prompted = self._prompts > 0
        for layer in np.unique(self._layers[prompted]):
            here = prompted & (self._layers == layer)
            inserted = inserted | here
            prompts = np.where(inserted, self._prompts, 0)
            room = self._room + int(prompts.max()) if self._room else 0
            expanded = self._layout(self._lengths + prompts, room)
            generations, prompt_starts = [], np.zeros(len(self.rows), dtype=np.int64)
            offset = 0
            for source in PromptSource:
                chosen = here & np.array([row.shape.source is source for row in self.rows])
                if not chosen.any():
                    continue
                layout = self.layout if source is PromptSource.EMBEDDINGS else current
                generations.append(self._generation(source, np.flatnonzero(chosen), layout))
                sizes = self._prompts[chosen]
                prompt_starts[chosen] = offset + np.cumsum(sizes) - sizes
                offset += int(sizes.sum())
            expand = self._expansion(current, expanded, here, prompt_starts)
            insertions.append(
                Insertion(int(layer), tuple(generations), self._put(expand), expanded)
            )
            current = expanded
        return tuple(insertions)

    def _expansion(
        self, current: Layout, expanded: Layout, here: npt.NDArray[np.bool_], prompt_starts: Indices
    ) -> Indices:
        """For every position of `expanded`: its index in concat(current, new prompts)."""
        row = np.repeat(np.arange(len(self.rows)), expanded.lengths)
        within = np.arange(expanded.tokens) - expanded.starts[row]
        prompts = np.where(here, self._prompts, 0)[row]
        return np.where(
            within < prompts,
            current.tokens + prompt_starts[row] + within,
            current.starts[row] + within - prompts,
        )

    def _generation(self, source: PromptSource, rows: Indices, source_layout: Layout) -> Generation:
        lengths = self._lengths[rows]
        if source in (PromptSource.FIRST_TOKEN, PromptSource.NOTHING):
            lengths = np.ones_like(lengths)
        # The same rows in the same order need no arrays of their own.
        layout = source_layout
        if not np.array_equal(lengths, source_layout.lengths):
            layout = self._layout(lengths, self._room if lengths.max() > 1 else 0)
        tokens = None
        if source is not PromptSource.NOTHING and layout.tokens != source_layout.tokens:
            tokens = self._put(_spans(source_layout.starts[rows], layout.lengths))
        owners = np.array([self.rows[i].adapter for i in rows])
        adapters, counts = np.unique(owners, return_counts=True)
        sums = np.bincount(np.searchsorted(adapters, owners), lengths).astype(np.int64)
        groups = tuple(
            Group(int(adapter), int(count), int(length))
            for adapter, count, length in zip(adapters, counts, sums, strict=True)
        )
        grouping = self._grouping(rows, owners, lengths)
        return Generation(source, rows, tokens, layout, groups, grouping)

    def _grouping(self, rows: Indices, owners: Indices, lengths: Indices) -> Grouping | None:
        """lengths: of the rows' tokens in the source."""
        order = np.argsort(owners, kind="stable")
        if owners[order[0]] == owners[order[-1]]:
            return None
        tokens = _reordered(lengths, order)
        prompts = _reordered(self._prompts[rows], order)
        return Grouping(
            rows=self._put(order),
            tokens=self._put(tokens),
            tokens_back=self._put(np.argsort(tokens)),
            prompts_back=self._put(np.argsort(prompts)),
        )

    def _layout(self, lengths: Indices, room: int) -> Layout:
        return Layout(lengths, self.device, self._putting, room)

    def _put(self, array: Indices) -> Tensor:
        tensor = torch.from_numpy(np.ascontiguousarray(array))
        if self._putting is not None:
            return self._putting(tensor)
        # The driver copies pageable memory before the call returns, so the array may be freed.
        return tensor.to(self.device, non_blocking=True)


def _spans(starts: Indices, lengths: Indices) -> Indices:
    """start, start + 1, ... of every span: [sum(lengths)]."""
    return np.repeat(starts - (np.cumsum(lengths) - lengths), lengths) + np.arange(lengths.sum())


def _reordered(lengths: Indices, order: Indices) -> Indices:
    """Indices of the entries of spans of `lengths`, with the spans in another order."""
    starts = np.cumsum(lengths) - lengths
    return _spans(starts[order], lengths[order])
