"""A layer of BERT, RoBERTa, XLM-R or ELECTRA, run by the fastest code for its device.

`onednn` runs it on a CPU, `fused` on a CUDA device, and `frozen` when gradients pass through it.
Everything else runs the layer as `transformers` has it: other devices and types, and training of
the layer itself.
"""

from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from adapters.layers import frozen, onednn, plain
from adapters.layers.attention import VARLEN_DTYPES
from adapters.layers.narrow import Handover
from adapters.layers.plain import LayerParts
from adapters.layers.tuning import LayerTuning
from adapters.packed.layout import Extents


class FastLayer(Protocol):
    """Other code for a layer's weights; no weight gets a gradient."""

    @property
    def copied(self) -> tuple[nn.Linear, ...]:
        """The modules whose weights it holds as copies."""
        ...

    def forward(self, states: Tensor, layout: Extents) -> Tensor:
        """[T, n] -> [T, n]"""
        ...

    def read(self, states: Tensor, positions: Tensor, layout: Extents) -> Tensor:
        """As the last layer: [T, n] -> [positions, n]."""
        ...


@runtime_checkable
class TunableLayer(FastLayer, Protocol):
    """A `FastLayer` that applies the adapters' changes as well."""

    def forward_tuned(self, states: Tensor, layout: Extents, tuning: LayerTuning) -> Tensor:
        """[T, n] -> [T, n]"""
        ...

    def read_tuned(
        self, states: Tensor, positions: Tensor, layout: Extents, tuning: LayerTuning
    ) -> Tensor:
        """As the last layer: [T, n] -> [positions, n]."""
        ...


class _Choice:
    """The code for states of one device and type; `layer` is None if `transformers` runs them."""

    def __init__(self, layer: FastLayer | None, states: Tensor) -> None:
        self.layer = layer
        self._device, self._dtype = states.device, states.dtype
        self._linears = () if layer is None else layer.copied
        weights = _weights(self._linears)
        # These aliases keep the weights' memory, so no other weight can get the same address.
        self._aliases = tuple(weight.detach() for weight in weights)
        self._stamps = tuple(map(_stamp, weights))

    def suits(self, states: Tensor) -> bool:
        """False also once the weights have changed: a backbone may be cast, moved or reloaded."""
        return (
            states.dtype == self._dtype
            and states.device == self._device
            and tuple(map(_stamp, _weights(self._linears))) == self._stamps
        )


class BertLayer(nn.Module):
    """A transformer layer with the signature that it has in `transformers`."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer
        self._chosen: _Choice | None = None
        self._frozen: _Choice | None = None
        self._only_transformers = False
        self._int8 = False
        self._handover: Handover | None = None

    def use_transformers(self) -> None:
        """Only `transformers` runs it from now on: its modules or weights will change."""
        self._only_transformers = True

    def use_int8(self, used: bool) -> None:
        """Whether its products are in int8, where no gradient is needed (`adapters.layers.int8`).

        Its states must be float32 on a CPU.
        """
        self._int8, self._chosen = used, None

    def use_float8(self, handover: Handover | None) -> None:
        """Whether its products are in float8, where no gradient is needed
        (`adapters.layers.float8`): its states must be bfloat16 on a CUDA device.

        Args:
            handover: shared with the layers before and after it; None: no longer.
        """
        self._handover, self._chosen = handover, None

    @property
    def parts(self) -> LayerParts:
        """Its modules, for batches whose adapters tune them."""
        layer = self.layer
        own = layer.attention.self
        return LayerParts(
            attention=own,
            heads=own.num_attention_heads,
            projection=(own.query, own.key, own.value),
            dense=layer.attention.output.dense,
            attention_norm=layer.attention.output.LayerNorm,
            up=layer.intermediate.dense,
            activation=layer.intermediate.intermediate_act_fn,
            down=layer.output.dense,
            output_norm=layer.output.LayerNorm,
        )

    def forward(self, states: Tensor, *, attention_mask: None, layout: Extents) -> Tensor:
        """[1, T, n] -> [1, T, n]"""
        if (fast := self._fast(states)) is not None:
            return fast.forward(states[0], layout).unsqueeze(0)
        output: Tensor = self.layer(states, attention_mask=attention_mask, layout=layout)
        return output

    def read(self, states: Tensor, positions: Tensor, layout: Extents) -> Tensor:
        """As the last layer: [1, T, n] -> [positions, n]."""
        if (fast := self._fast(states)) is not None:
            return fast.read(states[0], positions, layout)
        attended, _ = self.layer.attention.self(states, None, layout=layout)
        inner = self.layer.attention.output(attended[:, positions], states[:, positions])
        output: Tensor = self.layer.feed_forward_chunk(inner)[0]
        return output

    def forward_tuned(self, states: Tensor, layout: Extents, tuning: LayerTuning) -> Tensor:
        """With the adapters' changes: [T, n] -> [T, n]."""
        fast = self._fast(states)
        if isinstance(fast, TunableLayer):
            return fast.forward_tuned(states, layout, tuning)
        return plain.forward(self.parts, states, layout, tuning)

    def read_tuned(
        self, states: Tensor, positions: Tensor, layout: Extents, tuning: LayerTuning
    ) -> Tensor:
        """As the last layer, with the adapters' changes: [T, n] -> [positions, n]."""
        fast = self._fast(states)
        if isinstance(fast, TunableLayer):
            return fast.read_tuned(states, positions, layout, tuning)
        return plain.read(self.parts, states, positions, layout, tuning)

    def _fast(self, states: Tensor) -> FastLayer | None:
        if self._only_transformers or self.layer.training:
            return None
        if torch.is_grad_enabled():
            choice = self._frozen
            if not frozen.usable(self.layer):
                return None
            if choice is None or not choice.suits(states):
                choice = self._frozen = _Choice(frozen.FrozenLayer(self.layer), states)
            return choice.layer
        choice = self._chosen
        if choice is None or not choice.suits(states):
            # One assignment: several lanes of a CPU run the same layer at the same time.
            choice = self._chosen = _Choice(self._fast_layer(states), states)
        return choice.layer

    def _fast_layer(self, states: Tensor) -> FastLayer | None:
        if self._int8 and states.device.type == "cpu" and states.dtype == torch.float32:
            # Imported here: Numba is only there where int8 was asked for.
            from adapters.layers.int8 import Int8Layer

            return Int8Layer(self.layer)
        if self._handover is not None and states.is_cuda and states.dtype in VARLEN_DTYPES:
            # Imported here: Triton comes only with PyTorch for CUDA, and not on every system.
            from adapters.layers.float8 import Float8Layer

            return Float8Layer(self.layer, self._handover)
        return _fast_layer(self.layer, states)


def _fast_layer(layer: Any, states: Tensor) -> FastLayer | None:
    if states.device.type == "cpu" and states.dtype in onednn.types():
        return onednn.OneDnnLayer(layer)
    if states.is_cuda and states.dtype in VARLEN_DTYPES:
        return _fused_layer(layer, states)
    return None


def _fused_layer(layer: Any, states: Tensor) -> FastLayer | None:
    try:
        # Imported here: Triton comes only with PyTorch for CUDA, and not on every system.
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
    """Address, and the number of changes in place, which inference tensors do not count."""
    return weight.data_ptr(), 0 if weight.is_inference() else weight._version
