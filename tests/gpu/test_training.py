"""Training on a CUDA device: gradients through frozen layers, and the generator's padded way."""

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
    backbone: Backbone, states: Tensor, wanted: Tensor, layout: Layout
) -> tuple[Tensor, Tensor]:
    entering = states.clone().requires_grad_()
    hidden = backbone.run_layers(entering, 0, 2, layout)
    starts = torch.from_numpy(layout.starts).to(states.device)
    left = backbone.read(hidden, starts, layout)
    left.backward(wanted)
    assert entering.grad is not None
    return left.detach().float(), entering.grad.float()


def test_gradients_through_frozen_layers_are_those_of_the_plain_modules(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """bfloat16 rounds to 8 bits, in another order here than there: 3 % of the largest value."""
    backbone = make_backbone(hidden_size=64).to(device="cuda", dtype=torch.bfloat16)
    layout = Layout(LENGTHS, torch.device("cuda"))
    random = torch.Generator(device="cuda").manual_seed(0)
    states, wanted = (
        torch.randn(size, 64, device="cuda", dtype=torch.bfloat16, generator=random)
        for size in (int(LENGTHS.sum()), len(LENGTHS))
    )
    ours = _through(backbone, states, wanted, layout)
    monkeypatch.setattr(frozen, "usable", lambda _: False)
    plain = _through(backbone, states, wanted, layout)
    for made, expected in zip(ours, plain, strict=True):
        assert expected.abs().max() > 0
        assert float((made - expected).abs().max() / expected.abs().max()) < 0.03


def test_padded_token_weights_are_those_by_run() -> None:
    """float32, products in TF32 at most: the CPU's to 1e-4."""
    random = torch.Generator().manual_seed(0)
    tokens = int(LENGTHS.sum())
    queries, keys, states = (torch.randn(tokens, 16, generator=random) for _ in range(3))
    here, there = Layout(LENGTHS), Layout(LENGTHS, torch.device("cuda"))
    expected = token_weights(queries, keys, here)
    made = token_weights(queries.cuda(), keys.cuda(), there)
    torch.testing.assert_close(made.cpu(), expected, atol=1e-4, rtol=1e-3)
    sums = weighted_sums(states.cuda(), made, there)
    torch.testing.assert_close(
        sums.cpu(), weighted_sums(states, expected, here), atol=1e-3, rtol=1e-3
    )
