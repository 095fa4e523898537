"""Index arrays of a packed batch, compared with plain lists of tokens."""

from dataclasses import dataclass
from itertools import pairwise
from typing import TypeAlias

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn

from adapters.format.spec import Pooling
from adapters.packed.layout import Layout
from adapters.packed.packing import Generation, PackedBatch, PromptSource, Row, RowShape
from adapters.tokenizer import Encoding

LAYERS = 5


@st.composite
def batches(draw: DrawFn) -> list[Row]:
    """Rows whose tokens are distinct numbers all over the batch, so that each can be followed."""
    specs = draw(
        st.lists(
            st.builds(
                RowShape,
                st.integers(0, 4),
                st.integers(0, LAYERS - 1),
                st.sampled_from(PromptSource),
                st.sampled_from(Pooling),
                st.booleans(),
            ),
            min_size=1,
            max_size=5,
        )
    )
    rows, used = [], 0
    for length in draw(st.lists(st.integers(1, 9), min_size=1, max_size=12)):
        ids = np.arange(used, used + length, dtype=np.int64)
        used += length
        adapter = draw(st.integers(0, len(specs) - 1))
        kinds = ids % 2
        rows.append(Row(Encoding(ids, kinds, truncated=False), specs[adapter], adapter))
    return rows


@dataclass(frozen=True, slots=True)
class Slot:
    """A prompt vector: the first token of its text, and its place in the prompt."""

    text: int
    place: int


Item: TypeAlias = int | Slot


def row_at(row: Row, layer: int) -> list[Item]:
    """What a row is in front of `layer`: from its insertion layer on, slots and tokens."""
    tokens: list[Item] = row.encoding.input_ids.tolist()
    if layer < row.shape.insertion_layer or not row.shape.prompt_length:
        return tokens
    first = int(row.encoding.input_ids[0])
    return [*(Slot(first, place) for place in range(row.shape.prompt_length)), *tokens]


def sequence_at(batch: PackedBatch, layer: int) -> list[Item]:
    """What the batch's own index arrays make of its tokens up to `layer`."""
    embedded: list[Item] = batch.input_ids.tolist()
    sequence = embedded
    for insertion in batch.insertions:
        if insertion.layer > layer:
            break
        joined = list(sequence)
        for generation in insertion.generations:
            of_embeddings = generation.source is PromptSource.EMBEDDINGS
            joined += prompts_of(batch, generation, embedded if of_embeddings else sequence)
        sequence = [joined[i] for i in insertion.expand.tolist()]
    return sequence


def prompts_of(batch: PackedBatch, generation: Generation, source: list[Item]) -> list[Item]:
    """The slots that a generation's groups make, taken back to the rows' order."""
    owners = [batch.rows[row] for row in generation.rows]
    expected = [owner.encoding.input_ids.tolist() for owner in owners]
    if generation.source is PromptSource.NOTHING:
        assert generation.tokens is None
        source = [0] * len(owners)
    if generation.source in (PromptSource.FIRST_TOKEN, PromptSource.NOTHING):
        expected = [text[:1] for text in expected]
    seen = source if generation.tokens is None else [source[i] for i in generation.tokens.tolist()]
    extents = zip(generation.layout.starts, generation.layout.lengths, strict=True)
    texts = [seen[start : start + length] for start, length in extents]
    if generation.source is not PromptSource.NOTHING:
        assert texts == expected
    grouping = generation.grouping
    order = list(range(len(texts))) if grouping is None else grouping.rows.tolist()
    grouped = [token for row in order for token in texts[row]]
    assert [owners[row].adapter for row in order] == [
        group.adapter for group in generation.groups for _ in range(group.rows)
    ]
    assert [len(grouped)] == [sum(group.tokens for group in generation.groups)]
    slots: list[Item] = [
        Slot(int(owners[row].encoding.input_ids[0]), place)
        for row in order
        for place in range(owners[row].shape.prompt_length)
    ]
    if grouping is None:
        return slots
    assert [seen[i] for i in grouping.tokens.tolist()] == grouped
    assert [grouped[i] for i in grouping.tokens_back.tolist()] == seen
    return [slots[i] for i in grouping.prompts_back.tolist()]


