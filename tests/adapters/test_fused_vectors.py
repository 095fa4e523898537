"""Vectors in training through fused kernels: outputs and gradients are those of autograd.

Without a CUDA device Triton interprets the kernels (see conftest.py), in float32 only;
tests/gpu/test_training.py trains with them compiled.
"""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

pytest.importorskip("triton", reason="Triton is not installed")

from adapters.layers.fused_vectors import shifted, unshifted, usable

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# float32, summed over positions in another order.
BOUND = 1e-4


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


# On both sides of a block's edge and of a program's.
@pytest.mark.slow
@pytest.mark.parametrize(("positions", "width"), [(1, 8), (33, 128), (129, 200)])
@pytest.mark.parametrize(("gelu", "multiplied"), [(False, False), (True, False), (True, True)])
def test_outputs_and_gradients_are_those_of_autograd(
    positions: int, width: int, gelu: bool, multiplied: bool
) -> None:
    product, slope = drawn(positions, width, seed=1), drawn(positions, width, seed=2)
    factor, bias = drawn(width, seed=3), drawn(width, seed=4)
    after = drawn(width, seed=5) if multiplied else None
    leaves = [
        each.clone().requires_grad_() for each in (product, factor, bias, after) if each is not None
    ]
    expected = torch.addcmul(leaves[2], leaves[0], leaves[1])
    if gelu:
        expected = functional.gelu(expected)
    if after is not None:
        expected = expected * leaves[3]
    gradients = torch.autograd.grad(expected, leaves, slope)
    output = shifted(product, factor, bias, gelu=gelu, after=after)
    torch.testing.assert_close(output, expected.detach(), rtol=BOUND, atol=BOUND)
    found = unshifted(slope, product, factor, bias, gelu=gelu, after=after)
    assert (found[3] is None) == (after is None)
    for one, other in zip((each for each in found if each is not None), gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=BOUND, atol=BOUND)


def test_kernels_that_disagree_with_pytorch_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    assert usable.__wrapped__(DEVICE, torch.float32)
    monkeypatch.setattr("adapters.layers.fused_vectors._error", lambda *_: float("nan"))
    assert not usable.__wrapped__(DEVICE, torch.float32)
