"""A small sample of a data set with the label proportions of the whole."""

import math
import random
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace

from train.data.dataset import Dataset


def few_rows(dataset: Dataset, count: int, *, seed: int) -> Dataset:
    """The same share of every label, as nearly as whole rows allow, and at least two rows of each.

    Keeps the order of the rows; the same seed gives the same rows. All rows if there are no more
    than `count`.
    """
    if len(dataset) <= count:
        return dataset
    numbers: defaultdict[str, list[int]] = defaultdict(list)
    for number, row in enumerate(dataset.examples):
        assert isinstance(row.label, str), "tasks that share their labels have one a text"
        numbers[row.label].append(number)
    counts = _counts({label: len(rows) for label, rows in numbers.items()}, count)
    draw = random.Random(seed)
    chosen = {
        number for label in sorted(numbers) for number in draw.sample(numbers[label], counts[label])
    }
    kept = tuple(row for number, row in enumerate(dataset.examples) if number in chosen)
    return replace(dataset, examples=kept)


def _counts(rows: Mapping[str, int], count: int) -> dict[str, int]:
    """How many rows to draw of every label: `count` in total, unless two of each are more."""
    shares = {label: count * total / sum(rows.values()) for label, total in rows.items()}
    counts = {label: min(rows[label], max(2, math.floor(shares[label]))) for label in rows}

    def shortfall(label: str) -> float:
        return shares[label] - counts[label]

    while sum(counts.values()) < count:
        counts[max((name for name in rows if counts[name] < rows[name]), key=shortfall)] += 1
    while sum(counts.values()) > count and (above := [name for name in rows if counts[name] > 2]):
        counts[min(above, key=shortfall)] -= 1
    return counts
