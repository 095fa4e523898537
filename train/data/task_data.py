"""The rows of a task: from a folder of local files or from the hub, and what is held out of them.

A local task is `<folder>/{train,validation,test}` with an extension of `train.data.readers`, in the
columns `text`, `text_pair` and `label`. Knows no model.
"""

import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from adapters.errors import listing
from cli.text_files import Columns
from train.data.dataset import (
    Dataset,
    Example,
    check_labels,
    check_same_task,
    check_trainable,
    read_examples,
    rows_sha256,
    split_validation,
)
from train.data.hf_datasets import PREFIX, HubName, read_hub
from train.data.readers import READERS
from train.data.tasks import TASKS, Task
from train.errors import DataError
from train.metrics import Metric

SPLITS = ("train", "validation", "test")

# Of the training rows, for selection: as a share, and no more rows than this.
HELD_OUT_SHARE = 0.1
MOST_HELD_OUT = 2000
# And for the report, where a task has no rows of its own for it.
REPORTED_SHARE = 0.2


@dataclass(frozen=True, slots=True)
class TaskData:
    """The labelled splits of a task; None where there is none.

    notes: where the number of rows is not the official one, one line each, for reports.
    """

    name: str
    metric: Metric
    train: Dataset
    validation: Dataset | None
    test: Dataset | None
    notes: tuple[str, ...] = ()


def load_task(source: str, *, data_root: Path | None) -> TaskData:
    """Read a task.

    Args:
        source: a name of `TASKS`; or a folder, a task of its own judged by accuracy; or a file,
            whose rows are all for training.
        data_root: has a folder for every named task; None: they are read from the hub.

    Raises:
        DataError: no such task, or its data are missing, broken or not of one task.
    """
    if source in TASKS:
        return load_named(TASKS[source], data_root=data_root)
    path = Path(source)
    if path.is_dir():
        return _task_data(path.resolve().name, Metric.ACCURACY, _local_splits(path))
    if path.is_file():
        name = path.name.split(".", maxsplit=1)[0]
        return _task_data(name, Metric.ACCURACY, {"train": read_examples(source)})
    raise DataError(f"no file, no folder and none of the tasks {', '.join(TASKS)}", source=source)


def load_named(task: Task, *, data_root: Path | None) -> TaskData:
    """The same for one known task.

    Raises:
        DataError: its data are missing, broken or not its own; names the other place to have them.
    """
    if data_root is None:
        splits = {split: _read_from_hub(task, split) for split in task.splits}
        if not splits:
            raise DataError("not on the hub: give --data-root", source=task.name)
    else:
        splits = _local_splits(_folder_of(task, data_root))
    for dataset in splits.values():
        if task.labels:
            check_labels(dataset, task.labels, known_to=f"the task {task.name}")
        if dataset.paired != (task.text_pair is not None):
            kind = "pairs of texts" if task.text_pair else "single texts"
            raise DataError(f"the rows of {task.name} are {kind}", source=dataset.source)
    return _task_data(task.name, task.metric, splits, notes=tuple(_incomplete(task, splits)))


def with_something_to_report(task: TaskData) -> TaskData:
    """A task that has neither validation nor test rows gets a fifth of its training rows for it.

    Raises:
        DataError: no text can be held out.
    """
    if task.validation is not None or task.test is not None:
        return task
    try:
        train, validation = split_validation(task.train, fraction=REPORTED_SHARE, seed=0)
    except DataError:
        raise _too_few(task.train) from None
    note = f"validation: {len(validation):,} of its {len(task.train):,} rows, held out at random"
    return replace(task, train=train, validation=validation, notes=(*task.notes, note))


