"""What slots change inside a layer equals what one adapter changes at a time.

Without a CUDA device Triton interprets the kernels (see conftest.py).
"""

from typing import Any

import numpy as np
import pytest
import torch
from msgspec import structs
from torch import Tensor
from torch.nn import functional

pytest.importorskip("triton", reason="Triton is not installed")

from adapters.backbone.model import Backbone
from adapters.format.files import Adapter
from adapters.format.spec import LoraTuning, Site, VectorTuning
from adapters.layers import plain
from adapters.layers.float8 import Float8Layer
from adapters.layers.fused import FusedLayer
from adapters.layers.narrow import Handover
from adapters.packed.layout import Layout
from adapters.packed.tuning import UniformTuning, tuning_weights
from adapters.slots import tuning
from adapters.slots.bank import SlotBank, image_of
from adapters.slots.batch import SlottedBatch, facts_of
from adapters.slots.extents import Places, SlottedExtents
from adapters.slots.tuning import Sizes, SlotLayerTuning, SlotTuning
from tests.support import float8
from tests.support.families import (
    backbone_from,
    backbone_of,
    config_of,
    model_from,
    tokenizer_of,
)
from tests.support.tiny_models import make_adapter

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FLOAT32_ERROR = 1e-5
# Of the norm of a layer's output. These tiny layers are wide open: rounding shows.
FLOAT8_ERROR = 0.15
LINEAR = tuple(site for site in Site if site is not Site.ACTIVATED)
# By slot; slot 1 stays empty. Rows of a slot are neighbours.
WORDS = {0: (3, 0), 2: (1,), 3: (9,), 4: (35, 40), 5: (0,), 6: (4,)}

# Padding, and room for prompts, hold what was in memory before. Nobody reads what comes of it.
pytestmark = pytest.mark.filterwarnings(
    "ignore:(overflow|invalid value) encountered:RuntimeWarning"
)


def tunings_of(backbone: Backbone) -> dict[int, Any]:
    """By slot: vectors, IA3's, LoRA of all sites and of some, and none."""
    f = backbone.intermediate_size
    common: dict[str, Any] = {"intermediate_size": f}
    return {
        0: VectorTuning(layers=(0, backbone.layers), **common),
        2: None,
        3: VectorTuning(layers=(1, 3), activated=True, **common),
        4: LoraTuning(layers=(0, backbone.layers), rank=5, scaling=0.7, sites=LINEAR, **common),
        5: LoraTuning(layers=(1, 2), rank=17, scaling=2, sites=(Site.QUERY, Site.VALUE), **common),
        6: LoraTuning(layers=(0, 2), rank=1, scaling=1, sites=(Site.DOWN,), **common),
    }


