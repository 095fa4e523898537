"""Rows of a batch over slots with the same text are computed once as far as they are alike.

The kernels are compiled if there is a CUDA device, else Triton interprets them (see conftest.py).
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="Triton is not installed")

from adapters.adapter import classify, prepare, rows_of
from adapters.backbone.model import Backbone
from adapters.format.files import Adapter
from adapters.format.spec import AttentionPrompt, GeneratorInput, StaticPrompt, VectorTuning
from adapters.packed.layout import Layout
from adapters.slots.bank import SlotBank, image_of
from adapters.slots.batch import BatchShape, Signature, SlottedBatch, array_size, facts_of
from adapters.slots.buckets import Buckets
from adapters.slots.forward import Inputs, Outputs, Widths, run
from adapters.slots.sharing import same_texts
from adapters.tokenizer import Encoding
from tests.support.families import backbone_of
from tests.support.kinds import adapters_of_all_kinds
from tests.support.mixtures import Case, adapters_of, mixtures, sentences
from tests.support.tiny_models import make_adapter, make_spec

SAME = 1e-5
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# Padding, and room for prompts, hold what was in memory before. Nobody reads what comes of it.
pytestmark = pytest.mark.filterwarnings(
    "ignore:(overflow|invalid value) encountered:RuntimeWarning"
)


@pytest.fixture(autouse=True)
def empty_memory_holds_nan() -> Iterator[None]:
    """PyTorch fills what is allocated, so that nothing that is read can come from it."""
    torch.use_deterministic_algorithms(DEVICE == "cpu")
    yield
    torch.use_deterministic_algorithms(False)


def batch_of(
    backbone: Backbone, adapters: Sequence[Adapter], rows: Sequence[tuple[int, Encoding]]
) -> SlottedBatch:
    """Of rows (adapter, text); the adapter is in the slot of its number."""
    return SlottedBatch(
        [encoding for _, encoding in rows],
        np.array([index for index, _ in rows]),
        np.array([facts_of(adapters[index].spec) for index, _ in rows]),
        causal=backbone.family.causal,
    )


def check(
    backbone: Backbone, adapters: Sequence[Adapter], rows: Sequence[tuple[int, Encoding]]
) -> SlottedBatch:
    """Compare the rows of one batch over slots with each row alone in the packed pass."""
    bank = SlotBank(len(adapters), device=backbone.device)
    bank.write([(slot, image_of(item, backbone)) for slot, item in enumerate(adapters)])
    prepared = [prepare(adapter, backbone) for adapter in adapters]
    alone = [
        classify(backbone, backbone.pack(rows_of(prepared, [row])), prepared)[0] for row in rows
    ]
    batch = batch_of(backbone, adapters, rows)
    shape = larger(batch.shape, 5, every=batch.signature.mean)
    outputs = answers(backbone, bank, batch, shape)
    places, explained = batch.weighed(shape), batch.explained
    for position, original in enumerate(batch.order.tolist()):
        answer, labels = alone[original], len(alone[original].scores)
        scores = outputs.scores[position].numpy()
        np.testing.assert_allclose(scores[:labels], answer.scores, rtol=0, atol=SAME)
        assert explained[position] == (len(answer.token_weights) > 0)
        if explained[position]:
            weights = outputs.weights[places[position]].numpy()
            np.testing.assert_allclose(weights, answer.token_weights, rtol=0, atol=SAME)
    return batch


def larger(need: BatchShape, tail: int, *, every: bool) -> BatchShape:
    return BatchShape(
        rows=need.rows + tail,
        texts=need.texts + tail // 2,
        tokens=need.tokens + tail,
        expanded=tuple(positions + 3 * tail for positions in need.expanded),
        reads=need.reads + (3 * tail if every else tail),
        longest=need.longest + tail,
        tiles=need.tiles + tail,
    )


def answers(backbone: Backbone, bank: SlotBank, batch: SlottedBatch, shape: BatchShape) -> Outputs:
    # The previous content of the memory must not matter.
    array = np.full(array_size(shape, batch.signature), 7, dtype=np.int32)
    batch.write(array, shape)
    on_device = torch.from_numpy(array).to(backbone.device)
    inputs = Inputs(on_device, shape, batch.signature, batch.lengths)
    widths = Widths.of(batch.facts, hidden_size=backbone.hidden_size)
    outputs = run(backbone, bank, inputs, widths)
    return Outputs(outputs.scores.cpu(), outputs.weights.cpu())


# tests/gpu/test_kinds.py does the same for every family.
@pytest.mark.slow
@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_one_text_under_adapters_of_all_kinds_is_answered_as_alone(name: str) -> None:
    backbone = backbone_of(name).to(device=DEVICE)
    adapters = list(adapters_of_all_kinds(backbone).values())
    encode = backbone.encoder.encode
    pair, other = encode("a card", "is free", max_length=16), encode("hello you", max_length=16)
    rows = [(index, pair) for index in range(len(adapters))]
    # Twice under the first adapters, beside a text that one of them reads alone.
    rows += [(index, pair) for index in range(5)] + [(2, other)]
    batch = check(backbone, adapters, rows)
    assert batch.shape.texts < len(rows)
    assert batch.shared is not None


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_any_mixture_over_few_texts_is_answered_as_alone() -> None:
    backbone = backbone_of("bert").to(device=DEVICE)

    @settings(max_examples=5, derandomize=True, deadline=None, database=None)
    @given(
        case=mixtures(backbone),
        texts=st.lists(sentences(), min_size=1, max_size=3),
        rows=st.lists(st.tuples(st.integers(0, 7), st.integers(0, 2)), min_size=8, max_size=16),
    )
    def compare(case: Case, texts: list[str], rows: list[tuple[int, int]]) -> None:
        adapters = adapters_of(backbone, case)
        count = len(adapters)
        batch = check(
            backbone,
            adapters,
            [
                (
                    adapter % count,
                    backbone.encoder.encode(
                        texts[text % len(texts)],
                        max_length=adapters[adapter % count].spec.max_length,
                    ),
                )
                for adapter, text in rows
            ],
        )
        shared.append(batch.shared is not None)

    shared: list[bool] = []
    compare()
    assert any(shared)


def prompt(layer: int, source: GeneratorInput = GeneratorInput.HIDDEN) -> dict[str, Any]:
    return {
        "prompt": AttentionPrompt(
            length=3, layer=layer, bottleneck=4, attention_size=8, source=source
        )
    }


@pytest.mark.slow
def test_entries_split_where_their_adapters_first_differ(backbone: Backbone) -> None:
    f = backbone.intermediate_size

    def vectors(first: int) -> dict[str, Any]:
        return {"tuning": VectorTuning(layers=(first, backbone.layers), intermediate_size=f)}

    no_prompt: dict[str, Any] = {"prompt": None}
    kinds: list[dict[str, Any]] = [
        prompt(1),
        prompt(2),
        prompt(1, GeneratorInput.EMBEDDINGS),
        no_prompt,
        no_prompt,
        no_prompt | vectors(0),
        no_prompt | vectors(2),
        prompt(2) | vectors(2),
        {"prompt": StaticPrompt(length=2, shifts_text=True), "max_length": 32},
    ]
    adapters = [make_adapter(backbone, seed=seed, **kind) for seed, kind in enumerate(kinds)]
    text = backbone.encoder.encode("win now", max_length=16)
    rows = [(index, text) for index in range(len(kinds))]
    # Once more under two adapters: the same to the end.
    batch = check(backbone, adapters, [*rows, (3, text), (0, text)])
    tokens = len(text)
    plain, inserted = [tokens], [tokens + 3]
    assert [lengths.tolist() for lengths in batch.lengths] == [
        # Embedded alike, but for the shifted text.
        plain * 2,
        # Layer 0 has vectors of one row and the static prompt of another.
        [*plain * 2, tokens + 2],
        # Two prompts at layer 1.
        [*inserted, *plain, *inserted, *plain, tokens + 2],
        # Two more at layer 2, where vectors begin; three rows of heads alone are one entry.
        [*inserted * 3, *plain * 3, *inserted, tokens + 2],
    ]
    assert batch.shared is not None
    # The first row of each entry runs the layers. In the batch's order: both rows of slot 0 first.
    assert batch.shared.tolist() == [
        *(False, True),
        *(True, True),
        *(True, True, True),
        *(False, True, True, False),
    ]


def test_heads_alone_share_all_layers(backbone: Backbone) -> None:
    adapters = [make_adapter(backbone, seed=seed, prompt=None) for seed in range(6)]
    text = backbone.encoder.encode("win now free", max_length=16)
    batch = check(backbone, adapters, [(index, text) for index in range(6)])
    assert (batch.shape.rows, batch.shape.texts, batch.shape.tokens) == (6, 1, len(text))


def test_different_texts_make_the_batch_that_they_made_without_sharing(
    backbone: Backbone,
) -> None:
    specs = [make_spec(backbone, insertion_layer=layer) for layer in (1, 2)]
    texts = [backbone.encoder.encode("win " * count, max_length=64) for count in range(12)]
    # One equal pair saves too little.
    texts.append(texts[1])
    slots = np.arange(13) % 2
    facts = np.array([facts_of(specs[slot]) for slot in slots])
    batches = [SlottedBatch(texts, slots, facts, sharing=sharing) for sharing in (True, False)]
    assert [batch.shared for batch in batches] == [None, None]
    shape = batches[0].shape
    arrays = np.zeros((2, array_size(shape, batches[0].signature)), dtype=np.int32)
    for batch, array in zip(batches, arrays, strict=True):
        batch.write(array, shape)
    np.testing.assert_array_equal(arrays[0], arrays[1])


@pytest.mark.slow
def test_tuned_adapters_of_one_text_have_nothing_to_share(backbone: Backbone) -> None:
    tuning = VectorTuning(layers=(0, backbone.layers), intermediate_size=backbone.intermediate_size)
    adapters = [make_adapter(backbone, seed=seed, tuning=tuning) for seed in range(3)]
    text = backbone.encoder.encode("win now free", max_length=16)
    assert batch_of(backbone, adapters, [(index, text) for index in range(3)]).shared is None
    twice = check(backbone, adapters, [(index, text) for index in (0, 1, 2, 0, 1, 2)])
    assert twice.shape.texts == 3


def test_a_prompt_before_the_first_layer_leaves_no_layer_to_share(backbone: Backbone) -> None:
    adapters = [make_adapter(backbone, seed=seed, **prompt(0)) for seed in range(3)]
    text = backbone.encoder.encode("win now free", max_length=16)
    batch = check(backbone, adapters, [(index, text) for index in range(3)])
    assert batch.shared is not None
    assert not batch.shared.any()


@given(
    texts=st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=4), min_size=2, max_size=24),
    types=st.lists(st.integers(0, 1), min_size=24, max_size=24),
    shifts=st.lists(st.integers(0, 2), min_size=24, max_size=24),
)
@settings(max_examples=200, deadline=None)
def test_only_equal_texts_are_taken_for_equal(
    texts: list[list[int]], types: list[int], shifts: list[int]
) -> None:
    keys = [
        (tuple(text), kind, shift) for text, kind, shift in zip(texts, types, shifts, strict=False)
    ]
    layout = Layout(np.array([len(text) for text in texts]))
    ids = np.concatenate(texts, dtype=np.int32, casting="unsafe")
    offsets = np.concatenate([np.arange(len(text), dtype=np.int32) for text in texts])
    kinds = np.array(types[: len(texts)], dtype=np.int32).repeat(layout.lengths)
    rows_shifts = np.array(shifts[: len(texts)])
    firsts = same_texts(layout, rows_shifts, offsets, ids, kinds)
    saved = sum(len(key[0]) for index, key in enumerate(keys) if keys.index(key) < index)
    if firsts is None:
        # Too little, or hidden between others of the same checksum.
        assert saved <= 0.1 * layout.tokens or _collide(keys)
        return
    for index, first in enumerate(firsts.tolist()):
        assert keys[first] == keys[index]
        assert first == keys.index(keys[index]) or _collide(keys)


def _collide(keys: list[tuple[tuple[int, ...], int, int]]) -> bool:
    """Whether different texts have one checksum."""
    sums = [
        (len(ids), sum(each * (place + 1) for place, each in enumerate(ids)) + shift)
        for ids, _, shift in set(keys)
    ]
    return len(set(sums)) < len(sums)


@pytest.mark.parametrize("copied", [0, 1, 3], ids=["one object", "one copy", "many copies"])
def test_one_object_makes_the_batch_that_equal_objects_make(
    backbone: Backbone, copied: int
) -> None:
    shifted: dict[str, Any] = {"prompt": StaticPrompt(length=2, shifts_text=True), "max_length": 32}
    kinds = [prompt(1), {"prompt": None}, shifted, prompt(2)]
    specs = [make_spec(backbone, **kind) for kind in kinds]
    # Their lengths differ, so no two have one checksum.
    texts = [backbone.encoder.encode("win " * count, max_length=32) for count in range(1, 6)]
    one = [text for text in texts for _ in specs]
    equal = [replace(text) for text in one]
    some = [
        replace(text) if copied and index % copied == 0 else text for index, text in enumerate(one)
    ]
    slots = np.arange(len(one)) % len(specs)
    facts = np.array([facts_of(specs[slot]) for slot in slots])
    batches = [SlottedBatch(rows, slots, facts) for rows in (equal, some)]
    shape = batches[0].shape
    assert batches[1].shape == shape
    # The shifted texts are not those of the others.
    assert shape.texts == 2 * len(texts)
    arrays = np.zeros((2, array_size(shape, batches[0].signature)), dtype=np.int32)
    for batch, array in zip(batches, arrays, strict=True):
        batch.write(array, shape)
    np.testing.assert_array_equal(arrays[0], arrays[1])
    assert batches[0].shared is not None
    assert batches[1].shared is not None
    np.testing.assert_array_equal(batches[0].shared, batches[1].shared)


def test_shifted_texts_between_them_keep_no_equal_texts_apart(backbone: Backbone) -> None:
    shifted: dict[str, Any] = {"prompt": StaticPrompt(length=2, shifts_text=True), "max_length": 32}
    kinds = [shifted if index % 2 else prompt(1) for index in range(8)]
    adapters = [make_adapter(backbone, seed=seed, **kind) for seed, kind in enumerate(kinds)]
    text = backbone.encoder.encode("win now", max_length=16)
    batch = check(backbone, adapters, [(index, text) for index in range(8)])
    assert batch.shape.texts == 2


def test_buckets_for_shared_texts_are_beside_the_usual_ones() -> None:
    buckets = Buckets(Signature((), mean=False), max_positions=16384, longest=256)
    need = BatchShape(rows=320, texts=40, tokens=1600, expanded=(), reads=320, longest=64, tiles=0)
    usual, shared = buckets.cheapest(need), buckets.cheapest(need, shared=True)
    assert usual is not None
    assert shared is not None
    assert shared not in buckets.shapes
    assert shared.holds(need)
    assert shared.tokens < usual.tokens / 3
    assert buckets.cheapest(need, shared=True, among=set(buckets.shapes)) == usual
    assert buckets.cheapest(need, shared=True, among=()) is None
