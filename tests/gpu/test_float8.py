"""On a CUDA device with FP8 tensor cores: products and layers in float8, compiled, in bfloat16."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

pytest.importorskip("triton", reason="Triton is not installed")

from adapters.backbone.loading import float8_lack, place
from adapters.backbone.model import Backbone
from adapters.capture import capturing
from adapters.layers.bert import BertLayer
from adapters.layers.float8 import Float8Layer, Float8Linear, Tiles, quantised
from adapters.layers.frozen import FrozenLayer
from adapters.layers.fused import FusedLayer, add_norm
from adapters.layers.narrow import Bound, Handover, NarrowRows
from adapters.packed.layout import Layout
from service.engine.interface import Entry, cost_of
from service.engine.runners.slotted import SlottedRunner
from tests.support import float8
from tests.support.engine_harness import EngineHarness
from tests.support.families import backbone_from, config_of, model_from, tokenizer_of
from tests.support.kinds import serving_kinds
from tests.support.tiny_models import make_backbone

LACK = float8_lack(torch.device("cuda")) if torch.cuda.is_available() else "no CUDA device"
# A test that hangs fails.
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(120),
    pytest.mark.skipif(LACK is not None, reason=f"float8: {LACK}"),
]

BERT_LIKE = ("bert", "roberta", "xlm-roberta", "electra")
HEADS, SIZE = 3, 64
HIDDEN, WIDE = HEADS * SIZE, 2 * HEADS * SIZE
LENGTHS = (1, 3, 3, 31, 32, 33, 64, 65, 130, 300)
# bfloat16 rounds a product to eight bits, by at most 1/512.
BFLOAT16_ERROR = 3e-3
# Of the norm of a layer's output: five products, each rounded to four bits.
LAYER_ERROR = 0.08
# On both sides of the edges of tiles, and of the sizes at which other tiles are chosen.
COUNTS = (1, 7, 63, 64, 65, 127, 129, 255, 256, 257, 300, 1000, 1024, 2049, 4096, 8191, 8192, 9000)


def numbers_of(*shape: int, seed: int = 0) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=random).to("cuda", torch.bfloat16)


def linear_of(inputs: int, outputs: int) -> nn.Linear:
    torch.manual_seed(1)
    return nn.Linear(inputs, outputs).to("cuda", torch.bfloat16).requires_grad_(False)


def share(one: Tensor, other: Tensor) -> float:
    """The distance as a share of the norm."""
    assert one.shape == other.shape
    return float((one.float() - other.float()).norm() / other.float().norm())


def layout_of(*lengths: int) -> Layout:
    return Layout(np.array(lengths, dtype=np.int64), torch.device("cuda"))


def backbone_of(family: str, *, seed: int = 0) -> Backbone:
    config: Any = config_of(family)
    config.hidden_size, config.num_attention_heads = HIDDEN, HEADS
    config.intermediate_size, config.initializer_range = WIDE, 0.1
    return backbone_from(model_from(config, seed=seed), tokenizer_of(family))


def layer_of(family: str = "bert") -> Any:
    backbone = backbone_of(family).to(device="cuda", dtype=torch.bfloat16)
    layer = backbone._layers[0]
    assert isinstance(layer, BertLayer)
    return layer.layer


# Rows and products


@pytest.mark.parametrize("width", [16, 384, 768, 4096])
def test_a_row_is_rounded_as_in_pytorch(width: int) -> None:
    states = numbers_of(70, width) * torch.logspace(-6, 4, 70, device="cuda").unsqueeze(1)
    states = states.bfloat16()
    states[5] = 0
    rows, (values, scales) = quantised(states), float8.quantised(states)
    torch.testing.assert_close(rows.scales, scales, rtol=1e-6, atol=0)
    # Where a number lies in the middle between two, the last bit of the scale decides.
    assert share(rows.values, values) < 0.003
    assert not bool(rows.values[5].float().any())


def test_every_kernel_gives_a_row_the_same_bits() -> None:
    states, residual = numbers_of(300, 768), numbers_of(300, 768, seed=1)
    norm = nn.LayerNorm(768).to("cuda", torch.bfloat16).requires_grad_(False)
    rows = NarrowRows.empty(300, 768, states.device, wide=True)
    output = add_norm(states, residual, norm, warps=2, narrow=rows, bound=Bound(2.0, 0.5))
    again = quantised(output)
    assert torch.equal(rows.values.float(), again.values.float())
    assert torch.equal(rows.scales, again.scales)
    assert rows.wide_scales is not None
    expected = (output.float().norm(dim=1) * 2.0 + 0.5) / float8.LARGEST
    torch.testing.assert_close(rows.wide_scales, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize(("inputs", "outputs"), [(768, 2304), (3072, 768), (192, 384), (48, 80)])
@pytest.mark.parametrize("count", [5, 300, 3000, 9000])
def test_a_product_is_that_of_the_rounded_numbers(inputs: int, outputs: int, count: int) -> None:
    linear, states = linear_of(inputs, outputs), numbers_of(count, inputs)
    rows = quantised(states)
    values = rows.values.double() * rows.scales.unsqueeze(1)
    weight, factors = float8.quantised(linear.weight)
    exact = values @ (weight.double() * factors.unsqueeze(1)).T + linear.bias.double()
    output = Float8Linear(linear)(rows, torch.bfloat16)
    assert share(output, exact) < BFLOAT16_ERROR
    assert 0.01 < share(output, linear(states)) < 0.06


@pytest.mark.parametrize(("inputs", "outputs"), [(768, 3072), (3072, 768)])
def test_a_row_of_a_product_has_the_same_bits_in_any_batch(inputs: int, outputs: int) -> None:
    narrow, states = Float8Linear(linear_of(inputs, outputs)), numbers_of(max(COUNTS), inputs)
    bound, rows = narrow.bound(), quantised(states)
    wide = (states.float().norm(dim=1) * bound.slope + bound.most) / float8.LARGEST
    whole = narrow(rows, torch.bfloat16)
    activated = narrow.activated(NarrowRows(rows.values, rows.scales, wide), torch.bfloat16)
    for count in COUNTS:
        few = NarrowRows(rows.values[:count], rows.scales[:count], wide[:count])
        assert torch.equal(narrow(few, torch.bfloat16), whole[:count]), count
        values = narrow.activated(few, torch.bfloat16).values
        assert torch.equal(values.float(), activated.values[:count].float()), count
    last = NarrowRows(rows.values[-100:].clone(), rows.scales[-100:].clone())
    assert torch.equal(narrow(last, torch.bfloat16), whole[-100:])
    looping = narrow(few, torch.bfloat16, Tiles(64, 64, looping=2))
    assert torch.equal(looping, whole)


def test_gelu_in_the_product_is_gelu_after_it_to_the_bit() -> None:
    for count in (40, 3000, 9000):
        narrow, states = Float8Linear(linear_of(768, 3072)), numbers_of(count, 768)
        bound, rows = narrow.bound(), quantised(states)
        wide = (states.float().norm(dim=1) * bound.slope + bound.most) / float8.LARGEST
        rows = NarrowRows(rows.values, rows.scales, wide)
        product = narrow(rows, torch.bfloat16)
        exact = functional.gelu(product.float())
        after = quantised(product, least=wide, gelu=True)
        assert torch.equal(after.scales, wide)
        values = narrow.activated(rows, torch.bfloat16).values
        assert torch.equal(values.float(), after.values.float())
        assert float((product.float() - exact).abs().max()) < 0.02


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_stays_in_its_row_and_is_not_lost(value: float) -> None:
    layer, layout = Float8Layer(layer_of(), Handover()), layout_of(5, 7, 6)
    states = numbers_of(18, HIDDEN)
    with torch.inference_mode():
        exact = layer.forward(states, layout)
        states[6, 3] = value
        output = layer.forward(states, layout)
    assert torch.equal(output[:5], exact[:5])
    assert torch.equal(output[12:], exact[12:])
    assert not bool(output[5:12].isfinite().any())


# Layers


@pytest.mark.parametrize("family", BERT_LIKE)
@torch.inference_mode()
def test_a_layer_is_near_bfloat16(family: str) -> None:
    own, layout = layer_of(family), layout_of(*LENGTHS)
    states = numbers_of(layout.tokens, HIDDEN)
    narrow, exact = Float8Layer(own, Handover()), FusedLayer(own)
    output = narrow.forward(states, layout)
    assert 0.005 < share(output, exact.forward(states, layout)) < LAYER_ERROR
    positions = torch.tensor([0, *np.flip(layout.starts)], device="cuda")
    assert torch.equal(narrow.read(states, positions, layout), output[positions])


@torch.inference_mode()
def test_a_row_of_a_layer_has_the_same_bits_in_any_batch() -> None:
    handover = Handover()
    layers = [Float8Layer(layer_of(), handover) for _ in range(2)]

    def run(states: Tensor, layout: Layout) -> Tensor:
        for layer in layers:
            states = layer.forward(states, layout)
        return states

    random = np.random.default_rng(0)
    layout = layout_of(*random.integers(1, 120, size=160).tolist())
    states = numbers_of(layout.tokens, HIDDEN)
    together = run(states, layout)
    for start, end in list(zip(layout.starts, layout.ends, strict=True))[::7]:
        alone = run(states[start:end].clone(), layout_of(int(end - start)))
        assert torch.equal(alone, together[start:end])


class _Extents:
    """Rows whose lengths only the device knows."""

    def __init__(self, cumulative: Tensor, longest: int) -> None:
        self.cumulative = cumulative
        self.longest = longest


@torch.inference_mode()
def test_captured_layers_take_other_rows_and_a_tail() -> None:
    handover, tokens, rows, longest = Handover(), 400, 8, 128
    layers = [Float8Layer(layer_of(), handover) for _ in range(2)]
    states = numbers_of(tokens, HIDDEN)
    cumulative = torch.zeros(rows + 1, dtype=torch.int32, device="cuda")

    def run(states: Tensor, extents: Any) -> Tensor:
        for layer in layers:
            states = layer.forward(states, extents)
        return states

    run(states, _Extents(cumulative, longest))
    graph = torch.cuda.CUDAGraph()
    with capturing(graph, stream=torch.cuda.Stream()):
        output = run(states, _Extents(cumulative, longest))
    for seed, lengths in enumerate([(128, 0, 1, 70), (50,) * 8, (3,)]):
        layout = layout_of(*lengths)
        cumulative.fill_(layout.tokens)
        cumulative[: len(lengths) + 1] = layout.cumulative
        states.copy_(numbers_of(tokens, HIDDEN, seed=seed))
        graph.replay()
        eager = run(states[: layout.tokens].clone(), layout)
        assert torch.equal(output[: layout.tokens], eager)


def test_gradients_are_those_of_bfloat16() -> None:
    backbone = place(backbone_of("bert"), device="cuda", dtype="float8")
    assert (backbone.computes, backbone.dtype) == ("float8", torch.bfloat16)
    layer = backbone._layers[0]
    assert isinstance(layer, BertLayer)
    states = numbers_of(1, 5, HIDDEN)
    assert isinstance(layer._fast(states), FrozenLayer)
    with torch.inference_mode():
        assert isinstance(layer._fast(states), Float8Layer)
        backbone.use_float8(False)
        assert isinstance(layer._fast(states), FusedLayer)


@torch.no_grad()
def test_reloaded_weights_are_used() -> None:
    backbone, layout = backbone_of("bert"), layout_of(5, 9)
    backbone = place(backbone, device="cuda", dtype="float8")
    layer, states = backbone._layers[0], numbers_of(1, 14, HIDDEN)
    before = layer(states, attention_mask=None, layout=layout)
    backbone.load_state_dict(backbone_of("bert", seed=1).state_dict())
    after = layer(states, attention_mask=None, layout=layout)
    backbone.use_float8(False)
    assert share(after, layer(states, attention_mask=None, layout=layout)) < LAYER_ERROR
    assert share(after, before) > LAYER_ERROR


# The engine


def entry_of(harness: EngineHarness, name: str, text: str) -> Entry:
    spec = harness.adapters[name].spec
    encoding = harness.backbone.encoder.encode(text, max_length=spec.max_length)
    return Entry(harness.keys[name], encoding, cost_of(encoding, spec))


async def test_a_text_has_the_same_answer_beside_any_others(tmp_path: Path) -> None:
    backbone = place(make_backbone(hidden_size=64), device="cuda", dtype="float8")
    SlottedRunner(backbone, slots=8, max_tokens=1024).check()
    async with serving_kinds(tmp_path, backbone) as harness:
        names = [name for name in harness.adapters if name not in "abc"]
        texts = ("win now", "free card " * 14, "call " * 9)
        entries = [entry_of(harness, name, text) for text in texts for name in names]
        together = (await harness.engine.predict(entries)).rows
        assert harness.recorder.batches[-1].adapters == len(names)
        for entry, row in zip(entries, together, strict=True):
            (alone,) = (await harness.engine.predict([entry])).rows
            np.testing.assert_array_equal(row.scores, alone.scores, err_msg=entry.adapter.name)
