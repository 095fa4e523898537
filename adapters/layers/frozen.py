"""A BERT-like layer with frozen weights, for training: gradients pass through it to the prompt.

Autograd over the modules of `transformers` records some thirty small operations for each layer.
With frozen weights most of them need no gradient of their own. Here everything after attention is
one function with a handwritten gradient, and a CPU's products use oneDNN if it has it. Vectors
inside the layer are part of these functions; LoRA's matrices are added around the frozen products.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from adapters.layers import onednn
from adapters.layers.attention import VARLEN_DTYPES, packed_attention
from adapters.layers.tuning import LayerTuning
from adapters.packed.layout import Extents
from adapters.packed.tuning import LoraChanges, Unchanged, VectorChanges

# The softmax of longer rows is computed again for the gradient: it would take too much memory.
KEPT_LENGTH = 64


@dataclass(frozen=True, slots=True)
class FrozenLinear:
    """x W^T + b, and its gradient g W, both without gradients of their own.

    forward: [T, inputs] -> [T, outputs]. backward: [T, outputs] -> [T, inputs]. pads: whether both
    pad T to one of a few sizes; where T is one of them, they copy nothing.
    """

    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor], Tensor]
    pads: bool = False

    @classmethod
    def of(cls, *linears: nn.Linear) -> "FrozenLinear":
        """One or more modules with the same input as one product."""
        first = linears[0].weight
        if first.device.type == "cpu" and first.dtype in onednn.types():
            forward = onednn.ReorderedLinear.of(*linears)
            return cls(forward.padded, onednn.ReorderedLinear.transposed(*linears).padded, True)
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

    def __call__(self, states: Tensor) -> Tensor:
        """With autograd's gradient."""
        shape = states.shape[-1:]
        return functional.layer_norm(states, shape, self.weight, self.bias, self.epsilon)

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

    def forward_tuned(self, states: Tensor, layout: Extents, tuning: LayerTuning) -> Tensor:
        """With an adapter's changes: [T, n] -> [T, n]."""
        return self._finish(self._attend(states, layout, tuning), states, tuning)

    def read_tuned(
        self, states: Tensor, positions: Tensor, layout: Extents, tuning: LayerTuning
    ) -> Tensor:
        """As the last layer, with an adapter's changes: [T, n] -> [positions, n]."""
        attended = self._attend(states, layout, tuning).index_select(0, positions)
        return self._finish(attended, states.index_select(0, positions), tuning.select(positions))

    def _attend(self, states: Tensor, layout: Extents, tuning: LayerTuning | None = None) -> Tensor:
        """[T, n] -> [T, n]"""
        vectors: tuple[Tensor | None, ...] = (None, None)
        if isinstance(tuning, VectorChanges):
            width = 3 * states.shape[1]
            vectors = tuning.factor[:width], tuning.bias[:width]
        elif tuning is not None and not isinstance(tuning, Unchanged):
            linear: Tensor = _Linear.apply(states, None, None, self.projection)  # type: ignore[no-untyped-call]
            return self._attend_projected(tuning.projection(states, linear), layout)
        if states.is_cuda and states.dtype in VARLEN_DTYPES:
            flash: Tensor = _FlashAttention.apply(states, *vectors, self, self.projection, layout)  # type: ignore[no-untyped-call]
            return flash
        projected: Tensor = _Linear.apply(states, *vectors, self.projection)  # type: ignore[no-untyped-call]
        return self._attend_projected(projected, layout)

    def _attend_projected(self, projected: Tensor, layout: Extents) -> Tensor:
        """[T, 3 n] -> [T, n]"""
        if projected.is_cuda and projected.dtype in VARLEN_DTYPES:
            flash: Tensor = _FlashAttention.apply(projected, None, None, self, None, layout)  # type: ignore[no-untyped-call]
            return flash
        if not projected.is_cuda:
            by_runs: Tensor = _RunAttention.apply(projected, self, layout)  # type: ignore[no-untyped-call]
            return by_runs
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

    def runs_of(self, projected: Tensor, layout: Extents) -> list[tuple[Tensor, ...]]:
        """Queries, keys and values of every run: three [rows, heads, length, d]."""
        return [
            rows.unflatten(2, (3, self._heads, self._size)).permute(2, 0, 3, 1, 4).unbind()
            for rows in layout.by_run(projected)
        ]

    def _finish(
        self, attended: Tensor, residual: Tensor, tuning: LayerTuning | None = None
    ) -> Tensor:
        vectors: tuple[Tensor | None, ...] = (None,) * 4
        if isinstance(tuning, VectorChanges):
            first, end = 3 * residual.shape[1], len(tuning.factor)
            vectors = (
                tuning.factor[first:],
                tuning.bias[first:end],
                tuning.bias[end:],
                tuning.activated_factor,
            )
        elif not (
            tuning is None
            or isinstance(tuning, Unchanged)
            or (isinstance(tuning, LoraChanges) and tuning.attention_only)
        ):
            return self._finish_by_steps(attended, residual, tuning)
        dropout = 0.0 if tuning is None else tuning.hidden_dropout
        output: Tensor = _AfterAttention.apply(attended, residual, *vectors, dropout, self._tail)  # type: ignore[no-untyped-call]
        return output

    def _finish_by_steps(self, attended: Tensor, residual: Tensor, tuning: LayerTuning) -> Tensor:
        """The same for changes between any of the steps."""
        tail = self._tail
        dense: Tensor = _Linear.apply(attended, None, None, tail.dense)  # type: ignore[no-untyped-call]
        states = tail.inner_norm(tuning.dense(attended, dense) + residual)
        up: Tensor = _Linear.apply(states, None, None, tail.intermediate)  # type: ignore[no-untyped-call]
        wide = tuning.activated(functional.gelu(tuning.up(states, up)))
        down: Tensor = _Linear.apply(wide, None, None, tail.output)  # type: ignore[no-untyped-call]
        return tail.outer_norm(tuning.down(wide, down) + states)


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
    """h = norm(x + dense(a)); norm(h + output(gelu(intermediate(h)))), of a and x [T, n].

    With vectors: gelu(intermediate(h) factor + bias) * activated, and output(...) + shift. dropout:
    the share of what is added to x and to h that is dropped.
    """

    @staticmethod
    def forward(
        ctx: Any,
        attended: Tensor,
        residual: Tensor,
        factor: Tensor | None,
        bias: Tensor | None,
        shift: Tensor | None,
        activated: Tensor | None,
        dropout: float,
        tail: _Tail,
    ) -> Tensor:
        tokens = len(attended)
        if tail.dense.pads:
            # Once for all products. The padding stays apart: no step after attention mixes rows.
            attended, residual = onednn.pad(attended), onednn.pad(residual)
        dense, dense_kept = _dropped(tail.dense.forward(attended), dropout)
        inner = dense.add_(residual)
        states, inner_mean, inner_scale = tail.inner_norm.forward(inner)
        wide = tail.intermediate.forward(states)
        hidden = _activated(wide, factor, bias, activated)
        down = tail.output.forward(hidden)
        if shift is not None:
            down.add_(shift)
        down, down_kept = _dropped(down, dropout)
        outer = down.add_(states)
        output, outer_mean, outer_scale = tail.outer_norm.forward(outer)
        ctx.tail, ctx.dropout = tail, dropout
        ctx.save_for_backward(
            *(inner, inner_mean, inner_scale, wide, outer, outer_mean, outer_scale),
            *(factor, bias, activated, dense_kept, down_kept),
        )
        return output[:tokens]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        tail: _Tail = ctx.tail
        inner, inner_mean, inner_scale, wide, outer, *saved = ctx.saved_tensors
        outer_mean, outer_scale, factor, bias, activated, dense_kept, down_kept = saved
        tokens = len(gradient)
        if tail.dense.pads:
            gradient = onednn.pad(gradient)
        outer_gradient = tail.outer_norm.backward(gradient, outer, outer_mean, outer_scale)
        down_gradient = _undropped(outer_gradient, down_kept, ctx.dropout)
        hidden_gradient = tail.output.backward(down_gradient)
        wide_gradient, factor_gradient, bias_gradient, activated_gradient = _unactivated(
            hidden_gradient, wide, factor, bias, activated
        )
        shift_gradient = None if factor is None else _sum(down_gradient)
        states_gradient = tail.intermediate.backward(wide_gradient).add_(outer_gradient)
        inner_gradient = tail.inner_norm.backward(states_gradient, inner, inner_mean, inner_scale)
        dense_gradient = _undropped(inner_gradient, dense_kept, ctx.dropout)
        return (
            *(tail.dense.backward(dense_gradient)[:tokens], inner_gradient[:tokens]),
            *(factor_gradient, bias_gradient, shift_gradient, activated_gradient, None, None),
        )


