"""What an experiment is made of: cells, and what a worker needs to run one. Knows no process.

A cell's key names everything that decides its result, so that a result is never taken for that of
other settings or other data.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Self

from train.data import Dataset
from train.metrics import Metric
from train.settings import FitSettings

# Raised when the code changes what a run gives: results of other numbers are not read.
FORMAT = 1

# Time of an epoch beside that of a soft prompt in the middle of the backbone: packing only.
_WEIGHT = {"head-only": 0.2, "head-only-mean": 0.2, "lora": 2.0, "fine-tuning": 3.0}


class Kind(StrEnum):
    """Which question a cell answers."""

    COMPARE = "compare"
    ABLATE = "ablate"
    TRANSFER = "transfer"


@dataclass(frozen=True, slots=True)
class Cell:
    """One run: a method on a task with a seed.

    variant: what sets it apart from the task's plain run (`prompt_length=5`, `from qqp`), else "".
    key: its file name, with a hash of everything that decides the result.
    """

    kind: Kind
    task: str
    method: str
    variant: str
    seed: int
    key: str

    @property
    def title(self) -> str:
        """For lines that people read."""
        parts = (self.task, self.method, self.variant, f"seed {self.seed}")
        return " ".join(part for part in parts if part)


@dataclass(frozen=True, slots=True)
class Rows:
    """What runs are trained and measured on, hashed once for all of them.

    sets: `train`, `selection`, and what is measured at the end. characters: by set.
    """

    sets: Mapping[str, Dataset]
    metric: Metric
    sha256: str
    characters: Mapping[str, int]

    @classmethod
    def of(cls, sets: Mapping[str, Dataset], metric: Metric) -> Self:
        """Hashes the rows themselves: parts of one file share its hash."""
        digest = hashlib.sha256()
        for name, found in sets.items():
            digest.update(f"{name} {found.sha256} {len(found)}\n".encode())
            for row in found.examples:
                digest.update(json.dumps([row.text, row.text_pair, row.label]).encode())
        characters = {
            name: sum(len(row.text) + len(row.text_pair or "") for row in found.examples)
            for name, found in sets.items()
        }
        return cls(sets, metric, digest.hexdigest(), characters)


@dataclass(frozen=True, slots=True)
class Plan:
    """A cell and all that its run needs.

    cost: in no unit, for packing. weights: where the trained tensors go, if they are wanted.
    after: the cell that it starts from, whose tensors are `initial`.
    """

    cell: Cell
    rows: Rows
    settings: FitSettings
    cost: float
    weights: Path | None = None
    after: Cell | None = None
    initial: Path | None = None


def cell_of(
    kind: Kind,
    task: str,
    method: str,
    *,
    variant: str,
    seed: int,
    decides: Mapping[str, Any],
) -> Cell:
    """A cell and its key.

    Args:
        decides: everything that decides the result besides method and seed: JSON values.
    """
    content = {"format": FORMAT, "method": method, "seed": seed, **decides}
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    names = (kind.value, task, method, variant, f"s{seed}", digest[:16])
    key = "-".join(_safe(name) for name in names if name)
    return Cell(kind, task, method, variant, seed, key)


def cost_of(method: str, rows: Rows, *, epochs: int) -> float:
    """About proportional to the run's time: characters that go through the backbone."""
    training = _WEIGHT.get(method, 1.0) * epochs * rows.characters["train"]
    return training + sum(rows.characters.values())


def _safe(name: str) -> str:
    return re.sub("[^a-z0-9._]+", "_", name.lower()).strip("._")[:48] or "_"
