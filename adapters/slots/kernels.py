"""The prompt generators and heads of a whole batch, as a handful of kernels.

Every row of a batch names a slot, and the slot table (`adapters.slots.bank.Column`) says where that
slot's weights are and how large. One launch therefore serves any mixture of adapters, prompt
lengths, bottlenecks and label counts, without padding and without a loop over adapters. The sizes
of all launches follow from the batch's shape alone, so they can be captured as a CUDA graph. A row
or entry whose slot is negative is skipped.

Sequences are flat: one entry follows another, each a row or several rows with the same text
(`adapters.slots.sharing`). Formulas: `adapters.packed.prompt`.
"""

import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from adapters.slots import triton_rows, triton_tokens
from adapters.slots.bank import Column
from adapters.slots.batch import TILE

_WIDTHS = Column.DOWN_WIDTH - Column.DOWN
# For each matrix: the most outputs of one program, and the number of weights that it holds at a
# time. Narrow matrices are split too, so that even one row keeps several multiprocessors reading.
_BLOCKS = {
    Column.DOWN: (16, 4096),
    Column.UP: (128, 2048),
    Column.DENSE: (32, 4096),
    Column.OUT: (16, 4096),
}


class Texts(NamedTuple):
    """The texts in a sequence that a kernel works on: int32 on the device, [entries] each."""

    slots: Tensor
    starts: Tensor
    ends: Tensor


# For each matrix, the column of the table that names the activation after it.
_ACTIVATIONS = {
    Column.DOWN: Column.INNER,
    Column.UP: Column.FINAL,
    Column.DENSE: Column.HIDDEN,
    Column.OUT: None,
}