class _FlashAttention(torch.autograd.Function):
    """Attention with the product and the vectors before it, on CUDA: [T, n] -> [T, n].

    Without a projection the first argument is its result, [T, 3 n]. `varlen_attn` computes the
    same. But the host limits a training step, and the Python wrapper of `varlen_attn` costs too
    much time there.
    """

    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        factor: Tensor | None,
        bias: Tensor | None,
        layer: FrozenLayer,
        projection: FrozenLinear | None,
        layout: Extents,
    ) -> Tensor:
        product = states if projection is None else projection.forward(states)
        projected = _shifted(product, factor, bias)
        edges, longest = layout.cumulative, layout.longest
        attended, sums, random, unused, _ = torch.ops.aten._flash_attention_forward(
            *layer.heads_of(projected), edges, edges, longest, longest, 0.0, False, False
        )
        ctx.layer, ctx.projection, ctx.longest = layer, projection, longest
        ctx.save_for_backward(product, projected, factor, attended, sums, random, unused, edges)
        flat: Tensor = attended.flatten(1)
        return flat

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        product, projected, factor, attended, sums, random, unused, edges = ctx.saved_tensors
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
        gradient = torch.stack(parts, dim=1).flatten(1)
        gradient, *vector_gradients = _unshifted(gradient, product, factor)
        if ctx.projection is not None and ctx.needs_input_grad[0]:
            gradient = ctx.projection.backward(gradient)
        return gradient, *vector_gradients, None, None, None


