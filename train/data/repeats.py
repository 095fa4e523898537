"""Rows that repeat rows of another split, and training rows that contradict each other.

Equal texts are exact repeats. Texts that differ in case, punctuation or a few characters are near
ones (`near_duplicates`).
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from train.data.dataset import Dataset, Label, Text
from train.data.near_duplicates import near_duplicates, normalised
from train.errors import DataError

# Of two splits, the rows of the first one are a leak if the second one has their texts: a figure
# on the second one then rewards remembering. The validation rows choose the epoch.
_LEAKS = (("train", "test"), ("train", "validation"), ("validation", "test"))

_Mask: TypeAlias = NDArray[Any]


@dataclass(frozen=True, slots=True)
class Repeat:
    """Two rows with the same text, or nearly: positions in the data sets of their splits.

    similarity: 0.8 to 1; 1 for texts that differ in case and punctuation alone. exact: whether the
    texts are equal.
    """

    split: str
    row: int
    other_split: str
    other_row: int
    similarity: float
    exact: bool


@dataclass(frozen=True, slots=True)
class Repeats:
    """Every row that repeats another one, beside the row that resembles it most.

    leaks: rows of `train` with the text of a validation or test row, and rows of `validation` with
    that of a test row. leaked: the same the other way round, from the rows whose figures they
    affect. conflicts: rows of `train` whose text has other labels in another row of it.
    groups: of each training row; rows with the same text, but for case and punctuation, have the
    same number.
    """

    leaks: tuple[Repeat, ...]
    leaked: tuple[Repeat, ...]
    conflicts: tuple[Repeat, ...]
    groups: tuple[int, ...]


def find_repeats(sets: Mapping[str, Dataset]) -> Repeats:
    """Compare all rows of all splits. sets: `train`, and `validation` and `test` if there are any.

    Rows without any text are left out: they are counted where the data is read.
    """
    search = _Search(sets)
    pairs = [(split, other) for split, other in _LEAKS if split in sets and other in sets]
    return Repeats(
        leaks=tuple(leak for split, other in pairs for leak in search.leaks(split, other)),
        leaked=tuple(leak for split, other in pairs for leak in search.leaks(other, split)),
        conflicts=tuple(search.conflicts()),
        groups=tuple(search.groups()),
    )


def without_leaks(sets: Mapping[str, Dataset], repeats: Repeats) -> dict[str, Dataset]:
    """The splits without the rows that leak, and without equal training texts that have different
    labels. Only training and validation rows are left out.

    Raises:
        DataError: a split has no other rows.
    """
    dropped = dropped_rows(repeats)
    kept = dict(sets)
    for split, rows in dropped.items():
        examples = sets[split].examples
        left = tuple(example for row, example in enumerate(examples) if row not in rows)
        if not left:
            raise DataError(
                f"--drop-leaks leaves no {split} rows: all {len(examples):,} repeat other rows",
                source=sets[split].source,
            )
        kept[split] = replace(sets[split], examples=left)
    return kept


def dropped_rows(repeats: Repeats) -> dict[str, set[int]]:
    """The rows that `without_leaks` leaves out, by split."""
    dropped: defaultdict[str, set[int]] = defaultdict(set)
    for leak in repeats.leaks:
        dropped[leak.split].add(leak.row)
    for conflict in repeats.conflicts:
        if conflict.exact:
            dropped[conflict.split].add(conflict.row)
    return dict(dropped)


class _Search:
    """All rows by their normalised texts, and which of these nearly are the same.

    `_rows[split][number]` has the rows of a split with the normalised text `number`.
    """

    def __init__(self, sets: Mapping[str, Dataset]) -> None:
        self._sets = sets
        self._texts: list[Text] = []
        numbers: dict[Text, int] = {}
        known: dict[str, str] = {}
        # The number of every row's text, -1 for a row without any.
        self._numbers: dict[str, list[int]] = {split: [] for split in sets}
        self._rows: dict[str, dict[int, list[int]]] = {split: {} for split in sets}
        for split, dataset in sets.items():
            for row, example in enumerate(dataset.examples):
                for text in example.texts:
                    if text is not None and text not in known:
                        known[text] = normalised(text)
                pair = None if example.text_pair is None else known[example.text_pair]
                texts = known[example.text], pair
                if not any(texts):
                    self._numbers[split].append(-1)
                    continue
                number = numbers.setdefault(texts, len(numbers))
                if number == len(self._texts):
                    self._texts.append(texts)
                self._numbers[split].append(number)
                self._rows[split].setdefault(number, []).append(row)
        # Of each text, those that resemble it, with their similarity.
        self._near: defaultdict[int, list[tuple[float, int]]] = defaultdict(list)
        for near_pair in near_duplicates(self._texts, self._relevant()):
            one, other, similarity = near_pair.first, near_pair.second, near_pair.similarity
            self._near[one].append((similarity, other))
            self._near[other].append((similarity, one))
        for near in self._near.values():
            near.sort(key=lambda each: (-each[0], each[1]))

    def leaks(self, split: str, other: str) -> list[Repeat]:
        """The rows of a split that repeat one of another split."""
        first: dict[Text, int] = {}
        for row, example in enumerate(self._sets[other].examples):
            first.setdefault(example.texts, row)
        found = []
        for row, example in enumerate(self._sets[split].examples):
            number = self._numbers[split][row]
            if number < 0:
                continue
            if example.texts in first:
                found.append(Repeat(split, row, other, first[example.texts], 1.0, exact=True))
                continue
            for similarity, near in [(1.0, number), *self._near[number]]:
                if rows := self._rows[other].get(near):
                    found.append(Repeat(split, row, other, rows[0], similarity, exact=False))
                    break
        return found

    def conflicts(self) -> list[Repeat]:
        """The training rows whose text has other labels in another training row."""
        examples, rows_of = self._sets["train"].examples, self._rows["train"]
        # Of each text, raw and normalised, the first row of each label: a few, however many rows.
        of_text: defaultdict[Text, dict[Label, int]] = defaultdict(dict)
        of_number: defaultdict[int, dict[Label, int]] = defaultdict(dict)
        for number, rows in rows_of.items():
            for row in rows:
                of_text[examples[row].texts].setdefault(examples[row].label, row)
                of_number[number].setdefault(examples[row].label, row)
        found = []
        for row, example in enumerate(examples):
            number = self._numbers["train"][row]
            if number < 0:
                continue
            nears = [(1.0, number), *self._near[number]]
            options = [(1.0, True, of_text[example.texts])]
            options += [(each, False, of_number.get(near, {})) for each, near in nears]
            for similarity, exact, by_label in options:
                others = [other for label, other in by_label.items() if label != example.label]
                if others:
                    found.append(Repeat("train", row, "train", others[0], similarity, exact=exact))
                    break
        return found

    def groups(self) -> list[int]:
        """The numbers of the training rows' texts."""
        return self._numbers["train"]

    def _relevant(self) -> "_Relevance":
        return _Relevance(self._sets, self._rows, len(self._texts))


