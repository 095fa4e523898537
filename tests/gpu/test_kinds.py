"""On a CUDA device: adapters of every kind in the same batch, as the packed pass answers them."""

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import pytest
import torch

from adapters.adapter import Classification, Float32, classify, prepare, rows_of
from adapters.backbone.model import Backbone
from adapters.embedding import embedder
from adapters.format.spec import HeadKind
from service.engine.interface import EMBEDDING, Entry, RowResult, cost_of
from tests.support.engine_harness import EngineHarness
from tests.support.families import FAMILY_NAMES, backbone_of
from tests.support.kinds import serving_kinds
from tests.support.tiny_models import make_adapter, make_backbone

# A test that hangs fails.
pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]

# float32: sums are in another order. bfloat16: eight bits over three wide random layers.
BOUNDS = {torch.float32: 2e-5, torch.bfloat16: 0.05, torch.float16: 0.01}
TEXTS = ("win now", "", "free card " * 14, "hello you good bad", "call " * 9)


def backbone_for(dtype: torch.dtype) -> Backbone:
    """Heads wide enough for the flash kernels."""
    return make_backbone(hidden_size=64).to(device="cuda", dtype=dtype)


class Answer(Protocol):
    """Of either pass."""

    @property
    def scores(self) -> Float32: ...
    @property
    def token_weights(self) -> Float32 | None: ...


def entries_of(harness: EngineHarness, names: Sequence[str], *, texts: int = 3) -> list[Entry]:
    return [
        _entry(harness, name, TEXTS[(index + text) % len(TEXTS)])
        for text in range(texts)
        for index, name in enumerate(names)
    ]


def _entry(harness: EngineHarness, name: str, text: str) -> Entry:
    spec = harness.adapters[name].spec
    encoding = harness.backbone.encoder.encode(text, max_length=spec.max_length)
    return Entry(harness.keys[name], encoding, cost_of(encoding, spec), explain=True)


def packed(harness: EngineHarness, entries: Sequence[Entry]) -> list[Classification]:
    """Each text alone through the packed pass."""
    answers = []
    for entry in entries:
        prepared = [prepare(harness.adapters[entry.adapter.name], harness.backbone)]
        batch = harness.backbone.pack(rows_of(prepared, [(0, entry.encoding)]))
        answers += classify(harness.backbone, batch, prepared)
    return answers


def compare(
    entries: Sequence[Entry],
    rows: Sequence[RowResult],
    expected: Sequence[Answer],
    bound: float,
) -> None:
    for entry, row, other in zip(entries, rows, expected, strict=True):
        name = entry.adapter.name
        np.testing.assert_allclose(row.scores, other.scores, rtol=0, atol=bound, err_msg=name)
        assert row.token_weights is not None
        assert other.token_weights is not None
        np.testing.assert_allclose(
            row.token_weights, other.token_weights, rtol=0, atol=bound, err_msg=name
        )


def kinds_of(harness: EngineHarness) -> list[str]:
    return [name for name in harness.adapters if name not in "abc"]