class _RunAttention(torch.autograd.Function):
    """Attention on a CPU, run by run: queries, keys and values joined, [T, 3 n] -> [T, n].

    Short rows are faster with plain products than with the flash kernel, and autograd would record
    a dozen operations for each run.
    """

    @staticmethod
    def forward(ctx: Any, projected: Tensor, layer: FrozenLayer, layout: Extents) -> Tensor:
        attended = projected.new_empty(len(projected), projected.shape[1] // 3)
        ctx.shares = []
        runs = layer.runs_of(projected, layout)
        for (queries, keys, values), rows in zip(runs, layout.by_run(attended), strict=True):
            shares = _shares(queries, keys)
            _join(rows, queries).copy_(torch.matmul(shares, values))
            ctx.shares.append(shares if queries.shape[2] <= KEPT_LENGTH else None)
        ctx.layer, ctx.layout = layer, layout
        ctx.save_for_backward(projected)
        return attended

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        layer, layout = ctx.layer, ctx.layout
        (projected,) = ctx.saved_tensors
        below = torch.empty_like(projected)
        for (queries, keys, values), kept, rows, into in zip(
            layer.runs_of(projected, layout),
            ctx.shares,
            layout.by_run(gradient.contiguous()),
            layer.runs_of(below, layout),
            strict=True,
        ):
            shares = _shares(queries, keys) if kept is None else kept
            output = _join(rows, queries)
            weighted = torch.matmul(output, values.transpose(-1, -2))
            scores = torch.ops.aten._softmax_backward_data(weighted, shares, -1, shares.dtype)
            scores *= queries.shape[-1] ** -0.5
            for part, value in zip(
                into,
                (
                    torch.matmul(scores, keys),
                    torch.matmul(scores.transpose(-1, -2), queries),
                    torch.matmul(shares.transpose(-1, -2), output),
                ),
                strict=True,
            ):
                part.copy_(value)
        return below, None, None


def _shares(queries: Tensor, keys: Tensor) -> Tensor:
    """The softmax of attention: [rows, heads, length, length]."""
    scaled = queries * queries.shape[-1] ** -0.5
    shares: Tensor = torch.matmul(scaled, keys.transpose(-1, -2)).softmax(-1)
    return shares


def _join(rows: Tensor, like: Tensor) -> Tensor:
    """[rows, length, n] as a view [rows, heads, length, d]."""
    heads: Tensor = rows.unflatten(2, (like.shape[1], like.shape[3]))
    return heads.transpose(1, 2)


class _Linear(torch.autograd.Function):
    """A frozen product, with vectors times a factor plus a bias: [T, inputs] -> [T, outputs]."""

    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        factor: Tensor | None,
        bias: Tensor | None,
        linear: FrozenLinear,
    ) -> Tensor:
        product = linear.forward(states)
        ctx.linear = linear
        if factor is not None:
            ctx.save_for_backward(product, factor)
        return _shifted(product, factor, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        product, factor = ctx.saved_tensors or (None, None)
        gradient, *vector_gradients = _unshifted(gradient.contiguous(), product, factor)
        below = ctx.linear.backward(gradient) if ctx.needs_input_grad[0] else None
        return below, *vector_gradients, None


def _shifted(product: Tensor, factor: Tensor | None, bias: Tensor | None) -> Tensor:
    """product * factor + bias in the product's type, in one kernel: factors are float32."""
    if factor is None or bias is None:
        return product
    if (fused := _fused(product)) is not None:
        output: Tensor = fused.shifted(product, factor, bias, gelu=False)
        return output
    return torch.addcmul(bias, product, factor, out=torch.empty_like(product))


def _unshifted(
    gradient: Tensor, product: Tensor | None, factor: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The gradients of product, factor and bias."""
    if factor is None or product is None:
        return gradient, None, None
    if (fused := _fused(product)) is not None:
        # The bias has no part in them.
        below = fused.unshifted(gradient, product, factor, factor, gelu=False)
        return below[0], below[1], below[2]
    return _scaled(gradient, factor), _sum(gradient * product), _sum(gradient)


def _activated(
    wide: Tensor, factor: Tensor | None, bias: Tensor | None, after: Tensor | None
) -> Tensor:
    """gelu(wide factor + bias) after"""
    if factor is not None and bias is not None and (fused := _fused(wide)) is not None:
        output: Tensor = fused.shifted(wide, factor, bias, gelu=True, after=after)
        return output
    hidden = functional.gelu(_shifted(wide, factor, bias))
    return hidden if after is None else hidden.mul_(after)


def _unactivated(
    gradient: Tensor,
    wide: Tensor,
    factor: Tensor | None,
    bias: Tensor | None,
    after: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of wide, factor, bias and after."""
    if factor is not None and bias is not None and (fused := _fused(wide)) is not None:
        below, *vectors = fused.unshifted(gradient, wide, factor, bias, gelu=True, after=after)
        return below, vectors[0], vectors[1], vectors[2]
    shifted, after_gradient = _shifted(wide, factor, bias), None
    if after is not None:
        after_gradient = _sum(gradient * functional.gelu(shifted))
        gradient = _scaled(gradient, after)
    gradient = torch.ops.aten.gelu_backward(gradient, shifted)
    return *_unshifted(gradient, wide, factor), after_gradient


def _fused(states: Tensor) -> Any:
    """`adapters.layers.fused_vectors`, if its kernels can take these states."""
    if not (states.is_cuda and states.dtype in VARLEN_DTYPES and states.is_contiguous()):
        return None
    try:
        # Imported here: Triton comes only with PyTorch for CUDA, and not on every system.
        from adapters.layers import fused_vectors
    except ImportError:
        return None
    return fused_vectors if fused_vectors.usable(states.device, states.dtype) else None


def _scaled(states: Tensor, factor: Tensor) -> Tensor:
    """In the states' type, in one kernel."""
    return torch.mul(states, factor, out=torch.empty_like(states))


def _dropped(states: Tensor, share: float) -> tuple[Tensor, Tensor | None]:
    """With a share of the values at zero and the others raised; which values were kept."""
    if not share:
        return states, None
    kept: tuple[Tensor, Tensor] = torch.native_dropout(states, share, True)
    return kept


def _undropped(gradient: Tensor, kept: Tensor | None, share: float) -> Tensor:
    if kept is None:
        return gradient
    below: Tensor = torch.ops.aten.native_dropout_backward(gradient, kept, 1 / (1 - share))
    return below


def _sum(gradient: Tensor) -> Tensor:
    """Over all positions: [T, width] -> float32 [width], or float64 if the gradient is."""
    dtype = torch.promote_types(gradient.dtype, torch.float32)
    return gradient.sum(0, dtype=dtype)
