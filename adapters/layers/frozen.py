"""A BERT-like layer that gradients pass through on their way to a prompt, and never enter.

Knows no prompts; training is the only caller. Autograd over `transformers`' own modules records
some thirty small operations a layer. With frozen weights most of them need no gradient of their
own: what is behind attention is one function here, with its gradient written out, and products are
oneDNN's on a CPU that has it (`adapters.layers.onednn`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from adapters.layers import onednn
from adapters.layers.attention import VARLEN_DTYPES, packed_attention


@dataclass(frozen=True, slots=True)
class Product:
    """x W^T + b, and its gradient g W, both without gradients of their own.

    forth: [T, inputs] -> [T, outputs]. back: [T, outputs] -> [T, inputs].
    """

    forth: Callable[[Tensor], Tensor]
    back: Callable[[Tensor], Tensor]

    @classmethod
    def of(cls, *linears: nn.Linear) -> "Product":
        """One or more layers of the same input as one."""
        first = linears[0].weight
        if first.device.type == "cpu" and first.dtype in onednn.types():
            forth, back = onednn.Product.of(*linears), onednn.Product.transposed(*linears)
            return cls(forth.padded, back.padded)
        weight = torch.cat([linear.weight for linear in linears]).detach()
        bias = torch.cat([linear.bias for linear in linears]).detach()
        return cls(
            lambda states: functional.linear(states, weight, bias),
            lambda gradient: gradient @ weight,
        )


@dataclass(frozen=True, slots=True)
class Norm:
    """A layer norm's frozen weights."""

    weight: Tensor
    bias: Tensor
    epsilon: float

    @classmethod
    def of(cls, norm: Any) -> "Norm":
        return cls(norm.weight.detach(), norm.bias.detach(), float(norm.eps))

    def __call__(self, states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Normalised states, and what `back` wants: mean and 1 / standard deviation."""
        return torch.native_layer_norm(
            states, states.shape[-1:], self.weight, self.bias, self.epsilon
        )

    def back(self, gradient: Tensor, states: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
        """The gradient of what was normalised."""
        made, _, _ = torch.ops.aten.native_layer_norm_backward(
            gradient,
            states,
            states.shape[-1:],
            mean,
            scale,
            self.weight,
            self.bias,
            [True, False, False],
        )
        assert isinstance(made, Tensor)
        return made


class FrozenLayer:
    """The layer's weights, in the form in which they are multiplied."""

    def __init__(self, layer: Any) -> None:
        self._layer = layer
        own = layer.attention.self
        self.copied = onednn.linears_of(layer)
        self._heads, self._size = own.num_attention_heads, own.attention_head_size
        self.projection = Product.of(own.query, own.key, own.value)

    def forward(self, states: Tensor, layout: Any) -> Tensor:
        """[T, n] -> [T, n]; `layout` as `adapters.layers.attention` takes it."""
        return self._behind(self._attended(states, layout), states)

    def read(self, states: Tensor, positions: Tensor, layout: Any) -> Tensor:
        """As the last layer: [T, n] -> [positions, n]."""
        attended = self._attended(states, layout)
        chosen = (item.index_select(0, positions) for item in (attended, states))
        return self._behind(*chosen)

    def _attended(self, states: Tensor, layout: Any) -> Tensor:
        if states.is_cuda and states.dtype in VARLEN_DTYPES:
            made: Tensor = _Attended.apply(states, self, layout)  # type: ignore[no-untyped-call]
            return made
        queries, keys, values = (
            part.transpose(0, 1).unsqueeze(0)
            for part in self.projected(_multiplied(states, self.projection))
        )
        attended, _ = packed_attention(
            self._layer.attention.self, queries, keys, values, None, layout=layout
        )
        return attended[0].flatten(1)

    def projected(self, made: Tensor) -> tuple[Tensor, ...]:
        """What `projection` gave as queries, keys and values: [T, 3 n] -> three [T, heads, d]."""
        return made.view(len(made), 3, self._heads, self._size).unbind(1)

    def _behind(self, attended: Tensor, entering: Tensor) -> Tensor:
        made: Tensor = _Behind.apply(attended, entering, self._tail)  # type: ignore[no-untyped-call]
        return made

    @cached_property
    def _tail(self) -> "Tail":
        layer = self._layer
        return Tail(
            Product.of(layer.attention.output.dense),
            Norm.of(layer.attention.output.LayerNorm),
            Product.of(layer.intermediate.dense),
            Product.of(layer.output.dense),
            Norm.of(layer.output.LayerNorm),
        )


def usable(layer: Any) -> bool:
    """Whether a layer is one of these: its activation is the exact GELU."""
    return bool(layer.attention.self.config.hidden_act == "gelu")


@dataclass(frozen=True, slots=True)
class Tail:
    """What follows attention."""

    dense: Product
    inner_norm: Norm
    intermediate: Product
    output: Product
    outer_norm: Norm


class _Behind(torch.autograd.Function):
    """norm(x + dense(a)) = h; norm(h + output(gelu(intermediate(h)))), of a and x [T, n]."""

    @staticmethod
    def forward(ctx: Any, attended: Tensor, entering: Tensor, tail: Tail) -> Tensor:
        inner = tail.dense.forth(attended).add_(entering)
        states, inner_mean, inner_scale = tail.inner_norm(inner)
        wide = tail.intermediate.forth(states)
        outer = tail.output.forth(functional.gelu(wide)).add_(states)
        left, outer_mean, outer_scale = tail.outer_norm(outer)
        ctx.tail = tail
        ctx.save_for_backward(inner, inner_mean, inner_scale, wide, outer, outer_mean, outer_scale)
        return left

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        tail: Tail = ctx.tail
        inner, inner_mean, inner_scale, wide, outer, outer_mean, outer_scale = ctx.saved_tensors
        outer_gradient = tail.outer_norm.back(gradient, outer, outer_mean, outer_scale)
        wide_gradient = torch.ops.aten.gelu_backward(tail.output.back(outer_gradient), wide)
        states_gradient = tail.intermediate.back(wide_gradient).add_(outer_gradient)
        inner_gradient = tail.inner_norm.back(states_gradient, inner, inner_mean, inner_scale)
        return tail.dense.back(inner_gradient), inner_gradient, None


class _Attended(torch.autograd.Function):
    """Attention with the product before it, on CUDA: [T, n] -> [T, n].

    `varlen_attn` would do, but for what its Python wrapping costs in a step that the host, not the
    device, takes the time for.
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, layer: FrozenLayer, layout: Any) -> Tensor:
        made = layer.projection.forth(states)
        edges, longest = layout.cumulative, layout.longest
        attended, sums, random, unused, _ = torch.ops.aten._flash_attention_forward(
            *layer.projected(made), edges, edges, longest, longest, 0.0, False, False
        )
        ctx.layer, ctx.longest = layer, longest
        ctx.save_for_backward(made, attended, sums, random, unused, edges)
        flat: Tensor = attended.flatten(1)
        return flat

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        made, attended, sums, random, unused, edges = ctx.saved_tensors
        parts = torch.ops.aten._flash_attention_backward(
            gradient.view_as(attended),
            *ctx.layer.projected(made),
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
        return ctx.layer.projection.back(torch.stack(parts, dim=1).flatten(1)), None, None


class _Multiplied(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, product: Product) -> Tensor:
        ctx.product = product
        made: Tensor = product.forth(states)
        return made

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        product: Product = ctx.product
        made: Tensor = product.back(gradient.contiguous())
        return made, None


def _multiplied(states: Tensor, product: Product) -> Tensor:
    made: Tensor = _Multiplied.apply(states, product)  # type: ignore[no-untyped-call]
    return made
