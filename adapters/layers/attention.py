"""Attention over a packed batch: every row sees only itself.

Registered with `transformers.AttentionInterface` as `PACKED_ATTENTION`. The batch's layout is a
keyword argument of the layer call. Hugging Face layers pass it on unchanged, so modules hold no
state of a batch.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface

from adapters.packed.layout import Extents

PACKED_ATTENTION = "idspam_packed"

# The types that the flash kernels of varlen_attn take.
VARLEN_DTYPES = (torch.float16, torch.bfloat16)


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    layout: Extents,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attend within rows.

    Args:
        query, key, value: [1, heads, T, d]
        attention_mask: None: `layout` separates the rows, not a mask.
        layout: extents of the rows, T tokens in all.

    Returns:
        [1, T, heads, d] and no weights.
    """
    assert attention_mask is None
    causal = bool(module.is_causal)
    if query.is_cuda and query.dtype in VARLEN_DTYPES:
        return _varlen(query, key, value, layout, scaling, causal), None
    outputs = []
    by_run = (_rows(states, layout) for states in (query, key, value))
    for queries, keys, values in zip(*by_run, strict=True):
        attended = functional.scaled_dot_product_attention(
            queries, keys, values, scale=scaling, is_causal=causal
        )
        outputs.append(attended.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs).unsqueeze(0), None


def _rows(states: Tensor, layout: Extents) -> list[Tensor]:
    """[1, heads, T, d] -> a view [rows, heads, length, d] for every run."""
    return [rows.transpose(1, 2) for rows in layout.by_run(states[0].transpose(0, 1))]


def _varlen(
    query: Tensor, key: Tensor, value: Tensor, layout: Extents, scaling: float | None, causal: bool
) -> Tensor:
    # Imported here, because only a CUDA device needs it.
    from torch.nn.attention.varlen import varlen_attn

    attended = varlen_attn(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        layout.cumulative,
        layout.cumulative,
        layout.longest,
        layout.longest,
        scale=scaling,
        window_size=(-1, 0) if causal else (-1, -1),
    )
    assert isinstance(attended, Tensor)
    return attended.unsqueeze(0)


AttentionInterface.register(PACKED_ATTENTION, packed_attention)
