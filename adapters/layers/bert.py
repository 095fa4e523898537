"""A layer of BERT, RoBERTa, XLM-R or ELECTRA, run by the fastest code that its device has.

Knows no prompts. A CPU has `adapters.layers.onednn`, a CUDA device `adapters.layers.fused`, gradients that only
pass through `adapters.layers.frozen`. Training the layer itself, the types that those do not take and
every other device go through the layer as `transformers` has it.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from adapters.layers import frozen, onednn
from adapters.layers.attention import VARLEN_DTYPES


class FastLayer(Protocol):
    """Other code for a layer's weights, none of which gets a gradient."""

    @property
    def copied(self) -> tuple[nn.Linear, ...]:
        """Whose weights it holds in a form of its own."""
        ...

    def forward(self, states: Tensor, layout: Any) -> Tensor:
        """[T, n] -> [T, n]"""
        ...

    def read(self, states: Tensor, positions: Tensor, layout: Any) -> Tensor:
        """As the last layer: [T, n] -> [positions, n]."""
        ...


class _Origin:
    """The weights that something was made from."""

    def __init__(self, linears: tuple[nn.Linear, ...]) -> None:
        self._linears = linears
        weights = _weights(linears)
        # Aliases: as long as they live, no other weight can stand at their address.
        self._aliases = tuple(weight.detach() for weight in weights)
        self._stamps = tuple(map(_stamp, weights))

    def current(self) -> bool:
        """Whether the weights are still those: a backbone may be cast, moved or loaded anew."""
        return tuple(map(_stamp, _weights(self._linears))) == self._stamps


@dataclass(frozen=True, slots=True)
class _Chosen:
    """What runs states of one kind; `layer` is None where `transformers` does."""

    device: torch.device
    dtype: torch.dtype
    layer: FastLayer | None
    origin: _Origin

    def suits(self, states: Tensor) -> bool:
        return states.dtype == self.dtype and states.device == self.device and self.origin.current()


class BertLayer(nn.Module):
    """A transformer layer, called as `transformers` calls it."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer
        self._chosen: _Chosen | None = None
        self._frozen: _Chosen | None = None
        self._changes = False

    def use_transformers(self) -> None:
        """From now on `transformers` runs it: its modules are replaced, or its weights trained."""
        self._changes = True

    def forward(self, states: Tensor, *, attention_mask: None, layout: Any) -> Tensor:
        """[1, T, n] -> [1, T, n]; `layout` as `adapters.layers.attention` takes it."""
        if (fast := self._fast(states)) is not None:
            return fast.forward(states[0], layout).unsqueeze(0)
        through: Tensor = self.layer(states, attention_mask=attention_mask, layout=layout)
        return through

    def read(self, states: Tensor, positions: Tensor, layout: Any) -> Tensor:
        """As the last layer: [1, T, n] -> [positions, n]."""
        if (fast := self._fast(states)) is not None:
            return fast.read(states[0], positions, layout)
        attended, _ = self.layer.attention.self(states, None, layout=layout)
        answers = self.layer.attention.output(attended[:, positions], states[:, positions])
        read: Tensor = self.layer.feed_forward_chunk(answers)[0]
        return read

    def _fast(self, states: Tensor) -> FastLayer | None:
        if self._changes or self.layer.training:
            return None
        if torch.is_grad_enabled():
            chosen = self._frozen
            if not frozen.usable(self.layer):
                return None
            if chosen is None or not chosen.suits(states):
                chosen = self._frozen = _choice(frozen.FrozenLayer(self.layer), states)
            return chosen.layer
        chosen = self._chosen
        if chosen is None or not chosen.suits(states):
            # One assignment: a CPU's lanes run the same layer at the same time.
            chosen = self._chosen = _choice(_fast_layer(self.layer, states), states)
        return chosen.layer


def _choice(layer: FastLayer | None, states: Tensor) -> _Chosen:
    origin = _Origin(() if layer is None else layer.copied)
    return _Chosen(states.device, states.dtype, layer, origin)


def _fast_layer(layer: Any, states: Tensor) -> FastLayer | None:
    if states.device.type == "cpu" and states.dtype in onednn.types():
        return onednn.OneDnnLayer(layer)
    if states.is_cuda and states.dtype in VARLEN_DTYPES:
        return _fused_layer(layer, states)
    return None


def _fused_layer(layer: Any, states: Tensor) -> FastLayer | None:
    try:
        # Imported here: Triton comes with PyTorch for CUDA alone, and not on every system.
        from adapters.layers import fused
    except ImportError:
        return None
    own = layer.attention.self
    usable = fused.usable(
        states.device, states.dtype, heads=own.num_attention_heads, size=own.attention_head_size
    )
    return fused.FusedLayer(layer) if usable else None


def _weights(linears: tuple[nn.Linear, ...]) -> list[Tensor]:
    return [weight for linear in linears for weight in (linear.weight, linear.bias)]


def _stamp(weight: Tensor) -> tuple[int, int]:
    """Address, and a count of changes in place; tensors made in inference mode have none."""
    return weight.data_ptr(), 0 if weight.is_inference() else weight._version
