"""BERT-like layers through the fused kernels give the same states as through `transformers`.

Without a CUDA device Triton interprets the kernels (see conftest.py), in float32 and float16 only;
tests/gpu/test_fused.py tests them compiled, in bfloat16.
"""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

pytest.importorskip("triton", reason="Triton is not installed")

from adapters.layers.fused import FusedLayer, Tiling, add_norm, attend, tiling_of, usable
from adapters.packed.layout import Layout
from tests.support.families import HIDDEN, config_of, model_from, model_of

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BERT_LIKE = ("bert", "roberta", "xlm-roberta", "electra")
# Empty rows first, last and between; lengths on both sides of a block's edge.
LENGTHS = (0, 1, 31, 32, 0, 0, 33, 64, 65, 130, 0)
TAIL = 7
# float32, summed in another order: some units in the last place of states around one.
FLOAT32_ERROR = 1e-5
# float16 has 11 bits: shares and sums of values up to four are rounded once each.
FLOAT16_ERROR = 4e-3


def cumulative_of(lengths: tuple[int, ...]) -> Tensor:
    return torch.tensor((0, *lengths)).cumsum(0).to(DEVICE, torch.int32)


def projected(
    tokens: int, *, heads: int = 2, size: int = 16, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Queries, keys and values of one product: [T, 3, heads, d]."""
    random = torch.Generator().manual_seed(0)
    return torch.randn(tokens, 3, heads, size, generator=random).to(DEVICE, dtype)


def expected(states: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """Attention of each row by itself, in float32: [T, heads * d]."""
    rows = [
        functional.scaled_dot_product_attention(*row.float().permute(1, 2, 0, 3)).transpose(0, 1)
        for row in states.split(lengths)
    ]
    return torch.cat(rows).flatten(1)


def layer_of(model: Any) -> Any:
    return model.to(DEVICE).requires_grad_(False).encoder.layer[0]


def plain(layer: Any, states: Tensor, layout: Layout) -> Tensor:
    """Through the layer of `transformers`, row by row: [T, n] -> [T, n]."""
    rows = states.split(layout.lengths.tolist())
    return torch.cat([layer(row.unsqueeze(0))[0] for row in rows])


def states_of(tokens: int) -> Tensor:
    return torch.randn(tokens, HIDDEN, generator=torch.Generator().manual_seed(0)).to(DEVICE)


def layout_of(*lengths: int) -> Layout:
    return Layout(np.array(lengths, dtype=np.int64), DEVICE)


def difference(some: Tensor, others: Tensor) -> float:
    assert some.shape == others.shape
    return float((some.float() - others.float()).abs().max())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, FLOAT32_ERROR), (torch.float16, FLOAT16_ERROR)]
)
@pytest.mark.parametrize("size", [8, 16, 24, 32, 64])
def test_every_row_attends_to_itself(size: int, dtype: torch.dtype, bound: float) -> None:
    tokens = sum(LENGTHS)
    states = projected(tokens + TAIL, size=size, dtype=dtype)
    states[tokens:] = math.nan  # after the last row: it must reach no row
    output = attend(states, cumulative_of(LENGTHS), longest=max(LENGTHS))
    assert output.dtype == dtype
    assert output.is_contiguous()
    assert difference(output[:tokens], expected(states[:tokens], LENGTHS)) < bound


@pytest.mark.parametrize("lengths", [(1,), (32, 5, 0, 17), (16,) * 3])
def test_short_rows_attend_to_themselves(lengths: tuple[int, ...]) -> None:
    states = projected(sum(lengths))
    output = attend(states, cumulative_of(lengths), longest=max(lengths))
    assert difference(output, expected(states, lengths)) < FLOAT32_ERROR


def test_scores_far_apart_do_not_overflow() -> None:
    states = projected(130, dtype=torch.float16) * 30
    output = attend(states, cumulative_of((130,)), longest=130)
    # Values are thirty times as large.
    assert difference(output, expected(states, (130,))) < 30 * FLOAT16_ERROR


def test_a_row_gets_the_same_bits_beside_any_neighbours() -> None:
    lengths = (5, 64, 0, 33, 130, 70)
    states = projected(sum(lengths), size=24)
    mixed = attend(states, cumulative_of(lengths), longest=max(lengths))
    for row, together in zip(states.split(lengths), mixed.split(lengths), strict=True):
        own = cumulative_of((len(row),))
        alone = attend(row, own, longest=max(lengths))
        assert torch.equal(alone, together)


@pytest.mark.slow
def test_a_row_gets_the_same_bits_however_many_programs_share_it() -> None:
    states = projected(sum(LENGTHS))
    rows = cumulative_of(LENGTHS)
    first, *others = (
        attend(states, rows, longest=max(LENGTHS), tiling=Tiling(block=32, parts=parts))
        for parts in (1, 2, 5, 9)
    )
    assert difference(first, expected(states, LENGTHS)) < FLOAT32_ERROR
    assert all(torch.equal(first, other) for other in others)


def test_few_rows_are_shared_by_programs_and_many_are_not() -> None:
    assert tiling_of(1, 12, 32) == Tiling(block=32, parts=1)
    assert tiling_of(1, 12, 512) == Tiling(block=64, parts=8)
    assert tiling_of(700, 12, 512).parts == 1


@pytest.mark.parametrize(
    ("dtype", "bound"),
    [(torch.float32, FLOAT32_ERROR), (torch.float16, FLOAT16_ERROR), (torch.bfloat16, 0.04)],
)
@pytest.mark.parametrize("n", [24, 64, 768])
def test_a_sum_is_normalised(n: int, dtype: torch.dtype, bound: float) -> None:
    random = torch.Generator().manual_seed(0)
    states, residual = torch.randn(2, 9, n, generator=random).to(DEVICE, dtype)
    norm = nn.LayerNorm(n, eps=0.1).requires_grad_(False)
    norm.weight.normal_(generator=random)
    norm.bias.normal_(generator=random)
    norm = norm.to(DEVICE, dtype)
    exact = functional.layer_norm(
        states.float() + residual.float(), (n,), norm.weight.float(), norm.bias.float(), norm.eps
    )
    output = add_norm(states, residual, norm)
    assert output.dtype == dtype
    assert difference(output, exact) < bound


def test_a_norm_of_states_far_from_zero_is_exact() -> None:
    states = states_of(5) + 1000
    norm = nn.LayerNorm(HIDDEN).requires_grad_(False).to(DEVICE)
    exact = functional.layer_norm(states.double(), (HIDDEN,))
    # A thousand in float32 is known to 6e-5.
    assert difference(add_norm(states, torch.zeros_like(states), norm), exact) < 5e-4


@pytest.mark.slow
@pytest.mark.parametrize("family", BERT_LIKE)
def test_a_layer_gives_what_transformers_gives(family: str) -> None:
    layer, layout = layer_of(model_of(family)), layout_of(1, 3, 3, 40)
    states = states_of(layout.tokens)
    with torch.inference_mode():
        output = FusedLayer(layer).forward(states, layout)
        assert difference(output, plain(layer, states, layout)) < FLOAT32_ERROR


@pytest.mark.parametrize("family", BERT_LIKE)
def test_a_read_gives_the_last_layer_at_the_positions(family: str) -> None:
    layer, layout = layer_of(model_of(family)), layout_of(1, 3, 3, 40)
    states, positions = states_of(layout.tokens), torch.tensor([7, 0, 4, 4, 46], device=DEVICE)
    with torch.inference_mode():
        output = FusedLayer(layer).read(states, positions, layout)
        assert difference(output, plain(layer, states, layout)[positions]) < FLOAT32_ERROR


def test_another_activation_runs_as_in_the_layer() -> None:
    config = config_of("bert")
    config.hidden_act = "relu"
    layer, layout = layer_of(model_from(config)), layout_of(2, 5)
    states = states_of(layout.tokens)
    with torch.inference_mode():
        output = FusedLayer(layer).forward(states, layout)
        assert difference(output, plain(layer, states, layout)) < FLOAT32_ERROR


def test_positions_after_the_last_row_reach_no_row() -> None:
    layer = FusedLayer(layer_of(model_of("bert")))
    states = states_of(20)
    with torch.inference_mode():
        without_tail = layer.forward(states, layout_of(13, 7))
        longer = torch.cat([states, torch.full((TAIL, HIDDEN), math.nan, device=DEVICE)])
        output = layer.forward(longer, layout_of(13, 7, 0, 0))
    assert output.shape == longer.shape
    assert difference(output[:20], without_tail) < FLOAT32_ERROR


def test_kernels_that_fail_or_are_wrong_are_not_used(caplog: pytest.LogCaptureFixture) -> None:
    assert usable(DEVICE, torch.float16, heads=2, size=16)
    assert not caplog.records
    # No kernel takes such a head.
    assert not usable(DEVICE, torch.float16, heads=1, size=256)
    assert "cannot be used" in caplog.text
    caplog.clear()
    # Interpreted, products of bfloat16 are those of its bits; compiled, nothing takes the host's.
    assert not usable(torch.device("cpu"), torch.bfloat16, heads=2, size=16)
    assert caplog.records
