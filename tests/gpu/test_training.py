"""Training on a CUDA device: gradients through frozen layers; the generator over padded rows."""

import numpy as np
import pytest
import torch
from torch import Tensor

from adapters.backbone.model import Backbone
from adapters.layers import frozen
from adapters.packed.layout import Layout
from adapters.packed.prompt import token_weights, weighted_sums
from tests.support.tiny_models import make_backbone

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

LENGTHS = np.array([3, 5, 5, 9, 17, 17, 40])


def _through(
    backbone: Backbone, states: Tensor, upstream: Tensor, layout: Layout
) -> tuple[Tensor, Tensor]:
    inputs = states.clone().requires_grad_()
    hidden = backbone.run_layers(inputs, 0, 2, layout)
    starts = torch.from_numpy(layout.starts).to(states.device)
    outputs = backbone.read(hidden, starts, layout)
    outputs.backward(upstream)
    assert inputs.grad is not None
    return outputs.detach().float(), inputs.grad.float()


def test_gradients_through_frozen_layers_are_those_of_the_plain_modules(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """bfloat16 rounds to 8 bits, and sums have another order: 3 % of the largest value."""
    backbone = make_backbone(hidden_size=64).to(device="cuda", dtype=torch.bfloat16)
    layout = Layout(LENGTHS, torch.device("cuda"))
    random = torch.Generator(device="cuda").manual_seed(0)
    states, upstream = (
        torch.randn(size, 64, device="cuda", dtype=torch.bfloat16, generator=random)
        for size in (int(LENGTHS.sum()), len(LENGTHS))
    )
    ours = _through(backbone, states, upstream, layout)
    monkeypatch.setattr(frozen, "usable", lambda _: False)
    plain = _through(backbone, states, upstream, layout)
    for actual, expected in zip(ours, plain, strict=True):
        assert expected.abs().max() > 0
        assert float((actual - expected).abs().max() / expected.abs().max()) < 0.03


def test_padded_token_weights_are_those_by_run() -> None:
    """Equal to the CPU's within 1e-4: float32, with products in TF32 at most."""
    random = torch.Generator().manual_seed(0)
    tokens = int(LENGTHS.sum())
    queries, keys, states = (torch.randn(tokens, 16, generator=random) for _ in range(3))
    here, there = Layout(LENGTHS), Layout(LENGTHS, torch.device("cuda"))
    expected = token_weights(queries, keys, here)
    actual = token_weights(queries.cuda(), keys.cuda(), there)
    torch.testing.assert_close(actual.cpu(), expected, atol=1e-4, rtol=1e-3)
    sums = weighted_sums(states.cuda(), actual, there)
    torch.testing.assert_close(
        sums.cpu(), weighted_sums(states, expected, here), atol=1e-3, rtol=1e-3
    )