def hold_out(train: Dataset, *, seed: int) -> tuple[Dataset, Dataset]:
    """Divide training rows: some are kept for choosing the epoch and the settings.

    Returns:
        training and selection part; the latter has a tenth of the distinct texts, the same share
        of every label, and at most 2,000 rows.

    Raises:
        DataError: no text can be held out.
    """
    share = min(HELD_OUT_SHARE, MOST_HELD_OUT / len(train))
    try:
        _, held = split_validation(train, fraction=share, seed=seed)
    except DataError:
        raise _too_few(train) from None
    chosen = Counter((row.text, row.text_pair) for row in held.examples)
    # Shares are of texts: where repeated ones make too many rows, the most repeated go back.
    for text, _ in chosen.most_common():
        if chosen.total() <= MOST_HELD_OUT:
            break
        del chosen[text]
    if not chosen:
        raise _too_few(train)
    parts: tuple[list[Example], list[Example]] = ([], [])
    for row in train.examples:
        parts[(row.text, row.text_pair) in chosen].append(row)
    kept, selection = (replace(train, examples=tuple(part)) for part in parts)
    return kept, selection


def _too_few(train: Dataset) -> DataError:
    return DataError("too few texts to hold some out", source=train.source)


def _task_data(
    name: str, metric: Metric, splits: Mapping[str, Dataset], notes: tuple[str, ...] = ()
) -> TaskData:
    train, *others = splits.values()
    check_trainable(train)
    for other in others:
        check_same_task(train, other)
    return TaskData(name, metric, train, splits.get("validation"), splits.get("test"), notes)


def _incomplete(task: Task, splits: Mapping[str, Dataset]) -> Iterator[str]:
    for split, dataset in splits.items():
        rows, official = len(dataset), task.rows.get(split)
        if official is None:
            yield f"{split} {rows:,}: there is no official split of this name"
        elif rows < official:
            yield f"{split} {rows:,} of {official:,}"
        elif rows > official:
            yield f"{split} {rows:,}, officially {official:,}"


def _folder_of(task: Task, data_root: Path) -> Path:
    folder = data_root / task.name
    if not folder.is_dir():
        other = f"without --data-root, {PREFIX}{task.hub} is read" if task.hub else "not on the hub"
        raise DataError(f"no such folder; {other}", source=folder)
    return folder


def _local_splits(folder: Path) -> dict[str, Dataset]:
    """Every split that the folder has; train comes first."""
    found: dict[str, Dataset] = {}
    for split in SPLITS:
        paths = [path for end in READERS if (path := folder / f"{split}{end}").exists()]
        if len(paths) > 1:
            names = listing([path.name for path in paths])
            raise DataError(f"which one is the split {split}: {names}?", source=folder)
        if paths:
            found[split] = read_examples(str(paths[0]))
        elif split == "train":
            raise DataError(f"no file train ({', '.join(READERS)})", source=folder)
    return found


def _read_from_hub(task: Task, split: str) -> Dataset:
    source = f"{PREFIX}{task.hub}@{task.splits[split]}"
    hub = HubName.parse(source, split=split)
    try:
        examples = tuple(
            _example(task, row, source=source, line=number)
            for number, row in read_hub(hub, Columns(task.columns, ()), source=source)
        )
    except DataError as error:
        if error.line is not None:
            raise
        # Not the rows, but the hub or the name is at fault.
        message = str(error).removeprefix(f"{source}: ")
        raise DataError(
            f"{message}; with --data-root, the folder {task.name} in it is read", source=source
        ) from None
    if not examples:
        raise DataError("holds no rows", source=source)
    return Dataset(source, rows_sha256(examples), examples)


def _example(task: Task, row: Mapping[str, object], *, source: str, line: int) -> Example:
    values: dict[str, str] = {}
    for column in task.columns:
        value = row[column]
        if not isinstance(value, str):
            kind = "missing (null)" if value is None else f"of type {type(value).__name__}"
            raise DataError(f"{column!r} is {kind}, expected a string", source=source, line=line)
        words = task.words.get(column, {value: value})
        if value not in words:
            known = listing([repr(word) for word in words])
            raise DataError(
                f"{column!r} is {value!r}, not one of {known}", source=source, line=line
            )
        values[column] = words[value]
    pair = None if task.text_pair is None else task.text_pair.format_map(values)
    return Example(task.text.format_map(values), pair, sys.intern(values[task.label]))
