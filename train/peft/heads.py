"""The head of a model for sequence classification, as an adapter's head."""

from typing import Any

import torch
from peft.tuners.ia3 import layer as ia3
from peft.tuners.lora import layer as lora
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from adapters.format.spec import Head, HeadKind, Pooling
from train.peft.saved import ADAPTER, SavedModel


def head_of(
    saved: SavedModel, *, prompted: bool, end_token: bool = False
) -> tuple[Head, dict[str, Tensor]]:
    """The head and its tensors; what PEFT changes in it is multiplied in.

    Args:
        prompted: there are virtual tokens in front, and an encoder's head reads the first of them.
        end_token: a causal model was trained on texts that end with `<|endoftext|>`, and reads it.

    Raises:
        PeftError: PEFT changes the head in another way than LoRA and IA3 do.
    """
    names = saved.names
    pooling = names.pooling
    if prompted and pooling is Pooling.ANSWER:
        pooling = Pooling.FIRST
    if end_token and pooling is Pooling.BEFORE_LAST:
        pooling = Pooling.ANSWER
    weight, bias = _linear(saved, names.out)
    tensors = {"head.out.weight": weight.T.contiguous(), "head.out.bias": bias}
    if names.dense is None:
        return Head(pooling=pooling), tensors
    weight, bias = _linear(saved, names.dense)
    tensors |= {"head.dense.weight": weight.T.contiguous(), "head.dense.bias": bias}
    return Head(kind=HeadKind.MLP, pooling=pooling, hidden=names.hidden), tensors


def _linear(saved: SavedModel, name: str) -> tuple[Tensor, Tensor]:
    """Weight [outputs, inputs] and bias [outputs] of one of the head's layers."""
    module: Any = saved.module(name)
    base: Any = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    assert isinstance(base, nn.Linear)
    weight = base.weight.detach()
    given: Tensor | None = base.bias
    bias = torch.zeros(len(weight)) if given is None else given.detach()
    if base is module:
        return weight, bias
    if saved.is_exactly(module, lora.Linear):
        return weight + module.get_delta_weight(ADAPTER).detach(), bias
    if saved.is_exactly(module, ia3.Linear):
        vector = module.ia3_l[ADAPTER].detach()  # [1, inputs] or [outputs, 1]
        return weight * vector, bias if module.is_feedforward else bias * vector.flatten()
    raise saved.folder.fault(f"{name}: a {type(module).__name__} cannot be part of a head")
