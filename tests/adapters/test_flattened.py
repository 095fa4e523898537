"""A flattened and restored adapter is the same to the bit, in memory of its own."""

import json

import numpy as np
import pytest
import torch

from adapters.adapter import classify, prepare, rows_of
from adapters.backbone.model import Backbone
from adapters.flattened import flatten, restore
from adapters.slots.bank import AdapterImage, image_of
from tests.support.kinds import adapters_of_all_kinds
from tests.support.tiny_models import make_backbone

TEXTS = ("", "free card now", "hello good you " * 9)
CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def typed(request: pytest.FixtureRequest) -> Backbone:
    return make_backbone().to(dtype=request.param)


def test_every_kind_of_adapter_answers_as_before_to_the_bit(typed: Backbone) -> None:
    for name, adapter in adapters_of_all_kinds(typed).items():
        prepared = prepare(adapter, typed)
        layout, memory = flatten(prepared)
        again = restore(adapter.spec, json.loads(json.dumps(layout)), memory, device=CPU)
        rows = [(0, typed.encoder.encode(text, max_length=64)) for text in TEXTS]
        both = [
            classify(typed, typed.pack(rows_of([each], rows)), [each]) for each in (prepared, again)
        ]
        for one, other in zip(*both, strict=True):
            assert np.array_equal(one.scores, other.scores), name
            assert np.array_equal(one.token_weights, other.token_weights), name
        assert again.shape == prepared.shape
        assert again.nbytes == prepared.nbytes <= len(memory)


def test_flattening_again_gives_the_same_bytes(typed: Backbone) -> None:
    for name, adapter in adapters_of_all_kinds(typed).items():
        layout, memory = flatten(prepare(adapter, typed))
        again = flatten(restore(adapter.spec, layout, memory, device=CPU))
        assert again[0] == layout, name
        assert torch.equal(again[1], memory), name


def test_images_of_slots_come_back_as_they_were(typed: Backbone) -> None:
    for name, adapter in adapters_of_all_kinds(typed).items():
        image = image_of(adapter, typed)
        layout = json.loads(json.dumps(image.layout))
        again = AdapterImage.restore(adapter.spec, layout, image.memory)
        assert (again.starts, again.values) == (image.starts, image.values), name


def test_memory_that_ends_too_early_is_refused(typed: Backbone) -> None:
    adapter = adapters_of_all_kinds(typed)["idspam+vectors"]
    layout, memory = flatten(prepare(adapter, typed))
    with pytest.raises((RuntimeError, ValueError)):
        restore(adapter.spec, layout, memory[:-64], device=CPU)
    image = image_of(adapter, typed)
    with pytest.raises(ValueError, match="outside"):
        AdapterImage.restore(adapter.spec, image.layout, image.memory[:64])
