"""An adapter's changes inside the layers, against hooks on the modules of `transformers`."""

from typing import Any

import pytest
import torch
from torch import Tensor

from adapters.adapter import prepare
from adapters.backbone.model import Backbone
from adapters.errors import InvalidAdapter
from adapters.format.files import Adapter
from adapters.format.spec import AdapterSpec, LoraTuning, Site, Tuning, VectorTuning
from adapters.packed.packing import Row, RowShape
from adapters.packed.tuning import MixedTuning, UniformTuning, tuning_weights
from tests.support.families import (
    FAMILY_NAMES,
    HIDDEN,
    LAYERS,
    backbone_from,
    model_of,
    tokenizer_of,
)
from tests.support.reference import tokenize, tuned
from tests.support.tiny_models import make_adapter, make_spec

F = 40  # the feed-forward part of the tiny BERT
LINEAR_MAPS = tuple(site for site in Site if site is not Site.ACTIVATED)
KINDS: dict[str, dict[str, Any]] = {
    "vectors": {"layers": (0, LAYERS)},
    "ia3": {"layers": (1, LAYERS), "activated": True},
    "lora": {
        "layers": (0, LAYERS - 1),
        "rank": 3,
        "scaling": 0.7,
        "sites": (Site.QUERY, Site.VALUE),
    },
    "lora everywhere": {"layers": (1, LAYERS), "rank": 2, "scaling": 1.5, "sites": LINEAR_MAPS},
}
TEXTS = ("good", "the card is not free to win", "")


def tuning_of(kind: str, f: int = F) -> Tuning:
    fields = KINDS[kind]
    return (LoraTuning if "rank" in fields else VectorTuning)(intermediate_size=f, **fields)


def tensors_of(tuning: Tuning, *, seed: int = 1) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=random).mul(0.3).requires_grad_()
        for name, shape in tuning.shapes(HIDDEN).items()
    }