class Case:
    """A batch over slots with these tunings, and each row's own."""

    def __init__(self, backbone: Backbone, slots: tuple[int, ...]) -> None:
        self.backbone = backbone
        tunings = tunings_of(backbone)
        self.adapters = {
            slot: _calmed(make_adapter(backbone, seed=slot, prompt=None, tuning=tunings[slot]))
            for slot in slots
        }
        # Keeps the memory alive that the table points to.
        self.bank = bank = SlotBank(8, device=DEVICE)
        bank.write([(slot, image_of(item, backbone)) for slot, item in self.adapters.items()])
        self.rows = [slot for slot in slots for _ in WORDS[slot]]
        texts = ["win " * words for slot in slots for words in WORDS[slot]]
        encode = backbone.encoder.encode
        batch = SlottedBatch(
            [encode(text, max_length=backbone.max_tokens) for text in texts],
            np.array(self.rows),
            np.array([facts_of(self.adapters[slot].spec) for slot in self.rows]),
        )
        shape = structs.replace(batch.shape, tiles=batch.shape.tiles + 2)
        self.layout = Layout(batch.lengths[0], DEVICE)
        sections = _sections(batch, shape)
        self.signature = batch.signature
        owners = sections.get("text.owners")
        places = Places(sections["text.tiles"], owners, sections["slots"])
        self.reads = sections["reads"].long()
        reads = Places(sections["reads.tiles"], sections.get("reads.owners"), sections["slots"])
        sizes = Sizes(backbone.hidden_size, backbone.intermediate_size)
        self.tuning = SlotTuning(bank.table, batch.signature, sizes, reads)
        self.extents = SlottedExtents(
            self.layout.cumulative, self.layout.longest, batch.lengths[0], places
        )

    def alone(self, layer: int, states: Tensor, *, read: bool = False) -> Tensor:
        """Row by row, each with its adapter's changes alone."""
        module = self.backbone._layers[layer]
        parts = self.backbone.family.parts(module)
        outputs = []
        for slot, row in zip(self.rows, states.split(self.layout.lengths.tolist()), strict=True):
            layout = Layout(np.array([len(row)]), DEVICE)
            adapter = self.adapters[slot]
            changes = None
            if adapter.spec.tuning is not None:
                tensors = {name: item.to(DEVICE) for name, item in adapter.tensors.items()}
                weights = tuning_weights(adapter.spec.tuning, tensors)
                changes = UniformTuning(weights).at(layer, layout)
            if changes is None:
                output = module(row.clone()[None], attention_mask=None, layout=layout)[0]
            else:
                output = plain.forward(parts, row.clone(), layout, changes)
            outputs.append(output[:1] if read else output)
        return torch.cat(outputs)


def _calmed(adapter: Adapter) -> Adapter:
    """Smaller changes: those of large ones grow to large errors of rounding in the softmax."""
    return Adapter(
        adapter.spec,
        {
            name: tensor * 0.3 if name.startswith("tuning.") else tensor
            for name, tensor in adapter.tensors.items()
        },
    )


def _sections(batch: SlottedBatch, shape: Any) -> dict[str, Tensor]:
    from adapters.slots.batch import array_size, section_slices

    array = np.full(array_size(shape, batch.signature), 7, dtype=np.int32)
    batch.write(array, shape)
    whole = torch.from_numpy(array).to(DEVICE)
    return {name: whole[place] for name, place in section_slices(shape, batch.signature).items()}


MIXTURES = [(0, 2, 3, 4, 5, 6), (0, 2, 3), (4, 5), (6,)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "slots"),
    [
        ("bert", MIXTURES[0]),
        *(pytest.param("bert", slots, marks=pytest.mark.slow) for slots in MIXTURES[1:]),
        *(
            pytest.param(family, slots, marks=pytest.mark.slow)
            for family in ("distilbert", "gpt2")
            for slots in MIXTURES
        ),
    ],
)
@torch.inference_mode()
def test_every_row_is_changed_by_its_own_adapter(family: str, slots: tuple[int, ...]) -> None:
    case = Case(backbone_of(family).to(device=DEVICE), slots)
    random = torch.Generator().manual_seed(0)
    n = case.backbone.hidden_size
    states = torch.randn(case.layout.tokens, n, generator=random).to(DEVICE)
    # A layer that all tune, and one beyond some ranges.
    for layer in (1, 2):
        expected = case.alone(layer, states)
        changes = case.tuning.at(layer, case.extents)
        module = case.backbone._layers[layer]
        parts = case.backbone.family.parts(module)
        assert changes is not None
        output = plain.forward(parts, states.clone(), case.extents, changes)
        same(output, expected)
        if family == "bert":
            fused = FusedLayer(module.layer)
            same(fused.forward_tuned(states.clone(), case.extents, changes), expected)
            output = fused.read_tuned(states.clone(), case.reads, case.extents, changes)
            same(output, case.alone(layer, states, read=True))


