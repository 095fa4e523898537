"""Launches the kernels for vectors in training (`adapters.layers.triton_vectors`).

PyTorch takes a kernel for each of product, sum, GELU and their gradients, and slow ones where the
vectors are float32 and the states are not.
"""

import logging
from functools import cache

import torch
import triton
from torch import Tensor
from torch.nn import functional

from adapters.layers import triton_vectors

logger = logging.getLogger(__name__)

_ROWS, _COLUMNS = 32, 64
# Blocks of rows whose sums a program adds up.
_STEPS = 4
# The largest rounding error of bfloat16, as a share of the largest number.
_ROUNDING = 0.02


def shifted(
    product: Tensor, factor: Tensor, bias: Tensor, *, gelu: bool, after: Tensor | None = None
) -> Tensor:
    """y factor + bias, with its GELU, and that times `after`: [T, width] -> [T, width].

    Args:
        product: y, contiguous. factor, bias, after: float32 [width].
    """
    assert product.is_contiguous(), product.stride()
    positions, width = product.shape
    out = torch.empty_like(product)
    grid = (triton.cdiv(positions, _ROWS), triton.cdiv(width, _COLUMNS))
    # Triton launches on the thread's current device, not on its arguments' device.
    with torch.cuda.device_of(product):
        triton_vectors.shift[grid](
            product,
            factor,
            bias,
            after,
            out,
            positions,
            WIDTH=width,
            GELU=gelu,
            AFTER=after is not None,
            ROWS=_ROWS,
            COLUMNS=_COLUMNS,
        )
    return out


def unshifted(
    gradient: Tensor,
    product: Tensor,
    factor: Tensor,
    bias: Tensor,
    *,
    gelu: bool,
    after: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The gradients of `shifted`: of y, factor, bias and `after`."""
    assert gradient.is_contiguous(), gradient.stride()
    assert product.is_contiguous(), product.stride()
    positions, width = product.shape
    below = torch.empty_like(product)
    parts = triton.cdiv(positions, _ROWS * _STEPS)
    vectors = 2 if after is None else 3
    sums = torch.empty(vectors, parts, width, dtype=torch.float32, device=product.device)
    with torch.cuda.device_of(product):
        triton_vectors.unshift[(parts, triton.cdiv(width, _COLUMNS))](
            gradient,
            product,
            factor,
            bias,
            after,
            below,
            sums,
            positions,
            WIDTH=width,
            GELU=gelu,
            AFTER=after is not None,
            ROWS=_ROWS,
            COLUMNS=_COLUMNS,
            STEPS=_STEPS,
        )
    of_factor, of_bias, *of_after = sums.sum(1).unbind()
    return below, of_factor, of_bias, of_after[0] if of_after else None


@cache
def usable(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernels compile for this device and agree with PyTorch; tried once."""
    try:
        error = _error(device, dtype)
    except Exception:
        logger.exception("fused vectors cannot be used on this device")
        return False
    if not error <= _ROUNDING:
        logger.error("fused vectors are not used: they differ from PyTorch by %g", error)
    return error <= _ROUNDING


def _error(device: torch.device, dtype: torch.dtype) -> float:
    """The largest difference on a few random positions, as a share of the largest number."""
    random = torch.Generator().manual_seed(0)
    states, slope = (torch.randn(70, 200, generator=random).to(device, dtype) for _ in range(2))
    factor, bias, after = (torch.randn(200, generator=random).to(device) for _ in range(3))
    leaves = [each.float().requires_grad_() for each in (states, factor, bias, after)]
    with torch.enable_grad():
        exact = functional.gelu(leaves[0] * leaves[1] + leaves[2]) * leaves[3]
        gradients = torch.autograd.grad(exact, leaves, slope.float())
    output = shifted(states, factor, bias, gelu=True, after=after)
    *found, of_after = unshifted(slope, states, factor, bias, gelu=True, after=after)
    assert of_after is not None
    pairs = [(output, exact.detach()), *zip((*found, of_after), gradients, strict=True)]
    shares = [(one - other).abs().max() / other.abs().max() for one, other in pairs]
    # One maximum, which NaN passes through.
    return float(torch.stack(shares).max())