def grouped_project(source: Tensor, table: Tensor, tiles: Tensor) -> Tensor:
    """Every tile's tokens times its slot's query matrix, or zeros if there is none.

    Args:
        source: [T, n]
        tiles: int32 [3 * tiles]: slot, first position, end; an empty tile does nothing.

    Returns:
        [T, n]; undefined for positions without a tile.
    """
    n = source.shape[1]
    projected = torch.empty_like(source)
    columns = min(128, triton.next_power_of_2(n))
    grid = (len(tiles) // 3, triton.cdiv(n, columns))
    triton_tokens.grouped_project[grid](
        source,
        table,
        table.stride(0),
        tiles,
        projected,
        N=n,
        QUERY=int(Column.QUERY),
        ALIGNED=alignment(n, source.dtype),
        TILE_ROWS=TILE,
        COLUMNS=columns,
        DEPTH=min(64, columns),
    )
    return projected


def alignment(width: int, dtype: torch.dtype) -> int:
    """What the addresses of all rows of this width are a multiple of, in bytes; at most 16."""
    return math.gcd(16, width * dtype.itemsize)


def write_token_weights(
    queries: Tensor, keys: Tensor, texts: Texts, table: Tensor, weights: Tensor, *, longest: int
) -> None:
    """The mean of the softmax's rows, or the first token alone, for all texts not skipped.

    Args:
        queries, keys: [T, n]
        weights: float32 [T]: written to.
        longest: no text has more tokens.
    """
    n = keys.shape[1]
    normalizers = torch.empty_like(weights)
    block = 64 if longest > 32 else 32
    sizes: dict[str, Any] = {"N": n, "BLOCK": block, "DEPTH": min(64, triton.next_power_of_2(n))}
    grid = (len(texts.slots), triton.cdiv(longest, block))
    triton_tokens.normalizers[grid](queries, keys, *texts, normalizers, **sizes)
    triton_tokens.column_means[grid](
        queries,
        keys,
        *texts,
        table,
        table.stride(0),
        normalizers,
        weights,
        FIRST_TOKEN=int(Column.FIRST_TOKEN),
        **sizes,
    )


def weighted_sums(weights: Tensor, source: Tensor, texts: Texts) -> Tensor:
    """w^T E of every text: float32 [entries, n]; undefined for those skipped.

    Args:
        weights: float32 [T]. source: [T, n].
    """
    n = source.shape[1]
    rows = len(texts.slots)
    sums = torch.empty(rows, n, dtype=torch.float32, device=source.device)
    columns = min(128, triton.next_power_of_2(n))
    triton_tokens.weighted_sums[(rows, triton.cdiv(n, columns))](
        weights, source, *texts, sums, N=n, ROWS=32, COLUMNS=columns
    )
    return sums


def expand(
    source: Tensor, before: Tensor, after: Tensor, parents: Tensor, *, positions: int
) -> Tensor:
    """Copy every entry to its places, each with a gap in front of it if a prompt is inserted there.

    Args:
        source: [T, n], laid out by `before`.
        before: int32 [entries + 1]: where entries start in `source`.
        after: int32 [more entries + 1]: where entries start in the result.
        parents: int32 [more entries]: from which entry of `source` each comes; -1: nothing is
            copied.

    Returns:
        [positions, n]; undefined where nothing was copied to.
    """
    n = source.shape[1]
    expanded = torch.empty(positions, n, dtype=source.dtype, device=source.device)
    columns = min(256, triton.next_power_of_2(n))
    triton_tokens.expand[(len(parents), triton.cdiv(n, columns))](
        source, before, after, parents, expanded, N=n, ROWS=16, COLUMNS=columns
    )
    return expanded


def bottlenecks(pooled: Tensor, slots: Tensor, table: Tensor, *, width: int) -> Tensor:
    """act(x W_down + b_down): float32 [entries, width], defined up to each slot's own width."""
    out = torch.empty(len(slots), width, dtype=torch.float32, device=pooled.device)
    _rowwise_linear(pooled, slots, table, out, Column.DOWN, width=width)
    return out


def route(bottleneck: Tensor, slots: Tensor, table: Tensor) -> None:
    """In place: routers' logits become the share of the largest one, and 0 for the others."""
    triton_rows.route[(len(slots),)](
        bottleneck,
        bottleneck.stride(0),
        slots,
        table,
        table.stride(0),
        ROUTED=int(Column.ROUTED),
        WIDTH=int(Column.DOWN_WIDTH),
        COLUMNS=max(16, triton.next_power_of_2(bottleneck.shape[1])),
    )


def write_prompts(
    bottleneck: Tensor,
    slots: Tensor,
    table: Tensor,
    sequence: Tensor,
    starts: Tensor,
    *,
    width: int,
) -> None:
    """act(z W_up + b_up) of every row, written to `sequence` [T, n] from the row's start on.

    Args:
        width: the largest t * n.
    """
    _rowwise_linear(bottleneck, slots, table, sequence, Column.UP, width=width, starts=starts)


def table_rows(offsets: Tensor, owners: Tensor, table: Tensor, *, like: Tensor) -> Tensor:
    """What every token's adapter adds to its word embedding; zeros for adapters without a table.

    Args:
        offsets, owners: int32 [T]: positions in the texts, and slots.
        like: [vocabulary, width], the word embeddings.

    Returns:
        [T, width], in the type of `like`.
    """
    width = like.shape[1]
    rows = torch.zeros(len(offsets), width, dtype=like.dtype, device=like.device)
    columns = min(256, triton.next_power_of_2(width))
    triton_tokens.table_rows[(len(offsets), triton.cdiv(width, columns))](
        offsets,
        owners,
        table,
        table.stride(0),
        rows,
        WIDTH=width,
        TABLE=int(Column.TABLE),
        POSITIONS=int(Column.POSITIONS),
        COLUMNS=columns,
    )
    return rows


def logits(states: Tensor, slots: Tensor, table: Tensor, *, width: int, dense: bool) -> Tensor:
    """Every row's head: float32 [rows, width].

    Args:
        states: [rows, n]
        dense: at least one row's head has two layers.
    """
    if dense:
        n, hidden = states.shape[1], states.float()
        _rowwise_linear(states, slots, table, hidden, Column.DENSE, width=n)
        states = hidden
    out = torch.empty(len(slots), width, dtype=torch.float32, device=states.device)
    _rowwise_linear(states, slots, table, out, Column.OUT, width=width)
    return out


def scores(logits: Tensor, slots: Tensor, table: Tensor) -> Tensor:
    """softmax or sigmoid of logits / temperature, in place; columns that a slot lacks become 0."""
    triton_rows.scores[(len(slots),)](
        logits,
        slots,
        table,
        table.stride(0),
        logits.stride(0),
        logits.shape[1],
        LABELS=int(Column.OUT_WIDTH),
        SIGMOID=int(Column.SIGMOID),
        TEMPERATURE=int(Column.TEMPERATURE),
        COLUMNS=min(1024, max(16, triton.next_power_of_2(logits.shape[1]))),
    )
    return logits


def _rowwise_linear(
    states: Tensor,
    slots: Tensor,
    table: Tensor,
    out: Tensor,
    column: Column,
    *,
    width: int,
    starts: Tensor | None = None,
) -> None:
    """Every row times its slot's matrix, into row i of `out`, or from row `starts[i]` on."""
    most, block = _BLOCKS[column]
    activation = _ACTIVATIONS[column]
    columns = min(most, max(16, triton.next_power_of_2(width)))
    triton_rows.rowwise_linear[(len(slots), triton.cdiv(width, columns))](
        states,
        states.stride(0),
        slots,
        table,
        table.stride(0),
        out,
        out.stride(0),
        slots if starts is None else starts,
        states.shape[1],
        MATRIX=int(column),
        WIDTH=int(column) + _WIDTHS,
        # W_up has as many rows as the slot's bottleneck is wide.
        INPUTS=int(Column.DOWN_WIDTH) if column is Column.UP else -1,
        ACTIVATION=-1 if activation is None else int(activation),
        PLACED=starts is not None,
        DEPTH=min(256, block // columns),
        COLUMNS=columns,
    )
