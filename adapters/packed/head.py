"""The class head, and scores from its logits."""

from dataclasses import dataclass
from typing import Literal, Self

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class HeadWeights:
    """The tensors of one head, all float32.

    out: [n, labels]. dense: [n, n] in a head of two layers, else None.
    """

    dense: Tensor | None
    dense_bias: Tensor | None
    out: Tensor
    out_bias: Tensor

    @classmethod
    def of(cls, tensors: dict[str, Tensor]) -> Self:
        """Of an adapter's tensors, named as in `AdapterSpec.shapes`."""
        return cls(
            dense=tensors.get("head.dense.weight"),
            dense_bias=tensors.get("head.dense.bias"),
            out=tensors["head.out.weight"],
            out_bias=tensors["head.out.bias"],
        )


def logits(states: Tensor, head: HeadWeights) -> Tensor:
    """In the head's type: [rows, n] -> [rows, labels]."""
    states = states.to(head.out.dtype)
    if head.dense is not None and head.dense_bias is not None:
        states = torch.tanh(states @ head.dense + head.dense_bias)
    return states @ head.out + head.out_bias


def scores(
    logits: Tensor, activation: Literal["softmax", "sigmoid"], temperature: float = 1.0
) -> Tensor:
    """`activation(logits / temperature)` in float32: [rows, labels] -> [rows, labels]."""
    scaled = logits.float() / temperature
    return scaled.softmax(dim=-1) if activation == "softmax" else scaled.sigmoid()
