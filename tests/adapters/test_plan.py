"""Batches over slots as index arrays: every section says what it should, and tails belong to
nobody."""

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters.backbone.model import Backbone
from adapters.format.spec import GeneratorInput, Pooling
from adapters.slots.batch import (
    TILE,
    Caps,
    Plan,
    Signature,
    Stop,
    blank,
    facts_of,
    section_offsets,
    size_of,
)
from adapters.slots.buckets import Ladder, cost
from tests.support.tiny_models import make_spec

SIGNATURE = Signature((Stop(1, (GeneratorInput.HIDDEN,)),), mean=False)


def plan_of(backbone: Backbone, *rows: tuple[int, int], **fields: Any) -> Plan:
    """Rows of (slot, words), their adapters with three prompt slots in front of layer 1."""
    spec = make_spec(backbone, generator_input=GeneratorInput.HIDDEN, **fields)
    encode = backbone.encoder.encode
    return Plan(
        [encode("win " * words, max_length=spec.max_length) for _, words in rows],
        np.array([slot for slot, _ in rows]),
        np.array([facts_of(spec)] * len(rows)),
    )


def sections_of(plan: Plan, caps: Caps | None = None) -> list[npt.NDArray[np.int32]]:
    caps = caps or plan.need
    array = np.full(size_of(caps, plan.signature), 99, dtype=np.int32)
    plan.write(array, caps)
    return [array[start : start + size] for start, size in section_offsets(caps, plan.signature)]


def test_rows_of_a_slot_stand_together_and_each_section_says_where(backbone: Backbone) -> None:
    plan = plan_of(backbone, (5, 1), (2, 0), (5, 2))
    assert plan.order.tolist() == [1, 0, 2]
    ids, types, offsets, text, slots, tiles, following, reads, heads = sections_of(plan)
    encode = backbone.encoder.encode
    flat = [encode(text, max_length=99).input_ids for text in ("", "win", "win win")]
    assert ids.tolist() == np.concatenate(flat).tolist()
    assert set(types.tolist()) == {0}
    assert offsets.tolist() == [0, 1, 0, 1, 2, 0, 1, 2, 3]
    assert text.tolist() == [0, 2, 5, 9]
    assert slots.tolist() == heads.tolist() == [2, 5, 5]
    assert tiles.reshape(-1, 3).tolist() == [[2, 0, 2], [5, 2, 9]]
    # Three slots in front of each row.
    assert following.tolist() == [0, 5, 11, 18]
    assert reads.tolist() == [3, 8, 14]
    assert plan.need == Caps(rows=3, tokens=9, expanded=(18,), reads=3, longest=7, tiles=2)


def test_a_tail_belongs_to_nobody(backbone: Backbone) -> None:
    plan = plan_of(backbone, (1, 3), (0, 1))
    caps = Caps(rows=4, tokens=20, expanded=(30,), reads=4, longest=9, tiles=5)
    assert caps.hold(plan.need)
    _, _, _, text, slots, tiles, following, reads, heads = sections_of(plan, caps)
    assert text.tolist() == [0, 3, 8, 8, 8]
    assert following.tolist() == [0, 6, 14, 14, 14]
    assert slots.tolist() == heads.tolist() == [0, 1, -1, -1]
    assert tiles.reshape(-1, 3).tolist()[2:] == [[0, 0, 0]] * 3
    assert reads.tolist()[2:] == [0, 0]


def test_a_blank_batch_has_no_row_and_the_same_shape(backbone: Backbone) -> None:
    plan = plan_of(backbone, (1, 3), pooling=Pooling.MEAN)
    array = blank(plan.need, plan.signature)
    assert len(array) == size_of(plan.need, plan.signature)
    sections = [
        array[start : start + size] for start, size in section_offsets(plan.need, plan.signature)
    ]
    slots, heads = sections[4], sections[-1]
    assert set(slots.tolist()) == set(heads.tolist()) == {-1}
    assert all(not section.any() for section in (*sections[:4], *sections[5:-1]))


def test_a_tile_never_crosses_from_one_slot_to_another(backbone: Backbone) -> None:
    plan = plan_of(backbone, (0, 100), (1, 30), (0, 90), (3, 125))
    text, slots, tiles = (sections_of(plan)[index] for index in (3, 4, 5))
    seen = np.full(text[-1], -1)
    for slot, first, behind in tiles.reshape(-1, 3):
        assert 0 < behind - first <= TILE
        assert set(seen[first:behind]) == {-1}
        seen[first:behind] = slot
    assert seen.tolist() == np.repeat(slots, np.diff(text)).tolist()


@pytest.mark.parametrize(
    "change",
    [
        {"rows": 2},
        {"tokens": 8},
        {"expanded": (17,)},
        {"expanded": ()},
        {"reads": 2},
        {"longest": 6},
        {"tiles": 1},
    ],
)
def test_caps_hold_a_batch_only_if_nothing_of_it_is_larger(change: dict[str, object]) -> None:
    need = Caps(rows=3, tokens=9, expanded=(18,), reads=3, longest=7, tiles=2)
    assert need.hold(need)
    fields = {name: getattr(need, name) for name in Caps.__dataclass_fields__}
    assert not Caps(**(fields | change)).hold(need)


@given(most=st.integers(64, 40000), longest=st.integers(16, 600))
@settings(max_examples=60, deadline=None)
def test_a_full_batch_and_a_lone_text_both_find_a_rung(most: int, longest: int) -> None:
    longest = min(longest, most)
    ladder = Ladder(SIGNATURE, max_positions=most, longest=longest)
    assert ladder.rungs == sorted(ladder.rungs, key=cost)
    lone = Caps(rows=1, tokens=5, expanded=(15,), reads=1, longest=15, tiles=1)
    rows = max(1, most // 49)
    full = Caps(
        rows=rows,
        tokens=39 * rows,
        expanded=(49 * rows,),
        reads=rows,
        longest=min(49, longest),
        tiles=rows,
    )
    for need in (lone, full):
        found = ladder.cheapest(need)
        assert found is not None
        assert found.hold(need)
        # No rung wastes more than it must: none before it holds the batch.
        before = ladder.rungs[: ladder.rungs.index(found)]
        assert not any(caps.hold(need) for caps in before)


def test_a_batch_over_every_rung_finds_none() -> None:
    ladder = Ladder(SIGNATURE, max_positions=1024, longest=64)
    need = Caps(rows=1, tokens=5, expanded=(80,), reads=1, longest=80, tiles=1)
    assert ladder.cheapest(need) is None
