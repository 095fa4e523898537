"""An adapter's head as the layers of a family's model for sequence classification."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adapters.backbone.model import Backbone
from adapters.format.spec import AdapterSpec, HeadKind, HiddenActivation
from train.errors import PeftError
from train.peft.names import Names

# tanh(x) is x up to a share of x^2 / 3, so a linear head may pass through it at this scale: a logit
# of 20 changes by 2 in a million. A power of two, so scaling itself rounds nothing.
_SMALL = 2.0**-13


def head_layers(
    spec: AdapterSpec, tensors: Mapping[str, Tensor], names: Names, host: Backbone, path: Path
) -> dict[str, Tensor]:
    """Weights by name; the temperature is divided out.

    Raises:
        PeftError: no weights of these layers give the same logits.
    """
    temperature = spec.calibration.temperature
    out = tensors["head.out.weight"] / temperature
    bias = tensors["head.out.bias"] / temperature
    if names.dense is None:
        if spec.head.kind is HeadKind.MLP:
            raise PeftError(f"{path}: PEFT cannot express this adapter: its head has two layers")
        return {f"{names.out}.weight": _without_bias(out, bias, host, path).T}
    if spec.head.kind is HeadKind.MLP:
        if spec.head.hidden is not names.hidden:
            raise PeftError(
                f"{path}: PEFT cannot express this adapter: its head has the activation "
                f"{spec.head.hidden}, that of a {host.model_type} has {names.hidden}"
            )
        dense, dense_bias = tensors["head.dense.weight"], tensors["head.dense.bias"]
    else:
        dense, out = _through(out, names.hidden, path)
        dense_bias = torch.zeros(len(dense))
    return {
        f"{names.dense}.weight": dense.T,
        f"{names.dense}.bias": dense_bias,
        f"{names.out}.weight": out.T,
        f"{names.out}.bias": bias,
    }


def _through(out: Tensor, hidden: HiddenActivation, path: Path) -> tuple[Tensor, Tensor]:
    """Two layers, [n, n] and [n, labels], that compute what one computes.

    relu(x) - relu(-x) is x, and so is gelu(x) - gelu(-x): each logit takes two of the n units. With
    tanh it takes one.
    """
    n, labels = out.shape
    dense, second = torch.zeros(n, n), torch.zeros(n, labels)
    signs = (1.0,) if hidden is HiddenActivation.TANH else (1.0, -1.0)
    if labels * len(signs) > n:
        raise PeftError(
            f"{path}: PEFT cannot express this adapter: a linear head of {labels} labels does not "
            f"pass through {n} units of {hidden}"
        )
    scale = _SMALL if hidden is HiddenActivation.TANH else 1.0
    for index, sign in enumerate(signs):
        units = slice(index * labels, (index + 1) * labels)
        dense[:, units] = out * (sign * scale)
        second[units] = torch.eye(labels) * (sign / scale)
    return dense, second


def _without_bias(out: Tensor, bias: Tensor, host: Backbone, path: Path) -> Tensor:
    """Weights [n, labels] of a head that has no bias.

    The last norm gives g * z + b with z of mean zero. So the weights 1 / g give the same number for
    every text, the sum of b / g, and a multiple of it is the bias.
    """
    if not bool(bias.any()):
        return out
    model: Any = host.editable_model()
    gain, shift = model.ln_f.weight.detach(), model.ln_f.bias.detach()
    constant = (shift / gain).sum()
    if not bool(torch.isfinite(constant)) or float(constant.abs()) < 1e-2:
        raise PeftError(
            f"{path}: PEFT cannot express this adapter: its head has a bias, that of GPT-2 has none"
        )
    return out + torch.outer(1 / gain, bias / constant)