def spec_of(backbone: Backbone, tuning: Tuning) -> AdapterSpec:
    return make_spec(backbone, prompt=None, tuning=tuning)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_states_and_gradients_equal_those_of_the_plain_model_with_hooks(
    family: str, kind: str
) -> None:
    plain, tokenizer = model_of(family), tokenizer_of(family)
    backbone = backbone_from(plain, tokenizer)
    tuning = tuning_of(kind, backbone.intermediate_size)
    tensors = tensors_of(tuning)
    encodings = [backbone.encoder.encode(text, max_length=16) for text in TEXTS]
    batch = backbone.pack([Row(encoding, RowShape(), 0) for encoding in encodings])
    changes = UniformTuning(tuning_weights(tuning, tensors))
    states = backbone.forward(batch, {}, tuning=changes).states
    expected = []
    with tuned(plain, spec_of(backbone, tuning), tensors):
        for index in batch.order.tolist():
            inputs = tokenize(plain, tokenizer, TEXTS[index], None, max_length=16)
            expected.append(plain(**inputs).last_hidden_state[0, -1 if family == "gpt2" else 0])
    reference = torch.stack(expected)
    torch.testing.assert_close(states, reference, rtol=1e-5, atol=1e-5)
    weights = list(tensors.values())
    ours = torch.autograd.grad(states.square().sum(), weights)
    theirs = torch.autograd.grad(reference.square().sum(), weights)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
        assert one.abs().max() > 0
    with torch.inference_mode():
        in_place = backbone.forward(
            batch, {}, tuning=UniformTuning(tuning_weights(tuning, tensors))
        ).states
    torch.testing.assert_close(in_place, states.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_a_mixed_batch_gives_each_row_what_its_adapter_alone_gives(family: str) -> None:
    """Rows of equal and of other lengths, tuned in all ways or not, beside each other."""
    backbone = backbone_from(model_of(family), tokenizer_of(family))
    weights = {
        index: tuning_weights(tuning, tensors_of(tuning, seed=index))
        for index, tuning in enumerate(
            tuning_of(kind, backbone.intermediate_size) for kind in (*KINDS, *KINDS)
        )
    }
    adapters = len(weights) + 1  # The last one has no tuning.
    texts = ("good", "good card", "the card is not free to win")
    rows = [
        Row(backbone.encoder.encode(texts[number % 3], max_length=16), RowShape(), owner)
        for number, owner in enumerate((*range(adapters), *reversed(range(adapters))) * 2)
    ]
    batch = backbone.pack(rows)
    with torch.inference_mode():
        together = backbone.forward(batch, {}, tuning=MixedTuning(batch, weights)).states
        for state, index in zip(together, batch.order.tolist(), strict=True):
            owner = rows[index].adapter
            changes = UniformTuning(weights[owner]) if owner in weights else None
            alone = backbone.forward(backbone.pack([rows[index]]), {}, tuning=changes).states[0]
            torch.testing.assert_close(state, alone, rtol=1e-5, atol=1e-5)


def test_a_scaling_that_makes_weights_infinite_is_refused() -> None:
    backbone = backbone_from(model_of("bert"), tokenizer_of("bert"))
    tuning = LoraTuning(
        layers=(0, 1), intermediate_size=F, rank=1, scaling=1e6, sites=(Site.QUERY,)
    )
    adapter = make_adapter(backbone, prompt=None, tuning=tuning)
    prepare(adapter, backbone)
    huge = {
        name: torch.full_like(tensor, 1e35) if name == "tuning.query.b" else tensor
        for name, tensor in adapter.tensors.items()
    }
    with pytest.raises(InvalidAdapter, match="tuning: not finite once scaled and cast"):
        prepare(Adapter(adapter.spec, huge), backbone)


def test_layers_out_of_the_tuned_range_run_as_without_a_tuning() -> None:
    backbone = backbone_from(model_of("bert"), tokenizer_of("bert"))
    tuning = VectorTuning(layers=(1, 2), intermediate_size=F)
    changes = UniformTuning(tuning_weights(tuning, tensors_of(tuning)))
    batch = backbone.pack([Row(backbone.encoder.encode("good", max_length=8), RowShape(), 0)])
    tuned_layers = [changes.at(layer, batch.layout) is not None for layer in range(LAYERS)]
    assert tuned_layers == [False, True, False, False]
    lower = backbone.trunk(batch, 1, tuning=changes).hidden
    assert torch.equal(lower, backbone.trunk(batch, 1).hidden)
    assert not torch.equal(
        backbone.trunk(batch, 2, tuning=changes).hidden, backbone.trunk(batch, 2).hidden
    )


def test_vectors_keep_their_precision_in_a_backbone_of_another_type() -> None:
    tuning = VectorTuning(layers=(0, 1), intermediate_size=4)
    tensors = {name: torch.full(shape, 5e-3) for name, shape in tuning.shapes(4).items()}
    weights = tuning_weights(tuning, tensors).cast(torch.bfloat16)
    changes = UniformTuning(weights).at(0, None)  # type: ignore[arg-type]  # reads no layout
    assert changes is not None
    output = torch.full((1, 4), 200, dtype=torch.bfloat16)
    with torch.inference_mode():
        # In bfloat16 a factor of 1.005 is 1.0078, which gives 202.
        assert changes.up(output, output.clone()).tolist() == [[201.0] * 4]


def test_dropout_changes_the_inputs_of_lora_only() -> None:
    tuning = tuning_of("lora")
    weights = tuning_weights(tuning, tensors_of(tuning))
    changes = UniformTuning(weights, dropout=1 - 1e-6).at(0, None)  # type: ignore[arg-type]  # reads no layout
    assert changes is not None
    inputs, output = torch.ones(2, HIDDEN), torch.ones(2, 3 * HIDDEN)
    assert torch.equal(changes.projection(inputs, output), output)
