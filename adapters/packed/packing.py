"""Where every token and every prompt slot of a batch stands.

Integers only: knows no weights and runs no model.

Rows of a batch stand one behind the other in one flat sequence, without padding. A row has its n
tokens up to its insertion layer m and t prompt slots in front of them from there on, so the
sequence grows at every layer at which some row inserts; between two such layers it has one
`Layout`. Rows are ordered by length so that rows of equal length are neighbours: attention takes
each such run at once, as a view, and copies nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from adapters.backbone.tokenizer import Encoding
from adapters.format.spec import GeneratorInput, Pooling
from adapters.packed.layout import Indices, Layout


class RowShape(Protocol):
    """What of an adapter's spec decides where a row's tokens and slots stand.

    A prompt length of 0 is a row without a prompt: it passes every layer as its text alone.
    """

    @property
    def prompt_length(self) -> int: ...
    @property
    def insertion_layer(self) -> int: ...
    @property
    def generator_input(self) -> GeneratorInput: ...
    @property
    def pooling(self) -> Pooling: ...


@dataclass(frozen=True, slots=True)
class Row:
    """One text to classify: its tokens, its adapter's spec, which adapter of the batch that is."""

    encoding: Encoding
    spec: RowShape
    adapter: int


@dataclass(frozen=True, slots=True)
class Group:
    """How many rows and tokens of those that insert together are one adapter's."""

    adapter: int
    rows: int
    tokens: int


@dataclass(frozen=True, slots=True)
class ByAdapter:
    """The way from the rows' order to the groups' (adapter by adapter) and back, all int64."""

    rows: Tensor  # [rows] take these, and the groups stand one behind the other
    tokens: Tensor  # [tokens] the same for tokens
    tokens_back: Tensor  # [tokens] takes what stands by adapter back to the rows' order
    slots_back: Tensor  # [slots] the same for prompt slots


@dataclass(frozen=True, slots=True)
class Generation:
    """The prompts to make from one source: the embeddings, or the hidden states as they stand."""

    source: GeneratorInput
    rows: Indices  # among the batch's rows
    tokens: Tensor | None  # int64, the rows' tokens in the source; None: all of it
    layout: Layout  # of those tokens
    groups: tuple[Group, ...]
    by_adapter: ByAdapter | None  # None: there is one group only


@dataclass(frozen=True, slots=True)
class Insertion:
    """What happens in front of layer `layer`: some rows get their prompt."""

    layer: int
    generations: tuple[Generation, ...]
    expand: Tensor  # int64 [tokens of `layout`], into concat(sequence, prompts of all generations)
    layout: Layout  # from this layer on


