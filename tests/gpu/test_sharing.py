"""On a CUDA device: rows with the same text share their lower layers, and answer as if alone."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from adapters.adapter import Classification, classify, prepare, rows_of
from adapters.backbone.model import Backbone
from service.engine.interface import Entry, RowResult, cost_of
from tests.support.engine_harness import EngineHarness
from tests.support.families import FAMILY_NAMES, backbone_of
from tests.support.kinds import serving_kinds
from tests.support.tiny_models import make_adapter, make_backbone

# A test that hangs fails.
pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]

# As in test_kinds.py.
BOUNDS = {torch.float32: 2e-5, torch.bfloat16: 0.05, torch.float16: 0.01}
TEXT, OTHER = "win now free card " * 3, "hello you good bad " * 6


@asynccontextmanager
async def serving(
    root: Path, backbone: Backbone, *, sharing: bool = True
) -> AsyncIterator[EngineHarness]:
    """A started engine with an adapter of every kind, and eight as `fit` makes them."""
    async with serving_kinds(root, backbone, max_batch_tokens=8192, sharing=sharing) as harness:
        for seed in range(8):
            layer = backbone.layers // 2
            adapter = make_adapter(
                backbone,
                seed=seed,
                prompt_length=10,
                insertion_layer=layer,
                generator_input="hidden",
            )
            harness.add(f"usual-{seed}", adapter)
        yield harness


def backbone_for(dtype: torch.dtype) -> Backbone:
    """Heads wide enough for the flash kernels."""
    return make_backbone(hidden_size=64).to(device="cuda", dtype=dtype)


def kinds_of(harness: EngineHarness) -> list[str]:
    return [name for name in harness.adapters if name not in "abc" and "usual" not in name]


def entry_of(harness: EngineHarness, name: str, text: str) -> Entry:
    spec = harness.adapters[name].spec
    encoding = harness.backbone.encoder.encode(text, max_length=min(40, spec.max_length))
    return Entry(harness.keys[name], encoding, cost_of(encoding, spec), explain=True)


def alone(harness: EngineHarness, entry: Entry) -> Classification:
    """Through the packed pass."""
    prepared = [prepare(harness.adapters[entry.adapter.name], harness.backbone)]
    batch = harness.backbone.pack(rows_of(prepared, [(0, entry.encoding)]))
    return classify(harness.backbone, batch, prepared)[0]


def compare(
    harness: EngineHarness, entries: Sequence[Entry], rows: Sequence[RowResult], bound: float
) -> None:
    for entry, row in zip(entries, rows, strict=True):
        other, name = alone(harness, entry), entry.adapter.name
        np.testing.assert_allclose(row.scores, other.scores, rtol=0, atol=bound, err_msg=name)
        assert row.token_weights is not None
        np.testing.assert_allclose(
            row.token_weights, other.token_weights, rtol=0, atol=bound, err_msg=name
        )


async def mixed(harness: EngineHarness, bound: float) -> None:
    """One text under all kinds, twice under some, and a second text that some read alone."""
    names = kinds_of(harness)
    entries = [entry_of(harness, name, TEXT) for name in [*names, *names[::3]]]
    entries += [entry_of(harness, name, OTHER) for name in names[::4]]
    rows = (await harness.engine.predict(entries)).rows
    compare(harness, entries, rows, bound)
    shared = {
        entry.adapter.name
        for entry, row in zip(entries[: len(names)], rows, strict=False)
        if row.shared
    }
    # One of them runs the layers for the others.
    assert len({"head", "head-of-two-layers", "lpt", "idspam"} - shared) <= 1
    # These change the embeddings or the first layer, and come once.
    changed = {"vectors", "lora", "dept", "idspam-vectors"} - set(names[::3])
    assert changed
    assert not changed & shared


@pytest.mark.parametrize("dtype", list(BOUNDS), ids=str)
async def test_one_text_under_all_kinds_is_answered_as_alone(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    async with serving(tmp_path, backbone_for(dtype)) as harness:
        await mixed(harness, BOUNDS[dtype])


@pytest.mark.parametrize("family", FAMILY_NAMES)
async def test_every_family_shares_in_float32(tmp_path: Path, family: str) -> None:
    async with serving(tmp_path, backbone_of(family).to(device="cuda")) as harness:
        await mixed(harness, BOUNDS[torch.float32])


@pytest.mark.parametrize("texts", [1, 24])
async def test_shared_batches_are_graphs_from_the_first_and_agree_with_unshared_ones(
    tmp_path: Path, texts: int
) -> None:
    backbone = backbone_for(torch.bfloat16)
    answers = []
    for sharing in (True, False):
        async with serving(tmp_path / str(sharing), backbone, sharing=sharing) as harness:
            entries = [
                # Eight of the shortest are more than a small batch, which shares nothing.
                entry_of(harness, f"usual-{seed}", "win " * (21 + text % 8) + "free " * (text // 8))
                for text in range(texts)
                for seed in range(8)
            ]
            # First in the graph of a larger bucket, then in one for shared texts.
            for _ in range(20):
                rows = (await harness.engine.predict(entries)).rows
                assert harness.recorder.batches[-1].graphs == 1
                assert sum(row.shared for row in rows) == (7 * texts if sharing else 0)
            answers.append(rows)
            compare(harness, entries, rows, BOUNDS[torch.bfloat16])
    for one, other in zip(*answers, strict=True):
        np.testing.assert_allclose(one.scores, other.scores, rtol=0, atol=BOUNDS[torch.bfloat16])
