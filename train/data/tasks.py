"""The tasks known by name: where their data is on the hub, their labels and their metric.

`tasks.toml` has the table. `SHARED_LABELS` says which of them have labels of the same meaning.
"""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from string import Formatter

from train.data.dataset import Dataset, Example, check_labels
from train.errors import DataError
from train.metrics import Metric


@dataclass(frozen=True, slots=True)
class Task:
    """A classification task. Its local files have the columns `text`, `text_pair` and `label`.

    text, text_pair: `str.format` templates over the columns of a row on the hub; without
        `text_pair`, the task has single texts.
    label: the column of the label on the hub.
    labels: their names, in the hub's order; empty where they are too many to list: the training
        rows have them.
    words: by column, our names for the hub's values; other values are refused.
    hub: `name[:config]`; None: not on the hub.
    splits: those of train, validation and test that have labels on the hub: their names there.
    rows: numbers of rows in the official splits.
    """

    name: str
    metric: Metric = Metric.ACCURACY
    text: str = "{text}"
    text_pair: str | None = None
    label: str = "label"
    labels: tuple[str, ...] = ()
    words: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    hub: str | None = None
    splits: Mapping[str, str] = field(default_factory=dict)
    rows: Mapping[str, int] = field(default_factory=dict)

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that are needed of a row on the hub."""
        pieces = Formatter().parse(self.text + (self.text_pair or ""))
        return (*dict.fromkeys(name for _, name, _, _ in pieces if name), self.label)


def _read(file: Path) -> dict[str, Task]:
    tables = tomllib.loads(file.read_text(encoding="utf-8"))
    return {
        name: Task(
            name,
            metric=Metric(fields.pop("metric", Metric.ACCURACY)),
            labels=tuple(fields.pop("labels", ())),
            **fields,
        )
        for name, fields in tables.items()
    }


TASKS: Mapping[str, Task] = _read(Path(__file__).with_suffix(".toml"))

# In each group, labels with the same position mean the same.
SHARED_LABELS: tuple[frozenset[str], ...] = (
    frozenset({"sst2", "imdb", "amazon_reviews"}),
    frozenset({"mrpc", "qqp"}),
    frozenset({"rte", "qnli"}),
)


def as_labels_of(dataset: Dataset, *, source: Task, target: Task) -> Dataset:
    """The rows of one task with the label names of another, so that a model trained on `target` can
    be measured on them.

    Args:
        dataset: rows of `source`.

    Raises:
        DataError: the labels of the two tasks differ in meaning, or a row is not of `source`.
    """
    if source.name == target.name:
        return dataset
    if not any({source.name, target.name} <= names for names in SHARED_LABELS):
        raise DataError(
            f"the labels of {source.name} do not mean what those of {target.name} mean",
            source=dataset.source,
        )
    check_labels(dataset, source.labels, known_to=source.name)
    names = dict(zip(source.labels, target.labels, strict=True))

    def renamed(row: Example) -> Example:
        (label,) = row.labels
        return Example(row.text, row.text_pair, names[label])

    return replace(dataset, examples=tuple(renamed(row) for row in dataset.examples))