class PackedBatch:
    """Index arrays of one forward pass over any mixture of adapters, layers and prompt lengths.

    `order` is the rows' order inside: row `order[i]` of the caller stands i-th.

    Args:
        rows: at least one; every encoding holds at least one token.
        causal: the answer is read at the last token instead of at index t.
        device: where the index tensors go.
    """

    def __init__(
        self, rows: Sequence[Row], *, causal: bool = False, device: torch.device | None = None
    ) -> None:
        assert rows, "a batch has at least one row"
        self.device = device or torch.device("cpu")
        lengths = np.array([len(row.encoding) for row in rows], dtype=np.int64)
        prompts = np.array([row.spec.prompt_length for row in rows], dtype=np.int64)
        layers = np.array([row.spec.insertion_layer for row in rows], dtype=np.int64)
        self.order: Indices = np.lexsort((layers, lengths, prompts))
        self.rows: tuple[Row, ...] = tuple(rows[i] for i in self.order)
        self._lengths, self._prompts, self._layers = (
            lengths[self.order],
            prompts[self.order],
            layers[self.order],
        )
        self.layout = Layout(self._lengths, self.device)
        self.insertions = self._insertions()
        self._read(causal=causal)

    # What the embeddings are made of comes when it is asked for: training mostly keeps what they
    # lead to, and every array is a copy to the device.
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
        """Places within the rows: int64 [T]."""
        return self._put(
            np.arange(self.layout.tokens) - np.repeat(self.layout.starts, self._lengths)
        )

    @property
    def slots(self) -> int:
        """Prompt positions that the rows carry in the end."""
        return int(self._prompts.sum())

    def _read(self, *, causal: bool) -> None:
        """Which positions of the last layer are read, and the row that each one is read for."""
        last = self.insertions[-1].layout
        mean = np.array([row.spec.pooling is Pooling.MEAN for row in self.rows])
        counts = np.where(mean, self._lengths, 1)
        at = last.lengths - 1 if causal else self._prompts
        first = last.starts + np.where(mean, self._prompts, at)
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        self.reads = self._put(np.repeat(first, counts) + within)
        self.read_layout = Layout(counts, self.device)

    def _insertions(self) -> tuple[Insertion, ...]:
        current, done = self.layout, np.zeros(len(self.rows), dtype=bool)
        insertions = []
        for layer in np.unique(self._layers):
            here = self._layers == layer
            done = done | here
            following = Layout(self._lengths + np.where(done, self._prompts, 0), self.device)
            generations, made = [], np.zeros(len(self.rows), dtype=np.int64)
            offset = 0
            for source in GeneratorInput:
                chosen = here & np.array([row.spec.generator_input is source for row in self.rows])
                if not chosen.any():
                    continue
                stands = self.layout if source is GeneratorInput.EMBEDDINGS else current
                generations.append(self._generation(source, np.flatnonzero(chosen), stands))
                sizes = self._prompts[chosen]
                made[chosen] = offset + np.cumsum(sizes) - sizes
                offset += int(sizes.sum())
            expand = self._expansion(current, following, here, made)
            insertions.append(
                Insertion(int(layer), tuple(generations), self._put(expand), following)
            )
            current = following
        return tuple(insertions)

    def _expansion(
        self, current: Layout, following: Layout, here: npt.NDArray[np.bool_], made: Indices
    ) -> Indices:
        """For every position of `following`: its place in concat(current, prompts made now)."""
        row = np.repeat(np.arange(len(self.rows)), following.lengths)
        within = np.arange(following.tokens) - following.starts[row]
        slots = np.where(here, self._prompts, 0)[row]
        return np.where(
            within < slots,
            current.tokens + made[row] + within,
            current.starts[row] + within - slots,
        )

    def _generation(self, source: GeneratorInput, rows: Indices, stands: Layout) -> Generation:
        layout = Layout(self._lengths[rows], self.device)
        everything = layout.tokens == stands.tokens
        tokens = None if everything else self._put(_spans(stands.starts[rows], layout.lengths))
        owners = np.array([self.rows[i].adapter for i in rows])
        adapters, counts = np.unique(owners, return_counts=True)
        lengths = np.bincount(np.searchsorted(adapters, owners), layout.lengths).astype(np.int64)
        groups = tuple(
            Group(int(adapter), int(count), int(length))
            for adapter, count, length in zip(adapters, counts, lengths, strict=True)
        )
        return Generation(source, rows, tokens, layout, groups, self._by_adapter(rows, owners))

    def _by_adapter(self, rows: Indices, owners: Indices) -> ByAdapter | None:
        order = np.argsort(owners, kind="stable")
        if owners[order[0]] == owners[order[-1]]:
            return None
        tokens = _moved(self._lengths[rows], order)
        slots = _moved(self._prompts[rows], order)
        return ByAdapter(
            rows=self._put(order),
            tokens=self._put(tokens),
            tokens_back=self._put(np.argsort(tokens)),
            slots_back=self._put(np.argsort(slots)),
        )

    def _put(self, array: Indices) -> Tensor:
        # The driver takes pageable memory over before the call returns: nothing to wait for.
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device, non_blocking=True)


def _spans(starts: Indices, lengths: Indices) -> Indices:
    """[sum(lengths)]: start, start + 1, ... of every span, one behind the other."""
    return np.repeat(starts - (np.cumsum(lengths) - lengths), lengths) + np.arange(lengths.sum())


def _moved(lengths: Indices, order: Indices) -> Indices:
    """What stands in spans of `lengths`, span by span in another order: indices to take."""
    starts = np.cumsum(lengths) - lengths
    return _spans(starts[order], lengths[order])
