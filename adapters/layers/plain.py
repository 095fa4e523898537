"""A layer of any supported family, written out, so that a `LayerTuning` can change it.

Untuned batches run the modules of `transformers` or faster code. This runs tuned batches where no
faster code does.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from adapters.layers.attention import packed_attention
from adapters.layers.tuning import LayerTuning
from adapters.packed.layout import Extents


@dataclass(frozen=True, slots=True)
class LayerParts:
    """The modules of a layer.

    attention: has the scale and whether a position sees later ones. projection: for queries, keys
    and values; one module if the model has them joined. norm_first: norms come before attention and
    feed-forward part (GPT-2), not after the residuals are added.
    """

    attention: Any
    heads: int
    projection: tuple[nn.Module, ...]
    dense: nn.Module
    attention_norm: nn.Module
    up: nn.Module
    activation: Callable[[Tensor], Tensor]
    down: nn.Module
    output_norm: nn.Module
    norm_first: bool = False


def forward(parts: LayerParts, states: Tensor, layout: Extents, tuning: LayerTuning) -> Tensor:
    """[T, n] -> [T, n]"""
    return _finish(parts, _attended(parts, states, layout, tuning), states, tuning)


def read(
    parts: LayerParts, states: Tensor, positions: Tensor, layout: Extents, tuning: LayerTuning
) -> Tensor:
    """As the last layer, for some positions: [T, n] -> [positions, n]."""
    attended = _attended(parts, states, layout, tuning).index_select(0, positions)
    return _finish(parts, attended, states.index_select(0, positions), tuning.select(positions))


def _attended(parts: LayerParts, states: Tensor, layout: Extents, tuning: LayerTuning) -> Tensor:
    inputs = parts.attention_norm(states) if parts.norm_first else states
    projected = torch.cat([module(inputs) for module in parts.projection], dim=-1)
    projected = tuning.projection(inputs, projected)
    queries, keys, values = (
        part.transpose(0, 1).unsqueeze(0)
        for part in projected.view(len(states), 3, parts.heads, -1).unbind(1)
    )
    attended, _ = packed_attention(
        parts.attention, queries, keys, values, None, layout=layout, scaling=parts.attention.scaling
    )
    return attended[0].flatten(1)


def _finish(parts: LayerParts, attended: Tensor, residual: Tensor, tuning: LayerTuning) -> Tensor:
    """After attention: [positions, n] each."""
    states = tuning.dense(attended, parts.dense(attended)) + residual
    if not parts.norm_first:
        states = parts.attention_norm(states)
    inputs = parts.output_norm(states) if parts.norm_first else states
    wide = tuning.activated(parts.activation(tuning.up(inputs, parts.up(inputs))))
    output: Tensor = tuning.down(wide, parts.down(wide)) + states
    return output if parts.norm_first else parts.output_norm(output)
