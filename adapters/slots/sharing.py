"""Rows of a batch over slots that have the same text: one entry of a sequence for several rows.

`Texts` finds them. The lower layers see a text alone. So rows with the same text can be one *entry*
of the sequence, until their adapters change it: an adapter's prompt is inserted, or its vectors or
LoRA begin. Between two insertions a batch has one `Stage`; from stage to stage entries only split.
Rows that differ in nothing but their head stay one entry to the end. A batch whose texts are all
different has an entry for every row.

Integers only, and no loop over tokens: batches of different texts, which are most, must not wait
for this.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from adapters.packed.layout import Indices, Layout
from adapters.tokenizer import Encoding

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


class Texts:
    """The texts that the rows of a batch read, and their tokens.

    Rows of one request refer to one `Encoding` for each of its texts, so most equal texts are found
    without a look at their tokens.

    Args:
        rows: the text of every row.
        shifts: int64 [rows], what is added to the positions of its tokens. Equal texts in different
            positions are different texts.
        sharing: whether to look for equal texts.

    Attributes:
        layout: of the texts of all rows.
        firsts: int64 [rows], the first row with the same text; None if too few texts are equal.
    """

    def __init__(self, rows: Sequence[Encoding], shifts: Indices, *, sharing: bool) -> None:
        read, self._owners = rows, None
        if sharing:
            read, self._owners = _distinct(rows, shifts)
        ids = [text.input_ids for text in read]
        lengths = np.fromiter(map(len, ids), dtype=np.int64, count=len(ids))
        self._read = self.layout = Layout(lengths)
        offsets = np.arange(self._read.tokens, dtype=np.int32)
        offsets -= self._read.edges[:-1].repeat(lengths)
        self._tokens = {
            "input_ids": _joined(ids),
            "token_type_ids": _joined([text.token_type_ids for text in read]),
            "offsets": offsets,
        }
        places: Indices | None = None
        if self._owners is not None:
            self.layout = Layout(lengths[self._owners])
            places = _first_places(self._owners, len(read))
            shifts = shifts[places]
        same = None
        if sharing:
            input_ids, types = self._tokens["input_ids"], self._tokens["token_type_ids"]
            same = same_texts(self._read, shifts, offsets, input_ids, types)
        self.firsts = same
        if self._owners is not None and places is not None:
            self.firsts = (places if same is None else places[same])[self._owners]

    def tokens_of(self, stage: "Stage") -> Mapping[str, Int32]:
        """Ids, types and offsets of all tokens of a stage before the first prompt.

        An offset is a token's place within its text.
        """
        if self._owners is None and stage.firsts is None:
            return self._tokens
        every = np.arange(len(self._read.lengths))
        texts = stage.of_entries(every if self._owners is None else self._owners)
        if np.array_equal(texts, every):
            return self._tokens
        kept = stage.layout.spans(self._read.starts[texts])
        return {name: values[kept] for name, values in self._tokens.items()}


def _distinct(
    rows: Sequence[Encoding], shifts: Indices
) -> tuple[Sequence[Encoding], Indices | None]:
    """The distinct objects among `rows`, by their first rows, and which of them each row has, int64
    [rows]; as they are, and None, if nearly all are distinct."""
    keys: list[object] = list(map(id, rows))
    if shifts.any():
        keys = list(zip(keys, shifts.tolist(), strict=True))
    distinct = dict(zip(keys, rows, strict=True))
    if len(distinct) > (1 - _WORTHWHILE) * len(rows):
        return rows, None
    numbers = dict(zip(distinct, range(len(distinct)), strict=True))
    owners = np.fromiter(map(numbers.__getitem__, keys), dtype=np.int64, count=len(rows))
    return list(distinct.values()), owners


def _first_places(owners: Indices, count: int) -> Indices:
    """[count]: the first place of each number in `owners`."""
    places = np.empty(count, dtype=np.int64)
    # Of several assignments the last one remains.
    places[owners[::-1]] = np.arange(len(owners))[::-1]
    return places


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


def _joined(arrays: Sequence[Indices]) -> Int32:
    """The arrays one after the other; as bytes, which takes a third of `np.concatenate`'s time."""
    joined = b"".join(arrays)  # type: ignore[arg-type]  # an array is a buffer
    return np.frombuffer(joined, dtype=np.int64).astype(np.int32)
