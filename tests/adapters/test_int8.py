"""Products in int8: near float32's, and a text's answer is the same in any batch."""

import importlib.util
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from adapters.adapter import classify, prepare, rows_of
from adapters.backbone import loading
from adapters.backbone.loading import check_int8, int8_lack, load_backbone
from adapters.backbone.model import Backbone
from adapters.errors import UnusableBackbone
from adapters.format.files import load_adapter
from adapters.layers.bert import BertLayer
from adapters.packed.layout import Layout
from tests.support.families import FAMILY_NAMES, HIDDEN, backbone_of
from tests.support.mixtures import Case, adapters_of, classify_packed, mixtures

BERT_LIKE = ("bert", "roberta", "xlm-roberta", "electra")
LENGTHS = (1, 3, 3, 3, 7, 40, 90)
# Of the norm of a layer's output. These tiny layers are wide open: rounding to 1/127 shows.
LAYER_ERROR = 0.05
# Between a text in a batch and alone (docs/exactness.md).
BOUND = 0.05

# On scores of the zoo; 4,000 texts of their tasks: docs/exactness.md.
ANSWER_ERROR = 0.1
ZOO = Path(loading.__file__).parent.parent / "zoo"

LACK = int8_lack()
pytestmark = pytest.mark.skipif(LACK is not None, reason=f"int8: {LACK}")


def int8_backbone(family: str = "bert", seed: int = 0) -> Backbone:
    return backbone_of(family, seed=seed).use_int8()


def layer_of(backbone: Backbone) -> BertLayer:
    layer = backbone._layers[0]
    assert isinstance(layer, BertLayer)
    return layer


def states_of(layout: Layout, seed: int = 0) -> Tensor:
    return torch.randn(layout.tokens, HIDDEN, generator=torch.Generator().manual_seed(seed))


def layout_of(lengths: tuple[int, ...] = LENGTHS) -> Layout:
    return Layout(np.array(lengths, dtype=np.int64))


def share(one: Tensor, other: Tensor) -> float:
    """The distance as a share of the norm."""
    return float((one - other).norm() / other.norm())


# Rows


def quantised(states: Tensor) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    from adapters.layers.int8 import Rows

    return Rows.of(states).arrays


@pytest.mark.slow
def test_a_row_is_rounded_to_its_own_scale() -> None:
    states = torch.randn(5, 33) * torch.tensor([1e-3, 1, 1e4, 0, 1e-20]).unsqueeze(1)
    values, scales = quantised(states)
    expected = states.abs().amax(1).clamp(min=1e-30) / 127
    np.testing.assert_allclose(scales, expected, rtol=1e-6)
    back = torch.from_numpy(values * scales[:, None])
    assert bool(((back - states).abs() <= 0.501 * expected.unsqueeze(1)).all())
    assert np.abs(values[:3]).max(1).tolist() == [127, 127, 127]
    assert not values[3].any()


@pytest.mark.slow
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("column", [0, 17, 32])
def test_a_value_that_is_not_finite_is_not_lost(value: float, column: int) -> None:
    from adapters.layers.int8 import Int8Linear, Rows

    states = torch.randn(3, 33)
    states[1, column] = value
    with torch.inference_mode():
        product = Int8Linear(nn.Linear(33, 8))(Rows.of(states))
    assert not bool(product[1].isfinite().any())
    assert bool(product[[0, 2]].isfinite().all())


def test_gelu_is_the_exact_one_but_for_the_rounding() -> None:
    from adapters.layers import row_kernels
    from adapters.layers.int8 import Rows

    numbers = torch.cat([torch.linspace(-8e3, 8e3, 4000), torch.tensor([-1e7, -1e5, 0, 1e5])])
    sums = numbers.to(torch.int32).view(-1, 4)
    scales, factors, bias = torch.rand(len(sums)) + 0.5, torch.full((4,), 1e-3), torch.randn(4)
    rows = Rows.empty(len(sums), 4)
    inputs = (each.numpy() for each in (sums, scales, factors, bias))
    row_kernels.finish_and_quantise(*inputs, *rows.arrays)
    exact = functional.gelu(sums * scales.unsqueeze(1) * factors + bias)
    values, value_scales = rows.arrays
    error = np.abs(values * value_scales[:, None] - exact.numpy())
    assert bool((error <= 0.501 * value_scales[:, None] + 2e-6).all())


