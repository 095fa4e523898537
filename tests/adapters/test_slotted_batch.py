"""Batches over slots as one int32 array: what each section holds, and the buckets of batches."""

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

from adapters.backbone.model import Backbone
from adapters.format.spec import GeneratorInput, Pooling
from adapters.slots.batch import (
    TILE,
    BatchShape,
    InsertionPoint,
    Signature,
    SlottedBatch,
    Source,
    array_size,
    blank_array,
    facts_of,
    section_sizes,
    section_slices,
)
from adapters.slots.buckets import Buckets, cost
from tests.support.tiny_models import make_spec

SIGNATURE = Signature((InsertionPoint(1, (Source.HIDDEN,)),), mean=False)
SLOTS, TILES, CUMULATIVE = "layer1.hidden.slots", "layer1.hidden.tiles", "layer1.cumulative"


def batch_of(backbone: Backbone, *rows: tuple[int, int], **fields: Any) -> SlottedBatch:
    """Rows of (slot, words), their adapters with three prompt positions from layer 1 on."""
    spec = make_spec(backbone, generator_input=GeneratorInput.HIDDEN, **fields)
    encode = backbone.encoder.encode
    return SlottedBatch(
        [encode("win " * words, max_length=spec.max_length) for _, words in rows],
        np.array([slot for slot, _ in rows]),
        np.array([facts_of(spec)] * len(rows)),
    )


def sections_of(
    batch: SlottedBatch, shape: BatchShape | None = None
) -> dict[str, npt.NDArray[np.int32]]:
    shape = shape or batch.shape
    array = np.full(array_size(shape, batch.signature), 99, dtype=np.int32)
    batch.write(array, shape)
    return named(array, shape, batch.signature)


def named(
    array: npt.NDArray[np.int32], shape: BatchShape, signature: Signature
) -> dict[str, npt.NDArray[np.int32]]:
    return {name: array[place] for name, place in section_slices(shape, signature).items()}


def test_rows_of_a_slot_are_neighbours_and_each_section_says_where(backbone: Backbone) -> None:
    batch = batch_of(backbone, (5, 1), (2, 0), (5, 2))
    assert batch.order.tolist() == [1, 0, 2]
    sections = sections_of(batch)
    encode = backbone.encoder.encode
    flat = [encode(text, max_length=99).input_ids for text in ("", "win", "win win")]
    assert {name: section.tolist() for name, section in sections.items()} == {
        "input_ids": np.concatenate(flat).tolist(),
        "token_type_ids": [0] * 9,
        "offsets": [0, 1, 0, 1, 2, 0, 1, 2, 3],
        "text.cumulative": [0, 2, 5, 9],
        SLOTS: [2, 5, 5],
        # The positions of a slot's texts; between two of them is the room for a prompt.
        TILES: [2, 3, 5, 5, 8, 18],
        "layer1.parents": [0, 1, 2],
        "layer1.starts": [3, 8, 14],
        # Three prompt positions in front of each row.
        CUMULATIVE: [0, 5, 11, 18],
        "reads": [3, 8, 14],
        "slots": [2, 5, 5],
    }
    assert batch.shape == BatchShape(
        rows=3, texts=3, tokens=9, expanded=(18,), reads=3, longest=7, tiles=2
    )


@pytest.mark.parametrize(
    ("pooling", "reads"),
    [
        (Pooling.ANSWER, [3, 8, 14]),
        (Pooling.FIRST, [0, 5, 11]),
        (Pooling.BEFORE_LAST, [3, 9, 16]),
    ],
)
def test_a_head_that_reads_one_position_reads_it_of_every_row(
    backbone: Backbone, pooling: Pooling, reads: list[int]
) -> None:
    batch = batch_of(backbone, (5, 1), (2, 0), (5, 2), pooling=pooling)
    assert sections_of(batch)["reads"].tolist() == reads


def test_the_tail_of_a_section_belongs_to_no_row(backbone: Backbone) -> None:
    batch = batch_of(backbone, (1, 3), (0, 1))
    shape = BatchShape(rows=4, texts=4, tokens=20, expanded=(30,), reads=4, longest=9, tiles=5)
    assert shape.holds(batch.shape)
    sections = sections_of(batch, shape)
    assert sections["text.cumulative"].tolist() == [0, 3, 8, 8, 8]
    assert sections[CUMULATIVE].tolist() == [0, 6, 14, 14, 14]
    assert sections[SLOTS].tolist() == sections["slots"].tolist() == [0, 1, -1, -1]
    assert sections[TILES].reshape(-1, 3).tolist()[2:] == [[0, 0, 0]] * 3
    assert sections["layer1.parents"].tolist() == [0, 1, -1, -1]
    assert sections["reads"].tolist()[2:] == [0, 0]


