"""Products in float8: near the layer's own, and a row's result is the same in any batch.

Without a CUDA device Triton interprets the kernels (see conftest.py), between states in float32;
tests/gpu/test_float8.py tests them compiled, in bfloat16.
"""

import importlib.util
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

pytest.importorskip("triton", reason="Triton is not installed")

from adapters.backbone import loading
from adapters.backbone.loading import check_float8, load_backbone, place
from adapters.backbone.model import Backbone
from adapters.errors import UnusableBackbone
from adapters.layers import float8 as layers
from adapters.layers.bert import BertLayer
from adapters.layers.float8 import Float8Layer, Float8Linear, Tiles, quantised
from adapters.layers.fused import FusedLayer, add_norm
from adapters.layers.narrow import Bound, Handover, NarrowRows
from adapters.packed.layout import Layout
from tests.support import float8
from tests.support.families import (
    FAMILY_NAMES,
    backbone_from,
    backbone_of,
    config_of,
    model_from,
    tokenizer_of,
)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BERT_LIKE = ("bert", "roberta", "xlm-roberta", "electra")
# Widths that are multiples of 16, as float8 needs them.
HIDDEN, WIDE = 48, 80
LENGTHS = (1, 3, 20)
# Of the norm of a layer's output: five products, each rounded to four bits.
LAYER_ERROR = 0.06
NOTHING_BUT_ROUNDING = 1e-5
# Of the polynomial (`triton_float8.gelu`).
GELU_ERROR = 5e-5


@pytest.fixture(autouse=True)
def rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE.type == "cpu":
        float8.round_as_devices_do(monkeypatch)


def model_config(family: str = "bert", **changes: Any) -> Any:
    config = config_of(family)
    config.initializer_range = 0.1
    config.hidden_size, config.num_attention_heads, config.intermediate_size = HIDDEN, 3, WIDE
    for name, value in changes.items():
        setattr(config, name, value)
    return config


def backbone_for(family: str = "bert") -> Backbone:
    return backbone_from(model_from(model_config(family)), tokenizer_of(family))


def layer_of(family: str = "bert", **changes: Any) -> Any:
    model = model_from(model_config(family, **changes))
    return model.to(DEVICE).requires_grad_(False).encoder.layer[0]


def states_of(tokens: int, width: int = HIDDEN, seed: int = 0) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, width, generator=random).to(DEVICE)


def linear_of(inputs: int, outputs: int) -> nn.Linear:
    torch.manual_seed(1)
    return nn.Linear(inputs, outputs).to(DEVICE).requires_grad_(False)


def layout_of(*lengths: int) -> Layout:
    return Layout(np.array(lengths, dtype=np.int64), DEVICE)


def share(one: Tensor, other: Tensor) -> float:
    """The distance as a share of the norm."""
    assert one.shape == other.shape
    return float((one.float() - other.float()).norm() / other.float().norm())


def numbers(rows: NarrowRows) -> Tensor:
    """What the rows stand for."""
    return rows.values.float() * rows.scales.unsqueeze(1)


# Rows


def test_a_row_is_rounded_to_its_own_scale() -> None:
    magnitudes = torch.tensor([1e-3, 1, 1e4, 0, 1e-15], device=DEVICE)
    states = states_of(5, 33) * magnitudes.unsqueeze(1)
    rows = quantised(states)
    values, scales = float8.quantised(states)
    assert torch.equal(rows.values.float(), values)
    assert torch.equal(rows.scales, scales)
    assert rows.values.float().abs().amax(1).tolist() == [448, 448, 448, 0, 448]
    errors = (numbers(rows) - states).abs()
    # Half a unit in the last place; subnormal numbers lie 2**-9 of the scale apart.
    least = scales.unsqueeze(1) * 2**-10
    assert bool((errors <= torch.maximum(states.abs() * float8.EPSILON, least * 1.001)).all())


def test_a_scale_can_be_wanted_larger() -> None:
    states = states_of(4)
    least = torch.tensor([0.0, 1e-4, 0.5, 100.0], device=DEVICE)
    rows, (values, scales) = quantised(states, least=least), float8.quantised(states, least)
    assert torch.equal(rows.scales, scales)
    assert torch.equal(rows.values.float(), values)
    assert rows.scales[2:].tolist() == [0.5, 100.0]


def test_gelu_before_rounding_also_replaces_the_states() -> None:
    states = states_of(6)
    states[0, :40] = torch.linspace(-8, 8, 40)
    exact = functional.gelu(states)
    rows = quantised(states, gelu=True)
    assert float((states - exact).abs().max()) < GELU_ERROR
    assert torch.equal(rows.values.float(), float8.quantised(states)[0])


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("column", [0, 17, HIDDEN - 1])
def test_a_value_that_is_not_finite_is_not_lost(value: float, column: int) -> None:
    states = states_of(3)
    states[1, column] = value
    output = Float8Linear(linear_of(HIDDEN, 8))(quantised(states), states.dtype)
    assert not bool(output[1].isfinite().any())
    assert bool(output[[0, 2]].isfinite().all())


