"""The forward pass over slots gives the same answers as the packed one of a CPU, for any mixture.

Its kernels are compiled if there is a CUDA device, else Triton interprets them (see conftest.py):
a machine without one tests the same code.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters.adapter import classify, prepare, rows_of
from adapters.backbone.model import Backbone
from adapters.format.files import Adapter
from adapters.format.spec import (
    Calibration,
    FinalActivation,
    GeneratorInput,
    GeneratorPooling,
    HeadKind,
    Pooling,
)
from adapters.slots import kernels
from adapters.slots.bank import AdapterImage, Column, SlotBank, image_of
from adapters.slots.batch import BatchShape, SlottedBatch, array_size, facts_of
from adapters.slots.forward import Inputs, Outputs, Widths, run
from adapters.tokenizer import Encoding
from tests.support.families import FAMILY_NAMES, backbone_of
from tests.support.kinds import adapters_of_all_kinds
from tests.support.tiny_models import make_adapter, make_backbone

SAME = 1e-5
SLOTS = 20
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# Padding, and room for prompts, hold what was in memory before. Nobody reads what comes of it.
pytestmark = pytest.mark.filterwarnings(
    "ignore:(overflow|invalid value) encountered:RuntimeWarning"
)


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return make_backbone().to(device=DEVICE)


def bank_of(backbone: Backbone, adapters: Sequence[Adapter], slots: Sequence[int]) -> SlotBank:
    bank = SlotBank(SLOTS, device=backbone.device)
    bank.write(
        [(slot, image_of(item, backbone)) for slot, item in zip(slots, adapters, strict=True)]
    )
    return bank


def test_a_slot_keeps_its_memory_for_an_adapter_as_large_and_gives_it_back_when_cleared(
    backbone: Backbone,
) -> None:
    first, second = (make_adapter(backbone, seed=seed) for seed in range(2))
    small = make_adapter(backbone, seed=2, prompt=None)
    bank = bank_of(backbone, [first, second], [0, 1])
    taken = bank.nbytes
    bank.write([(0, image_of(second, backbone))])
    assert bank.nbytes == taken
    bank.write([(1, image_of(small, backbone))])
    assert bank.nbytes < taken
    # A row is written whole: nothing is left of an adapter with more matrices.
    fresh = bank_of(backbone, [small], [1])
    assert torch.equal(bank.table[1] != 0, fresh.table[1] != 0)
    bank.clear(0)
    bank.clear(1)
    assert bank.nbytes == bank.table.nbytes


def test_more_images_than_rows_are_kept_ready_for_are_written_in_one_call(
    backbone: Backbone,
) -> None:
    adapter = make_adapter(backbone)
    bank = SlotBank(100, device=backbone.device)
    bank.write([(slot, image_of(adapter, backbone)) for slot in range(100)])
    assert bool((bank.table[:, Column.OUT] != 0).all())
    assert len(set(bank.table[:, Column.OUT].tolist())) == 100


def batch_of(backbone: Backbone, rows: Sequence[tuple[Encoding, Adapter, int]]) -> SlottedBatch:
    """Of rows (text, adapter, its slot)."""
    return SlottedBatch(
        [encoding for encoding, _, _ in rows],
        np.array([slot for _, _, slot in rows]),
        np.array([facts_of(adapter.spec) for _, adapter, _ in rows]),
        causal=backbone.family.causal,
    )


def check(
    backbone: Backbone,
    adapters: Sequence[Adapter],
    slots: Sequence[int],
    texts: Sequence[tuple[int, str]],
    *,
    tail: int = 0,
) -> None:
    """Compare texts over slots with the packed pass; (index of its adapter, text) each."""
    encode = backbone.encoder.encode
    encodings = [
        (index, encode(text, max_length=adapters[index].spec.max_length)) for index, text in texts
    ]
    prepared = [prepare(adapter, backbone) for adapter in adapters]
    expected = classify(backbone, backbone.pack(rows_of(prepared, encodings)), prepared)
    batch = batch_of(backbone, [(item, adapters[index], slots[index]) for index, item in encodings])
    outputs = answers_of(backbone, bank_of(backbone, adapters, slots), batch, tail=tail)
    shape = tailed(batch, tail)
    for position, original in enumerate(batch.order.tolist()):
        answer = expected[original]
        scores = outputs.scores[position].numpy()
        labels = len(answer.scores)
        np.testing.assert_allclose(scores[:labels], answer.scores, rtol=0, atol=SAME)
        assert not scores[labels:].any()
        assert batch.explained[position] == (len(answer.token_weights) > 0)
        if batch.explained[position]:
            weights = outputs.weights[batch.weighed(shape)[position]].numpy()
            np.testing.assert_allclose(weights, answer.token_weights, rtol=0, atol=SAME)


def tailed(batch: SlottedBatch, tail: int) -> BatchShape:
    """A larger shape."""
    need = batch.shape
    return BatchShape(
        rows=need.rows + tail,
        texts=need.texts + tail // 2,
        tokens=need.tokens + 3 * tail,
        expanded=tuple(item + 5 * tail for item in need.expanded),
        reads=need.reads + (5 * tail if batch.signature.mean else tail),
        longest=need.longest + 2 * tail,
        tiles=need.tiles + tail,
    )


def answers_of(backbone: Backbone, bank: SlotBank, batch: SlottedBatch, *, tail: int) -> Outputs:
    shape = tailed(batch, tail)
    # The previous content of the memory must not matter.
    array = np.full(array_size(shape, batch.signature), 7, dtype=np.int32)
    batch.write(array, shape)
    inputs = Inputs(
        torch.from_numpy(array).to(backbone.device), shape, batch.signature, batch.lengths
    )
    widths = Widths.of(batch.facts, hidden_size=backbone.hidden_size)
    outputs = run(backbone, bank, inputs, widths)
    return Outputs(outputs.scores.cpu(), outputs.weights.cpu())


FIELDS = st.fixed_dictionaries(
    {
        "labels": st.integers(2, 18).map(lambda count: tuple(f"l{i}" for i in range(count))),
        "prompt_length": st.integers(1, 5),
        "insertion_layer": st.integers(0, 2),
        "bottleneck": st.sampled_from([1, 8, 40]),
        "attention_size": st.sampled_from([4, 32]),
        "generator_input": st.sampled_from(GeneratorInput),
        "generator_pooling": st.sampled_from(GeneratorPooling),
        "final_activation": st.sampled_from(FinalActivation),
        "pooling": st.sampled_from(Pooling),
        "head": st.sampled_from(HeadKind),
        "activation": st.sampled_from(["softmax", "sigmoid"]),
        "calibration": st.sampled_from([Calibration(), Calibration(temperature=2.5)]),
    }
)


@pytest.mark.slow
@given(
    fields=st.lists(FIELDS, min_size=1, max_size=4),
    texts=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 62)), min_size=1, max_size=8),
    slots=st.permutations(range(6)),
    tail=st.sampled_from([0, 3, 40]),
)
@settings(max_examples=12, deadline=None)
def test_any_mixture_gets_the_answers_that_a_cpu_gives(
    backbone: Backbone,
    fields: list[dict[str, Any]],
    texts: list[tuple[int, int]],
    slots: list[int],
    tail: int,
) -> None:
    adapters = [make_adapter(backbone, seed=seed, **item) for seed, item in enumerate(fields)]
    check(
        backbone,
        adapters,
        slots[: len(adapters)],
        [(index % len(adapters), "win " * words) for index, words in texts],
        tail=tail,
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_every_family_runs_over_slots(name: str) -> None:
    backbone = backbone_of(name).to(device=DEVICE)
    adapters = [
        make_adapter(backbone, seed=seed, prompt_length=seed + 1, insertion_layer=seed % 2)
        for seed in range(3)
    ]
    texts = [(0, "hello you"), (2, "win " * 20), (1, ""), (0, "a free card")]
    check(backbone, adapters, (4, 0, 2), texts, tail=2)


# Triton's interpreter takes two minutes for one of them on a busy machine without AVX512.
@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    "name", ["bert", *(pytest.param(name, marks=pytest.mark.slow) for name in FAMILY_NAMES[1:])]
)
def test_adapters_of_all_kinds_share_a_batch(name: str) -> None:
    backbone = backbone_of(name).to(device=DEVICE)
    adapters = list(adapters_of_all_kinds(backbone).values())
    # Two tokens, also where each byte is one.
    words = "w " if name in ("gpt2", "roberta", "xlm-roberta") else "win now "
    texts = [(index, words * (index * 3 % 7)) for index in range(len(adapters))]
    slots = [(7 * index + 3) % len(adapters) for index in range(len(adapters))]
    check(backbone, adapters, slots, texts, tail=2)


def test_rows_longer_than_a_block_of_the_kernels(backbone: Backbone) -> None:
    adapters = [make_adapter(backbone, seed=seed) for seed in range(2)]
    prepared = [prepare(adapter, backbone) for adapter in adapters]
    assert backbone.max_tokens > 64 + 32
    encodings = [
        (index, backbone.encoder.encode("win now " * 60, max_length=length))
        for index, length in ((0, 128), (1, 97), (0, 3))
    ]
    expected = classify(backbone, backbone.pack(rows_of(prepared, encodings)), prepared)
    batch = batch_of(backbone, [(item, adapters[index], index) for index, item in encodings])
    bank = bank_of(backbone, adapters, (0, 1))
    outputs = answers_of(backbone, bank, batch, tail=0)
    for position, original in enumerate(batch.order.tolist()):
        np.testing.assert_allclose(
            outputs.scores[position].numpy(), expected[original].scores, rtol=0, atol=SAME
        )


def test_a_slot_can_be_refilled_and_its_neighbours_stay(backbone: Backbone) -> None:
    first, second, third = (make_adapter(backbone, seed=seed) for seed in range(3))
    bank = bank_of(backbone, (first, second), (0, 1))
    bank.write([(0, image_of(third, backbone))])
    encoding = backbone.encoder.encode("free card", max_length=64)
    for slot, adapter in ((0, third), (1, second)):
        batch = batch_of(backbone, [(encoding, adapter, slot)])
        outputs = answers_of(backbone, bank, batch, tail=0)
        prepared = prepare(adapter, backbone)
        packed = backbone.pack(rows_of([prepared], [(0, encoding)]))
        (alone,) = classify(backbone, packed, [prepared])
        np.testing.assert_allclose(outputs.scores[0].numpy(), alone.scores, rtol=0, atol=SAME)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_scores_that_are_not_finite_stay_in_their_row(backbone: Backbone) -> None:
    good, bad = (make_adapter(backbone, seed=seed) for seed in range(2))
    tensors = dict(bad.tensors)
    tensors["head.out.weight"] = torch.full_like(tensors["head.out.weight"], 3e38)
    bad = replace(bad, tensors=tensors)
    encoding = backbone.encoder.encode("win", max_length=64)
    batch = batch_of(backbone, [(encoding, item, slot) for slot, item in enumerate((good, bad))])
    bank = bank_of(backbone, (good, bad), (0, 1))
    outputs = answers_of(backbone, bank, batch, tail=1)
    assert outputs.scores[0].isfinite().all()
    assert not outputs.scores[1].isfinite().all()


@pytest.mark.slow
def test_more_labels_than_one_block_takes() -> None:
    backbone = make_backbone(hidden_size=16).to(device=DEVICE)
    labels = tuple(f"l{index}" for index in range(1500))
    adapters = [make_adapter(backbone), make_adapter(backbone, seed=1, labels=labels)]
    check(backbone, adapters, (0, 1), [(0, "win"), (1, "now"), (1, "")])


def test_an_image_says_where_each_matrix_is(backbone: Backbone) -> None:
    adapter = make_adapter(backbone, head=HeadKind.MLP, bottleneck=5)
    image: AdapterImage = image_of(adapter, backbone)
    n, t = backbone.hidden_size, adapter.spec.prompt_length
    widths = (Column.DOWN_WIDTH, Column.UP_WIDTH, Column.DENSE_WIDTH, Column.OUT_WIDTH)
    assert [image.values[column] for column in widths] == [5, t * n, n, 2]
    assert all(start % 16 == 0 for start in image.starts.values())

    def floats(column: Column, size: int) -> torch.Tensor:
        start = image.starts[column]
        return image.memory[start : start + 4 * size].view(torch.float32)

    up, bias = floats(Column.UP, 5 * t * n + t * n).split((5 * t * n, t * n))
    assert torch.equal(up.view(5, t * n), adapter.tensors["generator.up.weight"])
    assert torch.equal(bias, adapter.tensors["generator.up.bias"])
    # The folded query matrix takes most of it; a head alone takes what it needs.
    assert image.nbytes >= 4 * n * n
    head = make_adapter(backbone, prompt=None)
    assert image_of(head, backbone).nbytes == 4 * (2 * n + 2) + 8
    assert Column.DENSE not in image_of(head, backbone).starts


def test_a_skipped_row_writes_nothing(backbone: Backbone) -> None:
    bank = bank_of(backbone, (make_adapter(backbone),), (0,))
    states = torch.ones(2, backbone.hidden_size, device=backbone.device)
    slots = torch.tensor([-1, 0], dtype=torch.int32, device=backbone.device)
    sequence = torch.zeros(8, backbone.hidden_size, device=backbone.device)
    starts = torch.tensor([0, 4], dtype=torch.int32, device=backbone.device)
    bottleneck = kernels.bottlenecks(states, slots, bank.table, width=8)
    kernels.write_prompts(
        bottleneck, slots, bank.table, sequence, starts, width=3 * backbone.hidden_size
    )
    written = sequence.abs().sum(1) > 0
    assert written.tolist() == [False] * 4 + [True] * 3 + [False]