@pytest.mark.slow
@settings(max_examples=150, derandomize=True, deadline=None, database=None)
@given(rows=batches())
def test_every_layer_sees_each_row_as_its_slots_and_tokens(rows: list[Row]) -> None:
    batch = PackedBatch(rows)
    assert [id(row) for row in batch.rows] == [id(rows[i]) for i in batch.order]
    assert sorted(batch.order.tolist()) == list(range(len(rows)))
    for layer in range(LAYERS):
        expected = [row_at(row, layer) for row in batch.rows]
        assert sequence_at(batch, layer) == [item for row in expected for item in row]
        passed = [insertion for insertion in batch.insertions if insertion.layer <= layer]
        layout = passed[-1].layout if passed else batch.layout
        assert layout.lengths.tolist() == [len(row) for row in expected]
    assert [insertion.layer for insertion in batch.insertions] == sorted(
        {row.shape.insertion_layer for row in rows if row.shape.prompt_length}
    )
    assert batch.prompt_positions == sum(row.shape.prompt_length for row in rows)


@pytest.mark.slow
@settings(max_examples=150, derandomize=True, deadline=None, database=None)
@given(rows=batches(), causal=st.booleans())
def test_answers_are_read_where_the_method_says(rows: list[Row], causal: bool) -> None:
    batch = PackedBatch(rows, causal=causal)
    sequence = sequence_at(batch, LAYERS)
    read = [sequence[i] for i in batch.reads.tolist()]
    for row, start, length in zip(
        batch.rows, batch.read_layout.starts, batch.read_layout.lengths, strict=True
    ):
        tokens = row.encoding.input_ids.tolist()
        if row.shape.pooling is Pooling.MEAN:
            expected = tokens
        elif row.shape.pooling is Pooling.FIRST:
            expected = row_at(row, LAYERS)[:1]
        elif row.shape.pooling is Pooling.BEFORE_LAST:
            expected = tokens[-2:][:1]
        else:
            expected = tokens[-1:] if causal else tokens[:1]
        assert read[start : start + length] == expected


@settings(max_examples=150, derandomize=True, deadline=None, database=None)
@given(rows=batches())
def test_positions_and_segments_belong_to_their_tokens(rows: list[Row]) -> None:
    batch = PackedBatch(rows)
    encodings = [row.encoding for row in batch.rows]
    assert batch.input_ids.tolist() == [i for item in encodings for i in item.input_ids.tolist()]
    assert batch.offsets.tolist() == [i for item in encodings for i in range(len(item))]
    shifts = [row.shape.prompt_length if row.shape.shifts_text else 0 for row in batch.rows]
    if batch.shifts is None:
        assert not any(row.shape.shifts_text for row in batch.rows)
    else:
        lengths = [len(item) for item in encodings]
        assert batch.shifts.tolist() == np.repeat(shifts, lengths).tolist()
    assert batch.token_type_ids.tolist() == [
        i for item in encodings for i in item.token_type_ids.tolist()
    ]


@settings(max_examples=150, derandomize=True, deadline=None, database=None)
@given(lengths=st.lists(st.integers(1, 6), min_size=1, max_size=30))
def test_runs_cover_a_layout_once_and_hold_rows_of_one_length(lengths: list[int]) -> None:
    layout = Layout(np.array(lengths, dtype=np.int64))
    assert [run.length for run in layout.runs for _ in range(run.rows)] == lengths
    pieces = layout.by_run(torch.arange(layout.tokens))
    assert [(len(piece), piece.shape[1]) for piece in pieces] == [
        (run.rows, run.length) for run in layout.runs
    ]
    assert torch.cat([piece.flatten() for piece in pieces]).tolist() == list(range(layout.tokens))
    assert all(one.length != two.length for one, two in pairwise(layout.runs))
    assert layout.cumulative.tolist() == [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    assert layout.longest == max(lengths)
    assert layout.starts.tolist() == layout.cumulative.tolist()[:-1]


def test_a_batch_of_one_adapter_needs_no_index_arrays() -> None:
    """The common case copies nothing: all rows, tokens and slots belong to one group."""
    spec = RowShape(2, 1, PromptSource.HIDDEN, Pooling.ANSWER)
    ids = np.arange(3, dtype=np.int64)
    (insertion,) = PackedBatch([Row(Encoding(ids, ids, truncated=False), spec, 7)] * 4).insertions
    (generation,) = insertion.generations
    (group,) = generation.groups
    assert generation.tokens is None
    assert (group.adapter, group.rows, group.tokens) == (7, 4, 12)
    assert generation.grouping is None
