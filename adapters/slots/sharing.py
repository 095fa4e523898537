"""Rows of a batch over slots that have the same text: one entry of a sequence for several rows.

The lower layers see a text alone. So rows with the same text can be one *entry* of the sequence,
until their adapters change it: an adapter's prompt is inserted, or its vectors or LoRA begin.
Between two insertions a batch has one `Stage`; from stage to stage entries only split. Rows that
differ in nothing but their head stay one entry to the end. A batch whose texts are all different
has an entry for every row.

Integers only, and no loop over rows or tokens: batches of different texts, which are most, must not
wait for this.
"""

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from adapters.packed.layout import Indices, Layout

Int32: TypeAlias = npt.NDArray[np.int32]

# Below this share of saved tokens no smaller bucket is likely.
_WORTHWHILE = 0.1
_LONGEST = 2**20


@dataclass(frozen=True, slots=True)
class Stage:
    """The sequence from one insertion to the next: its entries, and where they are.

    firsts: int64 [entries], ascending: the first row of each. owners: int64 [rows], the entry of
    each row. Both None: an entry for every row.
    """

    layout: Layout
    firsts: Indices | None = None
    owners: Indices | None = None

    def of_entries(self, values: Indices) -> Indices:
        """[rows] -> [entries], each entry's from its first row."""
        return values if self.firsts is None else values[self.firsts]

    def of_rows(self, values: Indices) -> Indices:
        """[entries] -> [rows]"""
        return values if self.owners is None else values[self.owners]

    @property
    def copied(self) -> npt.NDArray[np.bool_]:
        """[rows]: whether an earlier row has the same entry."""
        copied = np.zeros(len(self.layout.lengths), dtype=np.bool_)
        if self.owners is not None and self.firsts is not None:
            copied = np.ones(len(self.owners), dtype=np.bool_)
            copied[self.firsts] = False
        return copied


def same_texts(
    text: Layout, shifts: Indices, offsets: Int32, ids: Int32, types: Int32
) -> Indices | None:
    """For each row the first row with its text, int64 [rows]; None if too few texts are equal.

    Two different texts are never taken for equal. Of texts made to look alike to the checksum, some
    equal ones may be missed.

    Args:
        shifts: [rows], what is added to the positions of a text.
        offsets, ids, types: of all tokens; offsets are places within their text.
    """
    rows = len(text.lengths)
    if rows < 2:
        return None
    # It may wrap around.
    sums = np.add.reduceat(ids * (offsets + 1), text.starts, dtype=np.int32)
    sums = (sums.astype(np.int64) + shifts) * _LONGEST + text.lengths
    order = sums.argsort(kind="stable")
    ordered = sums[order]
    alike = ordered[1:] == ordered[:-1]
    later, earlier = order[1:][alike], order[:-1][alike]
    lengths = text.lengths[later]
    if not _worthwhile(int(lengths.sum()), text):
        return None
    # Neighbours with the same checksum, token by token.
    compared = Layout(lengths)
    here = np.arange(compared.tokens)
    here += (text.starts[later] - compared.starts).repeat(lengths)
    there = here + (text.starts[earlier] - text.starts[later]).repeat(lengths)
    same = ids.take(here) == ids.take(there)
    if types.any():
        same &= types.take(here) == types.take(there)
    equal = np.logical_and.reduceat(same, compared.starts)
    alike[alike] = equal & (shifts[later] == shifts[earlier])
    # Each run of equal neighbours begins with its first row, because the order is stable.
    begins = np.concatenate(([True], ~alike))
    firsts = np.empty(rows, dtype=np.int64)
    firsts[order] = order[begins][begins.cumsum() - 1]
    saved = int(text.lengths[firsts != np.arange(rows)].sum())
    return firsts if _worthwhile(saved, text) else None


def stage_of(lengths: Indices, texts: Indices, slots: Indices) -> Stage:
    """The entries of rows: one if they have the same text and the same slot.

    Args:
        lengths: [rows], with the prompts that are inserted.
        texts: [rows], as `same_texts` gives them.
        slots: [rows], of those that their adapter sets apart; -1 for all others.
    """
    keys = texts * (int(slots.max()) + 2) + slots + 1
    order = keys.argsort(kind="stable")
    ordered = keys[order]
    begins = np.concatenate(([True], ordered[1:] != ordered[:-1]))
    # Of each entry, because the order is stable.
    first_rows = order[begins]
    # Entries in the order of their rows: so those of one slot stay neighbours.
    by_row = first_rows.argsort()
    places = np.empty_like(by_row)
    places[by_row] = np.arange(len(by_row))
    owners = np.empty_like(order)
    owners[order] = places[begins.cumsum() - 1]
    firsts = first_rows[by_row]
    return Stage(Layout(lengths[firsts]), firsts, owners)


def _worthwhile(saved: int, text: Layout) -> bool:
    return saved > _WORTHWHILE * text.tokens