def test_a_norm_also_gives_its_rows_and_bounds_what_comes_next() -> None:
    states, residual, norm = states_of(9), states_of(9, seed=1), nn.LayerNorm(HIDDEN).to(DEVICE)
    rows = NarrowRows.empty(9, HIDDEN, DEVICE, wide=True)
    bound = Bound(2.0, 0.5)
    output = add_norm(states, residual, norm.requires_grad_(False), narrow=rows, bound=bound)
    assert torch.equal(output, add_norm(states, residual, norm))
    again = quantised(output)
    assert torch.equal(rows.values.float(), again.values.float())
    assert torch.equal(rows.scales, again.scales)
    assert rows.wide_scales is not None
    expected = (output.norm(dim=1) * 2.0 + 0.5) / float8.LARGEST
    assert torch.allclose(rows.wide_scales, expected, rtol=1e-6)


# Products


@pytest.mark.parametrize(("inputs", "outputs"), [(16, 16), (48, 144), (80, 48), (272, 40)])
def test_a_product_is_that_of_the_rounded_numbers(inputs: int, outputs: int) -> None:
    linear, states = linear_of(inputs, outputs), states_of(70, inputs)
    output = Float8Linear(linear)(quantised(states), states.dtype)
    assert share(output, float8.product(states, linear)) < NOTHING_BUT_ROUNDING
    assert 0.001 < share(output, linear(states)) < 0.06


def test_linears_with_the_same_input_are_one_product() -> None:
    linears, states = [linear_of(HIDDEN, width) for width in (16, 32)], states_of(5)
    output = Float8Linear(*linears)(quantised(states), states.dtype)
    expected = torch.cat([float8.product(states, linear) for linear in linears], dim=1)
    assert share(output, expected) < NOTHING_BUT_ROUNDING


def test_a_product_that_ends_in_gelu_is_quantised_by_the_bound() -> None:
    linear, states = linear_of(HIDDEN, WIDE), states_of(70)
    # A row that points along a row of the weight, which is the largest that the bound allows.
    states[3] = linear.weight[5] * 40
    narrow = Float8Linear(linear)
    bound, rows = narrow.bound(), quantised(states)
    wide = (states.norm(dim=1) * bound.slope + bound.most) / float8.LARGEST
    rows = NarrowRows(rows.values, rows.scales, wide)
    activated = narrow.activated(rows, states.dtype)
    exact = functional.gelu(narrow(rows, states.dtype))
    assert torch.equal(activated.scales, wide)
    assert bool((exact.abs().amax(1) <= wide * float8.LARGEST).all())
    assert float(exact[3].max()) > 0.7 * float(wide[3]) * float8.LARGEST
    values, _ = float8.quantised(exact, wide)
    # GELU's own rounding may move a number to its neighbour.
    assert share(activated.values, values) < 0.01


@pytest.mark.slow
@pytest.mark.parametrize("tiles", [Tiles(64, 32), Tiles(128, 64), Tiles(64, 128, looping=1)])
def test_a_row_of_a_product_has_the_same_bits_in_any_batch(tiles: Tiles) -> None:
    narrow, states = Float8Linear(linear_of(272, 80)), states_of(150, 272)
    whole = narrow(quantised(states), states.dtype, Tiles(64, 64))
    for count in (1, 63, 65, 130):
        few = narrow(quantised(states[:count].contiguous()), states.dtype, tiles)
        assert torch.equal(few, whole[:count])


def test_a_token_with_huge_values_does_not_touch_its_neighbours() -> None:
    narrow, states = Float8Linear(linear_of(HIDDEN, 32)), states_of(21)
    before = narrow(quantised(states), states.dtype)
    states[7] *= 1e6
    after = narrow(quantised(states), states.dtype)
    rest = [row for row in range(21) if row != 7]
    assert torch.equal(before[rest], after[rest])
    assert not torch.equal(before[7], after[7])


# Layers


@pytest.mark.slow
@pytest.mark.parametrize("family", BERT_LIKE)
def test_a_layer_is_near_its_own_type(family: str) -> None:
    layer, layout = layer_of(family), layout_of(*LENGTHS)
    states, positions = states_of(layout.tokens), torch.tensor([7, 0, 4, 20], device=DEVICE)
    with torch.inference_mode():
        narrow, exact = Float8Layer(layer, Handover()), FusedLayer(layer)
        output = narrow.forward(states, layout)
        assert 0.001 < share(output, exact.forward(states, layout)) < LAYER_ERROR
        assert torch.equal(narrow.read(states, positions, layout), output[positions])


def test_another_activation_runs_as_in_the_layer() -> None:
    layer, layout = layer_of(hidden_act="relu"), layout_of(2, 12)
    states = states_of(layout.tokens)
    with torch.inference_mode():
        output = Float8Layer(layer, Handover()).forward(states, layout)
        assert 0.001 < share(output, FusedLayer(layer).forward(states, layout)) < LAYER_ERROR


