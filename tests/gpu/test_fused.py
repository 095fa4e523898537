"""On a CUDA device: fused layers, compiled, in the types and sizes that are served.

The bound comes from bfloat16's eight bits: a unit in the last place of states of four or five is
0.03.
"""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

from adapters.backbone.model import Backbone
from adapters.capture import capturing
from adapters.layers.bert import BertLayer
from adapters.layers.frozen import FrozenLayer
from adapters.layers.fused import FusedLayer, attend
from adapters.packed.layout import Layout
from tests.support.families import backbone_from, config_of, model_from, tokenizer_of
from tests.support.tiny_models import make_backbone

pytestmark = pytest.mark.gpu

BERT_LIKE = ("bert", "roberta", "xlm-roberta", "electra")
BOUND = 0.05
HEADS, SIZE = 3, 64
LENGTHS = (1, 3, 3, 31, 32, 33, 64, 65, 130, 300)


def backbone_of(family: str, *, seed: int = 0) -> Backbone:
    """Heads of 64; weights such that scores differ by a few units, as trained ones' do."""
    config: Any = config_of(family)
    config.hidden_size, config.num_attention_heads = HEADS * SIZE, HEADS
    config.intermediate_size = 2 * HEADS * SIZE
    config.initializer_range = 0.1
    backbone = backbone_from(model_from(config, seed=seed), tokenizer_of(family))
    return backbone.to(device="cuda", dtype=torch.bfloat16)


def layer_of(backbone: Backbone) -> BertLayer:
    layer = backbone._layers[0]
    assert isinstance(layer, BertLayer)
    return layer


def layout_of(lengths: tuple[int, ...] = LENGTHS) -> Layout:
    return Layout(np.array(lengths, dtype=np.int64), torch.device("cuda"))


def states_of(tokens: int, *shape: int, seed: int = 0) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, *shape, generator=random).to("cuda", torch.bfloat16)


def exactly(layer: BertLayer, states: Tensor, layout: Layout) -> Tensor:
    """Through the layer of `transformers` in float32: [1, T, n] -> [1, T, n]."""
    layer.layer.float()
    try:
        output: Tensor = layer.layer(states.float(), attention_mask=None, layout=layout)
        return output
    finally:
        layer.layer.bfloat16()


def difference(some: Tensor, others: Tensor) -> float:
    assert some.shape == others.shape
    return float((some.float() - others.float()).abs().max())


def flash(projected: Tensor, layout: Layout) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    rows, longest = layout.cumulative, layout.longest
    queries, keys, values = projected.unbind(1)
    attended = varlen_attn(queries, keys, values, rows, rows, longest, longest)
    assert isinstance(attended, Tensor)
    return attended.flatten(1)


@pytest.mark.parametrize("family", BERT_LIKE)
@torch.inference_mode()
def test_a_layer_gives_what_transformers_gives(family: str) -> None:
    layer, layout = layer_of(backbone_of(family)), layout_of()
    states = states_of(1, layout.tokens, HEADS * SIZE)
    exact = exactly(layer, states, layout)
    assert isinstance(layer._fast(states), FusedLayer)
    assert difference(layer(states, attention_mask=None, layout=layout), exact) < BOUND
    positions = torch.tensor([0, *np.flip(layout.starts)], device="cuda")
    assert difference(layer.read(states, positions, layout), exact[0, positions]) < BOUND


@torch.inference_mode()
def test_heads_of_16_can_be_fused() -> None:
    backbone = make_backbone(hidden_size=64).to(device="cuda", dtype=torch.bfloat16)
    layer, layout = layer_of(backbone), layout_of()
    states = states_of(1, layout.tokens, 64)
    exact = exactly(layer, states, layout)
    assert difference(layer(states, attention_mask=None, layout=layout), exact) < BOUND


@torch.no_grad()
def test_reloaded_weights_are_used() -> None:
    backbone, layout = backbone_of("bert"), layout_of((5, 9))
    layer = layer_of(backbone)
    states = states_of(1, layout.tokens, HEADS * SIZE)
    before = layer(states, attention_mask=None, layout=layout)
    backbone.load_state_dict(backbone_of("bert", seed=1).state_dict())
    after = layer(states, attention_mask=None, layout=layout)
    assert difference(after, exactly(layer, states, layout)) < BOUND
    assert difference(after, before) > 10 * BOUND


def test_gradients_and_float32_do_not_go_through_the_kernels() -> None:
    layer = layer_of(backbone_of("bert"))
    states = states_of(1, 5, HEADS * SIZE)
    assert isinstance(layer._fast(states), FrozenLayer)
    with torch.inference_mode():
        assert isinstance(layer._fast(states), FusedLayer)
        assert layer._fast(states.float()) is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("heads", [1, 12])
@torch.inference_mode()
def test_rows_attend_as_in_the_flash_kernel(heads: int, dtype: torch.dtype) -> None:
    random = np.random.default_rng(0)
    for longest in (32, 64, 512):
        layout = layout_of(tuple(random.integers(0, longest + 1, size=50).tolist()))
        tokens = layout.tokens
        projected = states_of(tokens + 77, 3, heads, SIZE).to(dtype)
        projected[tokens:] = math.nan  # after the last row: it must reach no row
        attended = attend(projected, layout.cumulative, longest=longest)[:tokens]
        assert difference(attended, flash(projected[:tokens], layout)) < BOUND


@torch.inference_mode()
def test_a_row_gets_the_same_bits_beside_any_neighbours() -> None:
    layout = layout_of()
    projected = states_of(layout.tokens, 3, HEADS, SIZE)
    mixed = attend(projected, layout.cumulative, longest=300)
    for row, together in zip(projected.split(LENGTHS), mixed.split(LENGTHS), strict=True):
        own = layout_of((len(row),)).cumulative
        assert torch.equal(attend(row, own, longest=300), together)


@torch.inference_mode()
def test_a_captured_layer_takes_other_rows_and_a_tail() -> None:
    layer = layer_of(backbone_of("bert"))
    tokens, rows, longest = 400, 8, 128
    states = states_of(1, tokens, HEADS * SIZE)
    cumulative = torch.zeros(rows + 1, dtype=torch.int32, device="cuda")
    extents = _Extents(cumulative, longest)
    layer(states, attention_mask=None, layout=extents)
    graph = torch.cuda.CUDAGraph()
    with capturing(graph, stream=torch.cuda.Stream()):
        output = layer(states, attention_mask=None, layout=extents)
    for seed, lengths in enumerate([(128, 0, 1, 70), (50,) * 8, (3,)]):
        layout = layout_of(lengths)
        cumulative.fill_(layout.tokens)
        cumulative[: len(lengths) + 1] = layout.cumulative
        states.copy_(states_of(1, tokens, HEADS * SIZE, seed=seed))
        graph.replay()
        within = states[:, : layout.tokens]
        eager = layer(within, attention_mask=None, layout=layout)
        assert difference(output[:, : layout.tokens], eager) < BOUND


class _Extents:
    """Rows whose lengths only the device knows."""

    def __init__(self, cumulative: Tensor, longest: int) -> None:
        self.cumulative = cumulative
        self.longest = longest
