"""BERT-like layers through oneDNN give the same states as through `transformers`."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from adapters.backbone.model import Backbone
from adapters.format.spec import LoraTuning, Site, Tuning, VectorTuning
from adapters.layers import plain
from adapters.layers.bert import BertLayer
from adapters.layers.onednn import OneDnnLayer, ReorderedLinear, pad
from adapters.packed.layout import Layout
from adapters.packed.tuning import UniformTuning, tuning_weights
from tests.support.families import (
    HIDDEN,
    backbone_from,
    backbone_of,
    config_of,
    model_from,
    tokenizer_of,
)

BERT_LIKE = ("bert", "roberta", "xlm-roberta", "electra")
# The longest row uses the flash kernel.
LENGTHS = (1, 3, 3, 3, 7, 40, 90)
# float32, summed in another order: some units in the last place of states around one.
FLOAT32_ERROR = 1e-5
# bfloat16 has 8 bits: both computations round states around one a few times.
BFLOAT16_ERROR = 0.06


def layer_of(backbone: Backbone) -> BertLayer:
    layer = backbone._layers[0]
    assert isinstance(layer, BertLayer)
    return layer


def layout_of(lengths: tuple[int, ...] = LENGTHS) -> Layout:
    return Layout(np.array(lengths, dtype=np.int64))


def states_of(layout: Layout, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(1, layout.tokens, HIDDEN, generator=torch.Generator().manual_seed(0)).to(
        dtype
    )


def first_positions(layout: Layout) -> Tensor:
    return torch.from_numpy(layout.starts)


def both_outputs(layer: BertLayer, states: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """Through oneDNN, and through the layer of `transformers`."""
    with torch.inference_mode():
        fast = layer(states, attention_mask=None, layout=layout)
        plain = layer.layer(states, attention_mask=None, layout=layout)
    return fast, plain


def both_reads(
    layer: BertLayer, states: Tensor, positions: Tensor, layout: Layout
) -> tuple[Tensor, Tensor]:
    with torch.inference_mode():
        fast = layer.read(states, positions, layout)
        plain = layer.layer(states, attention_mask=None, layout=layout)[0, positions]
    return fast, plain


def difference(pair: tuple[Tensor, Tensor]) -> float:
    fast, plain = pair
    assert (fast.shape, fast.dtype) == (plain.shape, plain.dtype)
    return float((fast.float() - plain.float()).abs().max())


@pytest.mark.parametrize("family", BERT_LIKE)
def test_a_layer_gives_what_transformers_gives(family: str) -> None:
    layer, layout = layer_of(backbone_of(family)), layout_of()
    assert difference(both_outputs(layer, states_of(layout), layout)) < FLOAT32_ERROR
    with torch.no_grad():
        taken = layer._fast(states_of(layout))
    assert isinstance(taken, OneDnnLayer), "this machine's torch has no oneDNN: nothing was tested"


@pytest.mark.parametrize("family", BERT_LIKE)
def test_a_read_gives_the_last_layer_at_the_positions(family: str) -> None:
    layer, layout = layer_of(backbone_of(family)), layout_of()
    states = states_of(layout)
    assert difference(both_reads(layer, states, first_positions(layout), layout)) < FLOAT32_ERROR


@pytest.mark.parametrize(
    "positions",
    [
        pytest.param([0, 1, 2, 3, 4], id="rows left out, one read thrice"),
        pytest.param([0, 4, 1, 7, 10, 17, 60], id="one of each row, in another order"),
        pytest.param([0, *range(17, 57)], id="whole rows, as for a mean"),
        pytest.param([0, 1, 4, 7, 10, 11, 17], id="as many as rows, two of one"),
    ],
)
def test_any_positions_can_be_read(positions: list[int]) -> None:
    layer, layout = layer_of(backbone_of("bert")), layout_of()
    pair = both_reads(layer, states_of(layout), torch.tensor(positions), layout)
    assert difference(pair) < FLOAT32_ERROR


def test_bfloat16_differs_by_its_rounding_only() -> None:
    layer, layout = layer_of(backbone_of("bert").to(dtype=torch.bfloat16)), layout_of()
    states = states_of(layout, torch.bfloat16)
    assert difference(both_outputs(layer, states, layout)) < BFLOAT16_ERROR
    assert difference(both_reads(layer, states, first_positions(layout), layout)) < BFLOAT16_ERROR


def test_another_activation_runs_as_in_the_layer() -> None:
    config: Any = config_of("bert")
    config.hidden_act = "relu"
    layer, layout = layer_of(backbone_from(model_from(config), tokenizer_of("bert"))), layout_of()
    assert difference(both_outputs(layer, states_of(layout), layout)) < FLOAT32_ERROR


def test_weights_that_were_cast_or_reloaded_are_used() -> None:
    backbone = backbone_of("bert")
    layer, layout = layer_of(backbone), layout_of()
    states = states_of(layout)
    before, _ = both_outputs(layer, states, layout)
    kept = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    others = backbone_of("bert", seed=1).state_dict()

    backbone.to(dtype=torch.bfloat16)
    both_outputs(layer, states.bfloat16(), layout)
    backbone.to(dtype=torch.float32)
    backbone.load_state_dict(kept)
    assert torch.equal(both_outputs(layer, states, layout)[0], before)

    backbone.load_state_dict(others)
    after = both_outputs(layer, states, layout)
    assert difference((after[0], before)) > 100 * FLOAT32_ERROR
    assert difference(after) < FLOAT32_ERROR


def test_weights_made_in_inference_mode_can_be_used() -> None:
    with torch.inference_mode():
        layer, layout = layer_of(backbone_of("bert")), layout_of()
    assert difference(both_outputs(layer, states_of(layout), layout)) < FLOAT32_ERROR


def test_gradients_flow_through_the_layer_of_transformers() -> None:
    layer, layout = layer_of(backbone_of("bert")), layout_of()
    states = states_of(layout).requires_grad_()
    layer(states, attention_mask=None, layout=layout).sum().backward()
    assert states.grad is not None
    assert bool(states.grad.isfinite().all())


def test_there_are_few_sizes_and_little_is_padded() -> None:
    sizes = {rows: len(pad(torch.empty(rows, 1))) for rows in range(1, 4097)}
    assert all(rows <= size < rows + max(8, rows / 8) for rows, size in sizes.items())
    # Each size is a kernel for each of a backbone's four products; oneDNN keeps 1024.
    assert len(set(sizes.values())) < 1024 / 4
    padded = pad(torch.ones(257, 2))
    assert bool((padded[:257] == 1).all() and (padded[257:] == 0).all())


def test_linears_with_one_input_become_one_product() -> None:
    torch.manual_seed(0)
    first, second = torch.nn.Linear(8, 3), torch.nn.Linear(8, 5)
    states = torch.randn(4, 8)
    with torch.inference_mode():
        product = ReorderedLinear.of(first, second)(states)
        expected = torch.cat([first(states), second(states)], dim=1)
        assert torch.allclose(product, expected, atol=1e-6)
        gelu = torch.nn.functional.gelu(expected)
        assert torch.allclose(ReorderedLinear.of(first, second)(states, "gelu"), gelu, atol=1e-5)


@pytest.mark.parametrize("kind", ["vectors", "lora"])
@pytest.mark.parametrize("family", BERT_LIKE)
def test_a_tuned_layer_gives_what_its_modules_give(
    family: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, layout = layer_of(backbone_of(family)), layout_of()
    changes = tuning_of(kind).at(0, layout)
    assert changes is not None
    states, positions = states_of(layout)[0], first_positions(layout)
    with torch.inference_mode():
        outputs = plain.forward(layer.parts, states, layout, changes)
        reads = plain.read(layer.parts, states, positions, layout, changes)
        # From here on only oneDNN is left.
        monkeypatch.delattr(plain, "forward")
        monkeypatch.delattr(plain, "read")
        assert difference((layer.forward_tuned(states, layout, changes), outputs)) < FLOAT32_ERROR
        read = layer.read_tuned(states, positions, layout, changes)
        assert difference((read, reads)) < FLOAT32_ERROR
        assert (
            difference((layer(states[None], attention_mask=None, layout=layout)[0], outputs)) > 0.1
        )


def tuning_of(kind: str) -> UniformTuning:
    tuning: Tuning
    if kind == "lora":
        sites = tuple(site for site in Site if site is not Site.ACTIVATED)
        tuning = LoraTuning(layers=(0, 1), intermediate_size=40, rank=2, scaling=1.0, sites=sites)
    else:
        tuning = VectorTuning(layers=(0, 1), intermediate_size=40, activated=True)
    random = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randn(shape, generator=random) * 0.3
        for name, shape in tuning.shapes(HIDDEN).items()
    }
    return UniformTuning(tuning_weights(tuning, tensors))
