"""The class head, and scores from its logits."""

from dataclasses import dataclass
from typing import Literal, Self

import torch
from torch import Tensor
from torch.nn import functional

from adapters.format.spec import HiddenActivation


@dataclass(frozen=True, slots=True)
class HeadWeights:
    """The tensors of one head, all float32.

    out: [n, labels]. dense: [n, n] in a head of two layers, else None. hidden: only used there.
    """

    dense: Tensor | None
    dense_bias: Tensor | None
    out: Tensor
    out_bias: Tensor
    hidden: HiddenActivation = HiddenActivation.TANH

    @classmethod
    def of(
        cls, tensors: dict[str, Tensor], hidden: HiddenActivation = HiddenActivation.TANH
    ) -> Self:
        """Of an adapter's tensors, named as in `AdapterSpec.shapes`."""
        return cls(
            dense=tensors.get("head.dense.weight"),
            dense_bias=tensors.get("head.dense.bias"),
            out=tensors["head.out.weight"],
            out_bias=tensors["head.out.bias"],
            hidden=hidden,
        )

    @property
    def tensors(self) -> list[Tensor]:
        """All that it has."""
        values = (self.dense, self.dense_bias, self.out, self.out_bias)
        return [value for value in values if value is not None]


def logits(states: Tensor, head: HeadWeights) -> Tensor:
    """In the head's type: [rows, n] -> [rows, labels]."""
    states = states.to(head.out.dtype)
    if head.dense is not None and head.dense_bias is not None:
        states = _activated(states @ head.dense + head.dense_bias, head.hidden)
    return states @ head.out + head.out_bias


def _activated(states: Tensor, activation: HiddenActivation) -> Tensor:
    match activation:
        case HiddenActivation.TANH:
            return torch.tanh(states)
        case HiddenActivation.RELU:
            return torch.relu(states)
        case HiddenActivation.GELU:
            return functional.gelu(states)


def scores(
    logits: Tensor, activation: Literal["softmax", "sigmoid"], temperature: float = 1.0
) -> Tensor:
    """`activation(logits / temperature)` in float32: [rows, labels] -> [rows, labels]."""
    scaled = logits.float() / temperature
    return scaled.softmax(dim=-1) if activation == "softmax" else scaled.sigmoid()
