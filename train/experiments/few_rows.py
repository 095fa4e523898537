"""A few rows of a data set, drawn so that they look like all of it."""

import math
import random
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace

from train.data.dataset import Dataset


def few_rows(dataset: Dataset, count: int, *, seed: int) -> Dataset:
    """The same share of every label, as near as whole rows allow, at least two rows of each.

    Keeps the rows' order; the same seed gives the same rows. All rows, if there are no more.
    """
    if len(dataset) <= count:
        return dataset
    rows: defaultdict[str, list[int]] = defaultdict(list)
    for number, row in enumerate(dataset.examples):
        rows[row.label].append(number)
    counts = _counts({label: len(found) for label, found in rows.items()}, count)
    draw = random.Random(seed)
    chosen = {
        number for label in sorted(rows) for number in draw.sample(rows[label], counts[label])
    }
    kept = tuple(row for number, row in enumerate(dataset.examples) if number in chosen)
    return replace(dataset, examples=kept)


def _counts(rows: Mapping[str, int], count: int) -> dict[str, int]:
    """How many rows of every label; `count` together, unless that is less than two of each."""
    shares = {label: count * found / sum(rows.values()) for label, found in rows.items()}
    counts = {label: min(rows[label], max(2, math.floor(shares[label]))) for label in rows}

    def lack(label: str) -> float:
        return shares[label] - counts[label]

    while sum(counts.values()) < count:
        counts[max((label for label in rows if counts[label] < rows[label]), key=lack)] += 1
    while sum(counts.values()) > count and (many := [name for name in rows if counts[name] > 2]):
        counts[min(many, key=lack)] -= 1
    return counts