def test_sections_follow_one_another_aligned_and_without_overlap(backbone: Backbone) -> None:
    batch = batch_of(backbone, (1, 3), (0, 1), pooling=Pooling.MEAN)
    sizes = section_sizes(batch.shape, batch.signature)
    slices = section_slices(batch.shape, batch.signature)
    assert list(sizes) == list(slices)
    end = 0
    for name, place in slices.items():
        assert place.stop - place.start == sizes[name]
        assert place.start % 4 == 0
        assert 0 <= place.start - end < 4
        end = place.stop
    assert 0 <= array_size(batch.shape, batch.signature) - end < 4


def test_a_blank_batch_has_no_row_and_the_same_size(backbone: Backbone) -> None:
    batch = batch_of(backbone, (1, 3), pooling=Pooling.MEAN)
    array = blank_array(batch.shape, batch.signature)
    assert len(array) == array_size(batch.shape, batch.signature)
    sections = named(array, batch.shape, batch.signature)
    for name in (SLOTS, "slots", "layer1.parents"):
        assert set(sections.pop(name).tolist()) == {-1}
    assert all(not section.any() for section in sections.values())


def test_all_tokens_of_a_tile_belong_to_one_slot(backbone: Backbone) -> None:
    sections = sections_of(batch_of(backbone, (0, 100), (1, 30), (0, 90), (3, 125)))
    edges, starts = sections["layer1.cumulative"], sections["layer1.starts"]
    owners = np.full(edges[-1], -1)
    for slot, first, end in sections[TILES].reshape(-1, 3):
        assert 0 < end - first <= TILE
        assert set(owners[first:end]) == {-1}
        owners[first:end] = slot
    for slot, start, end in zip(sections[SLOTS], starts, edges[1:], strict=True):
        assert set(owners[start:end]) == {slot}


@pytest.mark.parametrize(
    "change",
    [
        {"rows": 2},
        {"texts": 2},
        {"tokens": 8},
        {"expanded": (17,)},
        {"expanded": ()},
        {"reads": 2},
        {"longest": 6},
        {"tiles": 1},
    ],
)
def test_a_shape_holds_a_batch_only_if_nothing_of_it_is_larger(change: dict[str, object]) -> None:
    need = BatchShape(rows=3, texts=3, tokens=9, expanded=(18,), reads=3, longest=7, tiles=2)
    assert need.holds(need)
    fields = {name: getattr(need, name) for name in BatchShape.__struct_fields__}
    assert not BatchShape(**(fields | change)).holds(need)


@given(most=st.integers(64, 40000), longest=st.integers(16, 600))
@settings(max_examples=60, deadline=None)
def test_a_full_batch_and_a_lone_text_both_find_a_bucket(most: int, longest: int) -> None:
    longest = min(longest, most)
    buckets = Buckets(SIGNATURE, max_positions=most, longest=longest)
    assert buckets.shapes == sorted(buckets.shapes, key=cost)
    lone = BatchShape(rows=1, texts=1, tokens=5, expanded=(15,), reads=1, longest=15, tiles=1)
    rows = max(1, most // 49)
    full = BatchShape(
        rows=rows,
        texts=rows,
        tokens=39 * rows,
        expanded=(49 * rows,),
        reads=rows,
        longest=min(49, longest),
        tiles=rows,
    )
    for need in (lone, full):
        bucket = buckets.cheapest(need)
        assert bucket is not None
        assert bucket.holds(need)
        cheaper = buckets.shapes[: buckets.shapes.index(bucket)]
        assert not any(shape.holds(need) for shape in cheaper)


def test_a_batch_larger_than_every_bucket_finds_none() -> None:
    buckets = Buckets(SIGNATURE, max_positions=1024, longest=64)
    need = BatchShape(rows=1, texts=1, tokens=5, expanded=(80,), reads=1, longest=80, tiles=1)
    assert buckets.cheapest(need) is None


def test_a_batch_with_few_early_prompts_does_not_pay_for_late_ones_in_the_first_layers() -> None:
    points = (InsertionPoint(0, (Source.STATIC,)), InsertionPoint(2, (Source.HIDDEN,)))
    buckets = Buckets(Signature(points, mean=False), max_positions=16384, longest=272)
    need = BatchShape(
        rows=362,
        texts=362,
        tokens=14211,
        expanded=(14846, 16316),
        reads=362,
        longest=164,
        tiles=339,
    )
    bucket = buckets.cheapest(need)
    assert bucket is not None
    assert bucket.holds(need)
    assert bucket.expanded[0] < 15600
    # All prompts early: that must fit as well.
    early = structs.replace(need, expanded=(16316, 16316))
    assert buckets.cheapest(early) is not None
