"""The prompt generators and heads of a whole batch as a handful of kernels. Knows no adapter.

Every row of a batch names a slot; the table of `adapters.slots.bank` says where that slot's weights are
and how large. So one launch serves any mixture of adapters, prompt lengths, bottlenecks and label
counts, nothing is padded, nothing loops over adapters, and all launches of a batch have sizes that
follow from its caps alone: they can be captured as a CUDA graph. A row whose slot is negative is
skipped.

Sequences are flat; `starts` [rows + 1] are their rows' starts in the sequence that a kernel reads,
and `cumulative` [rows + 1] those of the text tokens alone, so a row's n tokens are the difference
of two neighbours there. Formulas: `adapters.packed.prompt`.
"""

from typing import Any

import torch
import triton
from torch import Tensor

from adapters.slots import triton_rows as row_code
from adapters.slots import triton_tokens as token_code
from adapters.slots.bank import Column
from adapters.slots.batch import TILE

_NONE, _RELU, _TANH = 0, 1, 2
_WIDTHS = Column.DOWN_WIDTH - Column.DOWN
# Of `_launch`, by matrix: outputs of a program at most, and weights that it holds at a time.
# Narrow matrices are cut up so that one row alone still keeps several multiprocessors reading.
_BLOCKS = {
    Column.DOWN: (16, 4096),
    Column.UP: (128, 2048),
    Column.DENSE: (32, 4096),
    Column.OUT: (16, 4096),
}


def grouped_project(source: Tensor, query: Tensor, tiles: Tensor) -> Tensor:
    """Every tile's tokens times its slot's matrix.

    Args:
        source: [T, n]
        query: [slots, n, n]
        tiles: int32 [3 * tiles]: slot, first token, behind the last token; equal ends: nothing.

    Returns:
        [T, n]; undefined where no tile is.
    """
    n = source.shape[1]
    made = torch.empty_like(source)
    columns = min(128, triton.next_power_of_2(n))
    grid = (len(tiles) // 3, triton.cdiv(n, columns))
    token_code.grouped_project[grid](
        source,
        query,
        tiles,
        made,
        query.stride(0),
        N=n,
        TILE_ROWS=TILE,
        COLUMNS=columns,
        DEPTH=min(64, columns),
    )
    return made


def write_token_weights(
    queries: Tensor,
    keys: Tensor,
    slots: Tensor,
    starts: Tensor,
    cumulative: Tensor,
    weights: Tensor,
    *,
    longest: int,
) -> None:
    """The mean of the softmax's rows, for every text that is not skipped.

    Args:
        queries, keys: [T, n], laid out by `starts`.
        weights: float32 [text tokens], laid out by `cumulative`: written to.
        longest: no text has more tokens.
    """
    n = keys.shape[1]
    normalizers = torch.empty_like(weights)
    blocks: dict[str, Any] = {
        "N": n,
        "BLOCK": 64 if longest > 32 else 32,
        "DEPTH": min(64, triton.next_power_of_2(n)),
    }
    grid = (len(slots), triton.cdiv(longest, blocks["BLOCK"]))
    token_code.normalizers[grid](queries, keys, slots, starts, cumulative, normalizers, **blocks)
    token_code.column_means[grid](
        queries, keys, slots, starts, cumulative, normalizers, weights, **blocks
    )


def weighted_sums(
    weights: Tensor, source: Tensor, slots: Tensor, starts: Tensor, cumulative: Tensor
) -> Tensor:
    """w^T E of every text: float32 [rows, n]; undefined for skipped rows."""
    n = source.shape[1]
    made = torch.empty(len(slots), n, dtype=torch.float32, device=source.device)
    columns = min(128, triton.next_power_of_2(n))
    token_code.weighted_sums[(len(slots), triton.cdiv(n, columns))](
        weights, source, slots, starts, cumulative, made, N=n, ROWS=32, COLUMNS=columns
    )
    return made


def expand(source: Tensor, before: Tensor, behind: Tensor, *, positions: int) -> Tensor:
    """Room for new slots in front of every row that gets some.

    Args:
        source: [T, n], laid out by `before`.
        before, behind: int32 [rows + 1]: where rows start in `source` and in what is made.

    Returns:
        [positions, n]; undefined in new slots and behind the last row.
    """
    n = source.shape[1]
    made = torch.empty(positions, n, dtype=source.dtype, device=source.device)
    columns = min(256, triton.next_power_of_2(n))
    token_code.expand[(len(before) - 1, triton.cdiv(n, columns))](
        source, before, behind, made, N=n, ROWS=16, COLUMNS=columns
    )
    return made


def bottlenecks(pooled: Tensor, slots: Tensor, table: Tensor, *, widest: int) -> Tensor:
    """relu(x W_down + b_down): float32 [rows, widest], of which a slot's own width is defined."""
    made = torch.empty(len(slots), widest, dtype=torch.float32, device=pooled.device)
    _launch(pooled, slots, table, made, Column.DOWN, widest=widest, activation=_RELU)
    return made


def write_prompts(
    bottleneck: Tensor,
    slots: Tensor,
    table: Tensor,
    sequence: Tensor,
    starts: Tensor,
    *,
    widest: int,
) -> None:
    """act(z W_up + b_up) of every row, written from the row's start in `sequence` [T, n] on.

    Args:
        widest: t * n at most.
    """
    _launch(
        bottleneck, slots, table, sequence, Column.UP, widest=widest, activation=None, at=starts
    )


def logits(states: Tensor, slots: Tensor, table: Tensor, *, widest: int, dense: bool) -> Tensor:
    """Every row's head: float32 [rows, widest].

    Args:
        states: [rows, n]
        dense: some row's head has two layers.
    """
    if dense:
        hidden = states.float()
        _launch(
            states,
            slots,
            table,
            hidden,
            Column.DENSE,
            widest=states.shape[1],
            activation=_TANH,
        )
        states = hidden
    made = torch.empty(len(slots), widest, dtype=torch.float32, device=states.device)
    _launch(states, slots, table, made, Column.OUT, widest=widest, activation=_NONE)
    return made


def scores(logits: Tensor, slots: Tensor, table: Tensor) -> Tensor:
    """softmax or sigmoid of logits / temperature, in place; columns a slot lacks become 0."""
    row_code.scores[(len(slots),)](
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


def _launch(
    states: Tensor,
    slots: Tensor,
    table: Tensor,
    made: Tensor,
    column: Column,
    *,
    widest: int,
    activation: int | None,
    at: Tensor | None = None,
) -> None:
    """One `_rowwise_linear` over all rows."""
    most, block = _BLOCKS[column]
    columns = min(most, max(16, triton.next_power_of_2(widest)))
    row_code.rowwise_linear[(len(slots), triton.cdiv(widest, columns))](
        states,
        states.stride(0),
        slots,
        table,
        table.stride(0),
        made,
        made.stride(0),
        slots if at is None else at,
        states.shape[1],
        MATRIX=int(column),
        WIDTH=int(column) + _WIDTHS,
        # As wide as a slot's bottleneck is, so deep is its way up.
        DEEPEST=int(Column.DOWN_WIDTH) if column is Column.UP else -1,
        FINAL=int(Column.FINAL),
        ACTIVATION=-1 if activation is None else activation,
        PLACED=at is not None,
        DEPTH=min(256, block // columns),
        COLUMNS=columns,
    )
