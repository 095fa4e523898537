"""Rows of float8 between the kernels of `adapters.layers.float8`, and from layer to layer."""

from dataclasses import dataclass

import torch
from torch import Tensor

# The numbers of a row must be a multiple of this: its start is an address of the device's copies.
NARROW_ALIGNMENT = 16


@dataclass(frozen=True, slots=True)
class NarrowRows:
    """T rows of float8 (e4m3): states = values * scales.

    values: [T, n]. scales: float32 [T]. wide_scales: float32 [T], scales that are large enough for
    what the next product makes of each row; None: nobody needs them.
    """

    values: Tensor
    scales: Tensor
    wide_scales: Tensor | None = None

    @classmethod
    def empty(
        cls, rows: int, width: int, device: torch.device, *, wide: bool = False
    ) -> "NarrowRows":
        values = torch.empty(rows, width, dtype=torch.float8_e4m3fn, device=device)
        scales = torch.empty(rows, device=device)
        return cls(values, scales, torch.empty_like(scales) if wide else None)


@dataclass(frozen=True, slots=True)
class Bound:
    """What comes out for a row is not larger than the row's norm times `slope`, plus `most`."""

    slope: float
    most: float


class Handover:
    """Passes the output of a layer, in float8, to the layer that gets it as its input.

    It belongs to one tensor of states, which is kept until then: so nothing else has its address.
    """

    def __init__(self) -> None:
        self._kept: tuple[Tensor, NarrowRows] | None = None

    def put(self, states: Tensor, rows: NarrowRows) -> None:
        self._kept = (states, rows)

    def take(self, states: Tensor) -> NarrowRows | None:
        """The rows of these states, if they are the last ones that were put."""
        kept, self._kept = self._kept, None
        if kept is None or kept[0].data_ptr() != states.data_ptr():
            return None
        return kept[1] if kept[0].shape == states.shape else None