class _Relevance:
    """Whether a pair of texts could be a leak or a conflict: others need not be compared."""

    def __init__(
        self,
        sets: Mapping[str, Dataset],
        rows: Mapping[str, Mapping[int, Sequence[int]]],
        texts: int,
    ) -> None:
        self._has: dict[str, _Mask] = {split: np.zeros(texts, dtype=bool) for split in sets}
        for split, by_text in rows.items():
            self._has[split][list(by_text)] = True
        # The label of a text's training rows; -2: several, -1: it has no training row.
        self._label: _Mask = np.full(texts, -1, dtype=np.int64)
        numbers: dict[Label, int] = {}
        examples = sets["train"].examples
        for number, members in rows["train"].items():
            labels = {numbers.setdefault(examples[row].label, len(numbers)) for row in members}
            self._label[number] = labels.pop() if len(labels) == 1 else -2

    def __call__(self, first: _Mask, second: _Mask) -> _Mask:
        one, other = self._label[first], self._label[second]
        wanted: _Mask = (one != -1) & (other != -1) & ((one != other) | (one == -2))
        for split, judged in _LEAKS:
            if split in self._has and judged in self._has:
                has, judges = self._has[split], self._has[judged]
                wanted |= has[first] & judges[second] | has[second] & judges[first]
        return wanted