@pytest.mark.slow
@torch.inference_mode()
def test_a_float8_layer_gives_a_row_the_same_bits_beside_any_adapters(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if DEVICE.type == "cpu":
        float8.round_as_devices_do(monkeypatch)
    config = config_of("bert")
    config.hidden_size, config.intermediate_size = 48, 80
    backbone = backbone_from(model_from(config), tokenizer_of("bert")).to(device=DEVICE)
    n, layer = backbone.hidden_size, 1
    narrow = Float8Layer(backbone._layers[layer].layer, Handover())
    random = torch.Generator().manual_seed(0)
    rows = {
        slot: [torch.randn(words + 2, n, generator=random).to(DEVICE) for words in WORDS[slot]]
        for slot in WORDS
    }
    seen: dict[int, Tensor] = {}
    for slots in MIXTURES:
        case = Case(backbone, slots)
        states = torch.cat([row for slot in slots for row in rows[slot]])
        changes = case.tuning.at(layer, case.extents)
        assert changes is not None
        output = narrow.forward_tuned(states.clone(), case.extents, changes)
        expected = case.alone(layer, states)
        assert float((output - expected).norm() / expected.norm()) < FLOAT8_ERROR
        read = narrow.read_tuned(states.clone(), case.reads, case.extents, changes)
        expected = case.alone(layer, states, read=True)
        assert float((read - expected).norm() / expected.norm()) < FLOAT8_ERROR
        sizes = [sum(len(row) for row in rows[slot]) for slot in slots]
        for slot, own in zip(slots, output.split(sizes), strict=True):
            assert torch.equal(seen.setdefault(slot, own), own), slot
    # The row of the slot that changes nothing, with no adapter in the batch.
    (row,) = rows[2]
    assert torch.equal(narrow.forward(row, Layout(np.array([len(row)]), DEVICE)), seen[2])


def same(output: Tensor, expected: Tensor) -> None:
    # GPT-2's states are not normalised: errors grow with them.
    torch.testing.assert_close(output, expected, rtol=FLOAT32_ERROR, atol=FLOAT32_ERROR)


# One-token rows of many slots in one block; blocks with one, two and more slots; padding inside a
# block and blocks of nothing else; slots that hold no adapter, no vectors, or another range.
@pytest.mark.parametrize("many", [False, True])
@torch.inference_mode()
def test_blocks_of_positions_are_changed_slot_by_slot(
    many: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "_MANY_POSITIONS", 1 if many else 10**6)
    backbone = backbone_of("bert").to(device=DEVICE)
    case = Case(backbone, (0, 2, 3, 4))
    lengths = {0: 1, 2: 1, 3: 30, 4: 5, 5: 1, 7: 20}
    owners = [slot for slot, length in lengths.items() for _ in range(length)]
    owners += [-1] * 23
    flat = torch.tensor(owners, dtype=torch.int32, device=DEVICE)
    places = Places(flat, flat, flat)
    sizes = Sizes(backbone.hidden_size, backbone.intermediate_size)
    n, f = sizes.hidden, sizes.intermediate
    changes = SlotLayerTuning(case.bank.table, case.signature, sizes, 1, places, places)
    random = torch.Generator().manual_seed(1)
    states = torch.randn(len(owners), f, generator=random).to(DEVICE)
    output = changes.up_to_activated(states.clone())
    for position, slot in enumerate(owners):
        expected = states[position]
        if slot < 0:
            assert torch.equal(output[position], expected)
            continue
        tensors = case.adapters[slot].tensors if slot in case.adapters else {}
        if (scale := tensors.get("tuning.scale")) is not None:
            bias, index = tensors["tuning.bias"], 0 if slot == 3 else 1
            here = slice(3 * n, 3 * n + f)
            expected = expected * (1 + scale[index, here].to(DEVICE))
            expected = expected + bias[index, here].to(DEVICE)
        expected = functional.gelu(expected)
        if (activated := tensors.get("tuning.activated")) is not None:
            expected = expected * (1 + activated[0].to(DEVICE))
        same(output[position], expected)