@pytest.mark.parametrize("dtype", list(BOUNDS), ids=str)
async def test_a_batch_of_all_kinds_is_answered_as_by_the_packed_pass(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    async with serving_kinds(tmp_path, backbone_for(dtype)) as harness:
        entries = entries_of(harness, kinds_of(harness))
        before = len(harness.recorder.batches)
        rows = (await harness.engine.predict(entries)).rows
        assert len(harness.recorder.batches) == before + 1
        assert harness.recorder.batches[-1].adapters == len(kinds_of(harness))
        compare(entries, rows, packed(harness, entries), BOUNDS[dtype])


@pytest.mark.parametrize("family", FAMILY_NAMES)
async def test_every_family_serves_all_kinds_in_float32(tmp_path: Path, family: str) -> None:
    backbone = backbone_of(family).to(device="cuda")
    async with serving_kinds(tmp_path, backbone) as harness:
        entries = entries_of(harness, kinds_of(harness), texts=2)
        rows = (await harness.engine.predict(entries)).rows
        compare(entries, rows, packed(harness, entries), BOUNDS[torch.float32])


async def test_batch_mates_do_not_matter(tmp_path: Path) -> None:
    async with serving_kinds(tmp_path, backbone_for(torch.bfloat16)) as harness:
        entries = entries_of(harness, kinds_of(harness), texts=1)
        together = (await harness.engine.predict(entries)).rows
        alone = [(await harness.engine.predict([entry])).rows[0] for entry in entries]
        compare(entries, together, alone, BOUNDS[torch.bfloat16])


async def test_a_mixture_that_comes_often_is_captured_and_its_graph_agrees(tmp_path: Path) -> None:
    async with serving_kinds(tmp_path, backbone_for(torch.bfloat16)) as harness:
        # Graphs are captured for heads of one layer.
        linear = [
            name
            for name in kinds_of(harness)
            if harness.adapters[name].spec.head.kind is HeadKind.LINEAR
        ]
        for names in (["vectors", "lora", "head"], linear):
            entries = entries_of(harness, names)
            eager = (await harness.engine.predict(entries)).rows
            assert harness.recorder.batches[-1].graphs == 0
            for _ in range(20):
                rows = (await harness.engine.predict(entries)).rows
            assert harness.recorder.batches[-1].graphs == 1
            compare(entries, rows, eager, BOUNDS[torch.bfloat16])


async def test_the_default_with_vectors_is_captured_at_the_start(tmp_path: Path) -> None:
    backbone = backbone_for(torch.bfloat16)
    async with serving_kinds(tmp_path, backbone) as harness:
        for name, vectors in (("usual", False), ("tuned", True)):
            usual = make_adapter(
                backbone,
                prompt_length=10,
                # As `fit` has it.
                insertion_layer=round(2 / 3 * backbone.layers) if vectors else backbone.layers // 2,
                generator_input="hidden",
                tuning=harness.adapters["vectors"].spec.tuning if vectors else None,
            )
            harness.add(name, usual)
            entries = entries_of(harness, [name])
            rows = (await harness.engine.predict(entries)).rows
            assert harness.recorder.batches[-1].graphs == 1
            compare(entries, rows, packed(harness, entries), BOUNDS[torch.bfloat16])


async def test_slots_are_used_again_by_other_kinds(tmp_path: Path) -> None:
    async with serving_kinds(
        tmp_path, backbone_for(torch.bfloat16), max_active_adapters=3
    ) as harness:
        names = kinds_of(harness)
        entries = [entries_of(harness, [names[index * 7 % len(names)]])[0] for index in range(150)]
        expected = packed(harness, entries)
        answers = await asyncio.gather(*(harness.engine.predict([entry]) for entry in entries))
        compare(entries, [answer.rows[0] for answer in answers], expected, 0.05)
        assert max(report.adapters for report in harness.recorder.batches) <= 3


@pytest.mark.parametrize("dtype", list(BOUNDS), ids=str)
async def test_vectors_share_batches_with_adapters(tmp_path: Path, dtype: torch.dtype) -> None:
    async with serving_kinds(tmp_path, backbone_for(dtype)) as harness:
        backbone = harness.backbone
        encodings = [backbone.encoder.encode(text, max_length=64) for text in TEXTS]
        vectors = [Entry(EMBEDDING, encoding, len(encoding)) for encoding in encodings]
        others = entries_of(harness, kinds_of(harness))
        mixed = [entry for pair in zip(vectors, others, strict=False) for entry in pair]
        rows = (await harness.engine.predict(mixed)).rows
        adapter = embedder(backbone)
        batch = backbone.pack(rows_of([adapter], [(0, encoding) for encoding in encodings]))
        expected = classify(backbone, batch, [adapter])
        for row, other in zip(rows[::2], expected, strict=True):
            np.testing.assert_allclose(row.scores, other.scores, rtol=0, atol=BOUNDS[dtype])
        asked = others[: len(vectors)]
        compare(asked, rows[1::2], packed(harness, asked), BOUNDS[dtype])