@pytest.mark.slow
def test_what_a_layer_hands_over_changes_nothing_and_is_taken_once() -> None:
    handover, layout = Handover(), layout_of(2, 5)
    first, second = (Float8Layer(layer_of(), handover) for _ in range(2))
    with torch.inference_mode():
        states = first.forward(states_of(layout.tokens), layout)
        direct = second.forward(states, layout)
        assert torch.equal(second.forward(states.clone(), layout), direct)
        rows = handover.take(direct.clone())
        assert rows is None
        again = first.forward(states, layout)
        rows = handover.take(again)
        assert rows is not None
        assert torch.equal(numbers(rows), numbers(quantised(again)))
        assert handover.take(again) is None


@pytest.mark.slow
def test_a_row_of_a_layer_has_the_same_bits_in_any_batch() -> None:
    layer, layout = Float8Layer(layer_of(), Handover()), layout_of(*LENGTHS)
    states = states_of(layout.tokens)
    with torch.inference_mode():
        together = layer.forward(states, layout)
        for start, end in zip(layout.starts, layout.ends, strict=True):
            alone = layer.forward(states[start:end].contiguous(), layout_of(int(end - start)))
            assert torch.equal(alone, together[start:end])


# What cannot run it


@pytest.mark.parametrize("family", [name for name in FAMILY_NAMES if name not in BERT_LIKE])
def test_a_family_with_other_layers_is_refused_by_name(family: str) -> None:
    with pytest.raises(UnusableBackbone, match=f"bert, electra, .*is of the family '{family}'"):
        backbone_of(family).use_float8()


def test_widths_that_are_no_multiples_of_16_are_refused_by_name() -> None:
    with pytest.raises(UnusableBackbone, match=r"multiples of 16; hidden_size of .* is 24"):
        backbone_of("bert").use_float8()


def test_it_can_be_switched_off_again() -> None:
    backbone = backbone_for().use_float8()
    assert backbone.computes == "float8"
    assert backbone.use_float8(False).computes == "float32"
    layer = backbone._layers[0]
    assert isinstance(layer, BertLayer)
    assert layer._handover is None


def test_a_cpu_is_refused_before_anything_is_read() -> None:
    with pytest.raises(UnusableBackbone, match=r"FP8 tensor cores .*the device is cpu"):
        load_backbone("a backbone that is not read", device="cpu", dtype="float8")


def test_a_gpu_without_float8_is_refused_with_what_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Some GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 6))
    with pytest.raises(UnusableBackbone, match=r"capability 8\.9 or higher.*Some GPU has 8\.6$"):
        check_float8(torch.device("cuda:0"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    check_float8(torch.device("cuda:0"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UnusableBackbone, match="needs the package triton"):
        check_float8(torch.device("cuda:0"))


def skip_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Do not ask for a GPU, nor interpret thousands of rows."""
    monkeypatch.setattr(loading, "check_type", lambda *_: None)
    monkeypatch.setattr(Backbone, "check_float8", lambda _: None)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda output: output, None),
        (lambda output: output * 1.1, "a product differs from PyTorch's by 0.1 of it"),
        (lambda output: output + len(output) * 1e-5, "a row of a product depends on the number"),
    ],
)
def test_products_are_tried_with_few_and_many_rows_at_the_start(
    spoil: Callable[[Tensor], Tensor], words: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def product(linear: Float8Linear, *arguments: Any) -> Tensor:
        return spoil(own(linear, *arguments))

    own = Float8Linear.__call__
    monkeypatch.setattr(layers, "_FEW", 16)
    monkeypatch.setattr(layers, "_TRIED", 70)
    monkeypatch.setattr(Float8Linear, "__call__", product)
    linear = Float8Linear(linear_of(HIDDEN, 32))
    if words is None:
        linear.check(activated=True)
        return
    with pytest.raises(RuntimeError, match=words):
        linear.check(activated=True)


@pytest.mark.parametrize(
    ("outcome", "words"),
    [
        (RuntimeError("no such instruction\nmore"), "kernels do not run on cpu: no such instr"),
        (0.9, r"'tiny-bert' would change by 0\.90 of their norm"),
        (math.nan, "would change by nan of their norm"),
    ],
)
def test_the_gate_at_the_start_refuses_in_one_line(
    outcome: float | Exception, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def distance(*_: Tensor) -> float:
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    skip_the_device(monkeypatch)
    monkeypatch.setattr(loading, "_distance", distance)
    with pytest.raises(UnusableBackbone, match=words) as raised:
        place(backbone_for(), device="cpu", dtype="float8")
    assert "\n" not in str(raised.value)


def test_the_log_says_how_near_answers_are(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    skip_the_device(monkeypatch)
    for error, level in ((0.1, "INFO"), (0.4, "WARNING")):
        monkeypatch.setattr(loading, "_distance", lambda *_, error=error: error)
        placed = place(backbone_for(), device="cpu", dtype="float8")
        assert (placed.computes, placed.dtype) == ("float8", torch.bfloat16)
        record = caplog.records[-1]
        assert record.levelname == level
        assert f"float8 changes answers by {error:.4f} of their norm" in record.getMessage()