def test_a_norm_is_that_of_the_layer() -> None:
    from adapters.layers import row_kernels

    random_ = torch.Generator().manual_seed(0)
    sums = torch.randint(-30_000, 30_000, (9, 24), generator=random_, dtype=torch.int32)
    scales, residual = torch.rand(9, generator=random_), torch.randn(9, 24, generator=random_)
    factors, bias, weight, shift = (torch.rand(24, generator=random_) for _ in range(4))
    factors *= 1e-3
    states = torch.empty(9, 24)
    row_kernels.finish_and_norm(
        *(each.numpy() for each in (sums, scales, factors, bias, residual, weight, shift)),
        np.float32(1e-12),
        states.numpy(),
    )
    inputs = sums * scales.unsqueeze(1) * factors + bias + residual
    exact = functional.layer_norm(inputs, (24,), weight, shift, 1e-12)
    assert torch.allclose(states, exact, atol=1e-5)


# Products and layers


def test_a_product_differs_from_float32_by_its_rounding_only() -> None:
    from adapters.layers.int8 import Int8Linear, Rows

    torch.manual_seed(0)
    first, second = nn.Linear(64, 30), nn.Linear(64, 50)
    states = torch.randn(21, 64)
    with torch.inference_mode():
        product = Int8Linear(first, second)(Rows.of(states))
        exact = torch.cat([first(states), second(states)], dim=1)
    assert product.shape == exact.shape
    assert 0 < share(product, exact) < 0.02


def test_a_token_with_huge_values_does_not_touch_its_neighbours() -> None:
    from adapters.layers.int8 import Int8Linear, Rows

    linear, states = Int8Linear(nn.Linear(64, 30)), torch.randn(21, 64)
    with torch.inference_mode():
        before = linear(Rows.of(states))
        states[7] *= 1e6
        after = linear(Rows.of(states))
    rest = [row for row in range(21) if row != 7]
    assert torch.equal(before[rest], after[rest])
    assert not torch.equal(before[7], after[7])


@pytest.mark.parametrize("family", BERT_LIKE)
def test_a_layer_is_near_float32(family: str) -> None:
    layout, states = layout_of(), states_of(layout_of())
    exact, narrow = layer_of(backbone_of(family)), layer_of(int8_backbone(family))
    positions = torch.from_numpy(layout.starts)
    with torch.inference_mode():
        pairs = [
            (
                layer(states[None], attention_mask=None, layout=layout)[0],
                layer.read(states[None], positions, layout),
            )
            for layer in (narrow, exact)
        ]
    for one, other in zip(*pairs, strict=True):
        assert 0 < share(one, other) < LAYER_ERROR
    # Attention of one query sums in another order, and a sum may be rounded to another byte.
    assert share(pairs[0][1], pairs[0][0][positions]) < 0.01


def test_gradients_are_those_of_float32() -> None:
    layout, states = layout_of(), states_of(layout_of())[None].requires_grad_()
    gradients: list[Tensor] = []
    for backbone in (backbone_of("bert"), int8_backbone()):
        output = layer_of(backbone)(states, attention_mask=None, layout=layout)
        gradients += torch.autograd.grad(output.sum(), states)
    assert torch.equal(*gradients)


