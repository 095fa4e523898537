"""Whether weights are numbers. Knows no adapter."""

import torch
from torch import Tensor


def all_finite(*tensors: Tensor) -> bool:
    """Whether every value is a finite number, as float32 too; one look back at a device."""
    # A sum is finite only if all its terms are, and takes a tenth of looking at each of them; one
    # that is not may still have overflown.
    sums = torch.stack([tensor.sum(dtype=torch.float32) for tensor in tensors])
    if bool(sums.isfinite().all()):
        return True
    return all(bool(tensor.float().isfinite().all()) for tensor in tensors)
