"""A BERT-like layer with frozen weights, for training: gradients pass through it to the prompt.

Autograd over the modules of `transformers` records some thirty small operations for each layer.
With frozen weights most of them need no gradient of their own. Here everything after attention is
one function with a handwritten gradient, and a CPU's products use oneDNN if it has it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from adapters.layers import onednn
from adapters.layers.attention import VARLEN_DTYPES, packed_attention
from adapters.packed.layout import Extents


@dataclass(frozen=True, slots=True)
class FrozenLinear:
    """x W^T + b, and its gradient g W, both without gradients of their own.

    forward: [T, inputs] -> [T, outputs]. backward: [T, outputs] -> [T, inputs].
    """

    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor], Tensor]

    @classmethod
    def of(cls, *linears: nn.Linear) -> "FrozenLinear":
        """One or more modules with the same input as one product."""
        first = linears[0].weight
        if first.device.type == "cpu" and first.dtype in onednn.types():
            forward = onednn.ReorderedLinear.of(*linears)
            return cls(forward.padded, onednn.ReorderedLinear.transposed(*linears).padded)
        weight = torch.cat([linear.weight for linear in linears]).detach()
        bias = torch.cat([linear.bias for linear in linears]).detach()
        return cls(
            lambda states: functional.linear(states, weight, bias),
            lambda gradient: gradient @ weight,
        )


@dataclass(frozen=True, slots=True)
class FrozenNorm:
    """A layer norm with frozen weights."""

    weight: Tensor
    bias: Tensor
    epsilon: float

    @classmethod
    def of(cls, norm: Any) -> "FrozenNorm":
        return cls(norm.weight.detach(), norm.bias.detach(), float(norm.eps))

    def forward(self, states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Normalised states, and mean and 1 / standard deviation for `backward`."""
        return torch.native_layer_norm(
            states, states.shape[-1:], self.weight, self.bias, self.epsilon
        )

    def backward(self, gradient: Tensor, states: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
        """The gradient of the states that were normalised."""
        states_gradient, _, _ = torch.ops.aten.native_layer_norm_backward(
            gradient,
            states,
            states.shape[-1:],
            mean,
            scale,
            self.weight,
            self.bias,
            [True, False, False],
        )
        assert isinstance(states_gradient, Tensor)
        return states_gradient


class FrozenLayer:
    """A layer and copies of its frozen weights (`adapters.layers.bert.FastLayer`)."""

    def __init__(self, layer: Any) -> None:
        self._layer = layer
        own = layer.attention.self
        self.copied = onednn.linears_of(layer)
        self._heads, self._size = own.num_attention_heads, own.attention_head_size
        self.projection = FrozenLinear.of(own.query, own.key, own.value)
        self._tail = _Tail(
            FrozenLinear.of(layer.attention.output.dense),
            FrozenNorm.of(layer.attention.output.LayerNorm),
            FrozenLinear.of(layer.intermediate.dense),
            FrozenLinear.of(layer.output.dense),
            FrozenNorm.of(layer.output.LayerNorm),
        )

    def forward(self, states: Tensor, layout: Extents) -> Tensor:
        """[T, n] -> [T, n]"""
        return self._finish(self._attend(states, layout), states)

    def read(self, states: Tensor, positions: Tensor, layout: Extents) -> Tensor:
        """As the last layer: [T, n] -> [positions, n]."""
        attended = self._attend(states, layout).index_select(0, positions)
        return self._finish(attended, states.index_select(0, positions))

    def _attend(self, states: Tensor, layout: Extents) -> Tensor:
        """[T, n] -> [T, n]"""
        if states.is_cuda and states.dtype in VARLEN_DTYPES:
            flash: Tensor = _FlashAttention.apply(states, self, layout)  # type: ignore[no-untyped-call]
            return flash
        projected: Tensor = _Linear.apply(states, self.projection)  # type: ignore[no-untyped-call]
        queries, keys, values = (
            part.transpose(0, 1).unsqueeze(0) for part in self.heads_of(projected)
        )
        attended, _ = packed_attention(
            self._layer.attention.self, queries, keys, values, None, layout=layout
        )
        return attended[0].flatten(1)

    def heads_of(self, projected: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values from `projection`: [T, 3 n] -> three [T, heads, d]."""
        return projected.view(len(projected), 3, self._heads, self._size).unbind(1)

    def _finish(self, attended: Tensor, residual: Tensor) -> Tensor:
        output: Tensor = _AfterAttention.apply(attended, residual, self._tail)  # type: ignore[no-untyped-call]
        return output


def usable(layer: Any) -> bool:
    """Whether `FrozenLayer` can run a layer: its activation must be the exact GELU."""
    return bool(layer.attention.self.config.hidden_act == "gelu")


@dataclass(frozen=True, slots=True)
class _Tail:
    """The weights after attention."""

    dense: FrozenLinear
    inner_norm: FrozenNorm
    intermediate: FrozenLinear
    output: FrozenLinear
    outer_norm: FrozenNorm


class _AfterAttention(torch.autograd.Function):
    """h = norm(x + dense(a)); norm(h + output(gelu(intermediate(h)))), of a and x [T, n]."""

    @staticmethod
    def forward(ctx: Any, attended: Tensor, residual: Tensor, tail: _Tail) -> Tensor:
        inner = tail.dense.forward(attended).add_(residual)
        states, inner_mean, inner_scale = tail.inner_norm.forward(inner)
        wide = tail.intermediate.forward(states)
        outer = tail.output.forward(functional.gelu(wide)).add_(states)
        output, outer_mean, outer_scale = tail.outer_norm.forward(outer)
        ctx.tail = tail
        ctx.save_for_backward(inner, inner_mean, inner_scale, wide, outer, outer_mean, outer_scale)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        tail: _Tail = ctx.tail
        inner, inner_mean, inner_scale, wide, outer, outer_mean, outer_scale = ctx.saved_tensors
        outer_gradient = tail.outer_norm.backward(gradient, outer, outer_mean, outer_scale)
        wide_gradient = torch.ops.aten.gelu_backward(tail.output.backward(outer_gradient), wide)
        states_gradient = tail.intermediate.backward(wide_gradient).add_(outer_gradient)
        inner_gradient = tail.inner_norm.backward(states_gradient, inner, inner_mean, inner_scale)
        return tail.dense.backward(inner_gradient), inner_gradient, None


class _FlashAttention(torch.autograd.Function):
    """Attention with the product before it, on CUDA: [T, n] -> [T, n].

    `varlen_attn` computes the same. But the host limits a training step, and the Python wrapper of
    `varlen_attn` costs too much time there.
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, layer: FrozenLayer, layout: Extents) -> Tensor:
        projected = layer.projection.forward(states)
        edges, longest = layout.cumulative, layout.longest
        attended, sums, random, unused, _ = torch.ops.aten._flash_attention_forward(
            *layer.heads_of(projected), edges, edges, longest, longest, 0.0, False, False
        )
        ctx.layer, ctx.longest = layer, longest
        ctx.save_for_backward(projected, attended, sums, random, unused, edges)
        flat: Tensor = attended.flatten(1)
        return flat

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        projected, attended, sums, random, unused, edges = ctx.saved_tensors
        parts = torch.ops.aten._flash_attention_backward(
            gradient.view_as(attended),
            *ctx.layer.heads_of(projected),
            attended,
            sums,
            edges,
            edges,
            ctx.longest,
            ctx.longest,
            0.0,
            False,
            random,
            unused,
        )
        return ctx.layer.projection.backward(torch.stack(parts, dim=1).flatten(1)), None, None


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, linear: FrozenLinear) -> Tensor:
        ctx.linear = linear
        return linear.forward(states)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        linear: FrozenLinear = ctx.linear
        return linear.backward(gradient.contiguous()), None