@pytest.mark.parametrize("threads", [1, 2])
def test_a_row_of_a_layer_is_the_same_to_the_bit_in_any_batch(threads: int) -> None:
    layer, before = layer_of(int8_backbone()), torch.get_num_threads()
    chosen = random.Random(0)
    torch.set_num_threads(threads)
    try:
        with torch.inference_mode():
            for _ in range(8):
                lengths = tuple(sorted(chosen.choices(range(1, 70), k=chosen.randint(2, 30))))
                layout = layout_of(lengths)
                states = states_of(layout)
                together = layer(states[None], attention_mask=None, layout=layout)[0]
                for start, end in zip(layout.starts, layout.ends, strict=True):
                    alone = layer(
                        states[None, start:end],
                        attention_mask=None,
                        layout=layout_of((int(end - start),)),
                    )[0]
                    assert torch.equal(alone, together[start:end])
    finally:
        torch.set_num_threads(before)


# Answers


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("family", BERT_LIKE)
def test_adapters_of_all_kinds_answer_in_one_batch_as_alone(family: str, threads: int) -> None:
    backbone = int8_backbone(family)
    before = torch.get_num_threads()

    @settings(max_examples=5, derandomize=True, deadline=None, database=None)
    @given(case=mixtures(backbone), shuffle=st.randoms(use_true_random=False))
    def compare(case: Case, shuffle: random.Random) -> None:
        adapters = adapters_of(backbone, case)
        order = list(range(len(case.texts)))
        shuffle.shuffle(order)
        together = classify_packed(backbone, adapters, tuple(case.texts[i] for i in order))
        for place, index in enumerate(order):
            (alone,) = classify_packed(backbone, adapters, (case.texts[index],))
            assert np.abs(together[place].scores - alone.scores).max() <= BOUND

    torch.set_num_threads(threads)
    try:
        compare()
    finally:
        torch.set_num_threads(before)


@pytest.mark.slow
def test_answers_of_the_default_backbone_are_near_float32_and_the_log_says_how_near(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    narrow, exact = (load_backbone(device="cpu", dtype=name) for name in ("int8", "float32"))
    assert (narrow.computes, exact.computes) == ("int8", "float32")
    (line,) = (record.getMessage() for record in caplog.records if "int8" in record.getMessage())
    assert 0 < float(line.split()[4]) < loading.USUAL_INT8_ERROR
    adapters = sorted(ZOO.glob("*.safetensors"))
    assert len(adapters) == 4
    texts = ["I was charged twice for one transfer", "Win a free prize now", "what a dull film", ""]
    for path in adapters:
        answers = []
        for backbone in (narrow, exact):
            adapter = prepare(load_adapter(path), backbone)
            inputs = [(0, backbone.encoder.encode(text, max_length=64)) for text in texts]
            batch = backbone.pack(rows_of([adapter], inputs))
            answers.append([answer.scores for answer in classify(backbone, batch, [adapter])])
        for one, other in zip(*answers, strict=True):
            assert 0 < np.abs(one - other).max() < ANSWER_ERROR


# What cannot run it


@pytest.mark.parametrize("family", [name for name in FAMILY_NAMES if name not in BERT_LIKE])
def test_a_family_with_other_layers_is_refused_by_name(family: str) -> None:
    with pytest.raises(UnusableBackbone, match=f"bert, electra, .*is of the family '{family}'"):
        int8_backbone(family)


def test_a_processor_without_the_instructions_is_refused_with_what_it_has(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    old = {"architecture": "x86_64", "cpu_name": "Old CPU", "avx": True, "avx2": True}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: old)
    with pytest.raises(UnusableBackbone, match=r"AVX512-VNNI.*Old CPU \(x86_64\) has AVX2$"):
        load_backbone("a backbone that is not read", device="cpu", dtype="int8")


def test_an_installation_without_the_compiler_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UnusableBackbone, match="pip install numba"):
        check_int8(torch.device("cpu"))


def test_a_gpu_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Some GPU")
    with pytest.raises(UnusableBackbone, match=r"the device is cuda:0 \(Some GPU\)"):
        check_int8(torch.device("cuda:0"))
