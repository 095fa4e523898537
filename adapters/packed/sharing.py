"""Rows of a batch with the same text: below their first difference, their layers run once.

Several adapters read one text, or several requests bring it. Adapters that leave the lower layers
as they are differ only from their insertion layer on. So the states of equal texts are computed for
one row, and copied to the others where the lowest prompt of the batch is inserted. An adapter that
changes the word embeddings or a lower layer shares its states with its own rows only.
"""

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from adapters.packed.packing import PackedBatch, Row, RowShape

# Below this share of saved tokens, packing a second batch costs more than it saves.
_WORTHWHILE = 0.1


@dataclass(frozen=True, slots=True)
class SharedRows:
    """The distinct texts of a batch.

    batch: one row for each of them. expand: int64 [T], for every token of the whole batch its
    position in `batch`. copies: for each row of the whole batch, whether its states are another
    row's.
    """

    batch: PackedBatch
    expand: Tensor
    copies: tuple[bool, ...]


def shared_rows(batch: PackedBatch, apart: Collection[int]) -> SharedRows | None:
    """The distinct texts of a batch; None if too few of its texts are equal.

    Args:
        apart: indices of the adapters that change the states below the lowest insertion layer.
    """
    if len(batch.rows) < 2 or batch.shifts is not None:
        return None
    distinct: dict[tuple[bytes, bytes, int], int] = {}
    rows: list[Row] = []
    owners, copies = [], []
    for row in batch.rows:
        encoding = row.encoding
        owner = row.adapter if row.adapter in apart else -1
        key = (encoding.input_ids.tobytes(), encoding.token_type_ids.tobytes(), owner)
        place = distinct.setdefault(key, len(distinct))
        copies.append(place < len(rows))
        if place == len(rows):
            rows.append(Row(encoding, RowShape(), row.adapter))
        owners.append(place)
    kept = sum([len(row.encoding) for row in rows])
    if kept > (1 - _WORTHWHILE) * batch.layout.tokens:
        return None
    small = PackedBatch(rows, device=batch.device)
    # The smaller batch has an order of its own.
    starts = small.layout.starts[np.argsort(small.order)[owners]]
    layout = batch.layout
    expand = np.repeat(starts - layout.starts, layout.lengths) + np.arange(layout.tokens)
    return SharedRows(small, torch.from_numpy(expand).to(batch.device), tuple(copies))
