"""Float8 in plain PyTorch, and Triton's interpreter with its rounding."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

LARGEST = 448.0
EPSILON = 2**-4


def quantised(states: Tensor, least: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Each row by its own scale, at least `least`: float32 values, and scales [T]."""
    scales = states.float().abs().amax(1).clamp(min=1e-20) / LARGEST
    if least is not None:
        scales = torch.maximum(scales, least)
    return rounded(states.float() * (1.0 / scales).unsqueeze(1)), scales


def rounded(values: Tensor) -> Tensor:
    """To the nearest number of float8 (e4m3), as float32; the largest beyond the ends."""
    return values.clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn).float()


def product(states: Tensor, linear: nn.Linear) -> Tensor:
    """Both quantised row by row, multiplied in float64: [T, outputs] in float32."""
    values, scales = quantised(states)
    weight, factors = quantised(linear.weight.detach())
    sums = values.double() @ weight.double().T
    return (sums * scales.unsqueeze(1) * factors + linear.bias.detach()).float()


def round_as_devices_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """For the rest of a test, Triton's interpreter casts float8 and bfloat16 as PyTorch does, and
    a row of a product does not depend on its place.

    Its own casts lose a carry into the exponent, cut off instead of rounding to even, and take the
    NaN of float8 for a number. Its products are those of a library for CPUs, which sums some rows
    in another order; in float64 that is lost when the sum is rounded.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    types = {
        tl.float32: torch.float32,
        tl.float16: torch.float16,
        tl.bfloat16: torch.bfloat16,
        tl.float8e4nv: torch.float8_e4m3fn,
    }
    own, patch_tensor = interpreter._convert_float, interpreter._patch_lang_tensor

    def convert(data: Any, source: Any, target: Any, mode: Any) -> Any:
        if source not in types or target not in types:
            return own(data, source, target, mode)
        bits = np.ascontiguousarray(data).reshape(-1).view(np.uint8).copy()
        states = torch.from_numpy(bits).view(types[source]).float()
        if target is tl.float8e4nv:
            states = rounded(states)
        narrow = states.to(types[target]).view(torch.uint8).numpy()
        width = f"uint{target.primitive_bitwidth}"
        return narrow.view(width).reshape(data.shape)

    def dot(_: Any, one: Any, other: Any, total: Any, *__: Any) -> Any:
        pair = [
            convert(each.data, each.dtype, tl.float32, None).view(np.float32)
            if each.dtype is tl.float8e4nv
            else each.data
            for each in (one, other)
        ]
        product = np.matmul(*pair, dtype=np.float64) + total.data
        return interpreter.TensorHandle(product.astype(total.data.dtype), total.dtype.scalar)

    def patch(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        # The end of a loop is an array of one number here, and `int` takes only plain ones.
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patch)
    monkeypatch.setattr(interpreter, "_convert_float", convert)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)
