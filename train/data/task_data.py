"""The rows of a task, from a folder of local files or from the hub, and which of them are held out.

A local task is a folder with `{train,validation,test}` in a format of `train.data.readers`, and has
the columns `text`, `text_pair` and `label`.
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
    LabelCheck,
    check_label_kind,
    check_labels,
    check_same_task,
    check_trainable,
    dataset_of,
    divide,
    read_examples,
    split_validation,
)
from train.data.hf_datasets import PREFIX, HubName, read_hub
from train.data.readers import READERS
from train.data.tasks import TASKS, Task
from train.errors import DataError
from train.metrics import Metric

SPLITS = ("train", "validation", "test")

# Training rows held out to choose the epoch and the settings: this share, but no more rows.
HELD_OUT_SHARE = 0.1
MOST_HELD_OUT = 2000
# Training rows held out for the report, if a task has neither validation nor test rows.
REPORTED_SHARE = 0.2


@dataclass(frozen=True, slots=True)
class TaskData:
    """The labelled splits of a task.

    notes: for reports, a line about every split without the official number of rows.
    """

    name: str
    metric: Metric
    train: Dataset
    validation: Dataset | None
    test: Dataset | None
    notes: tuple[str, ...] = ()


def load_task(
    source: str, *, data_root: Path | None, label_separator: str | None = None
) -> TaskData:
    """Read a task.

    Args:
        source: a name in `TASKS`; a folder, which is a task judged by accuracy, or by micro-F1 if
            its texts have several labels; or a file, whose rows are all for training.
        data_root: has a folder for every named task; None: named tasks are read from the hub.
        label_separator: of a file or folder, as `read_examples` takes it.

    Raises:
        DataError: there is no such task, or its data is missing, broken or not of one task.
    """
    if source in TASKS:
        return load_named(TASKS[source], data_root=data_root)
    path = Path(source)
    if path.is_dir():
        name, splits = path.resolve().name, _local_splits(path, label_separator=label_separator)
        return _task_data(name, None, splits, label_separator=label_separator)
    if path.is_file():
        name = path.name.split(".", maxsplit=1)[0]
        splits = {"train": read_examples(source, label_separator=label_separator)}
        return _task_data(name, None, splits, label_separator=label_separator)
    raise DataError(f"no file, no folder and none of the tasks {', '.join(TASKS)}", source=source)


def load_named(task: Task, *, data_root: Path | None) -> TaskData:
    """Read a known task.

    Raises:
        DataError: its data is missing, broken or of another task; names the other place to get it.
    """
    if data_root is None:
        splits = {split: _read_from_hub(task, split) for split in task.splits}
        if not splits:
            raise DataError("not on the hub: give --data-root", source=task.name)
    else:
        splits = _local_splits(_folder_of(task, data_root))
    for dataset in splits.values():
        check_label_kind(dataset, multi_label=False, known_to=f"the task {task.name}")
        if task.labels:
            check_labels(dataset, task.labels, known_to=f"the task {task.name}")
        if dataset.paired != (task.text_pair is not None):
            kind = "pairs of texts" if task.text_pair else "single texts"
            raise DataError(f"the rows of {task.name} are {kind}", source=dataset.source)
    return _task_data(task.name, task.metric, splits, notes=tuple(_incomplete(task, splits)))


def with_something_to_report(task: TaskData) -> TaskData:
    """Hold out a fifth of the training rows as validation rows, if a task has no others to report.

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
    """Hold training rows out, to choose the epoch and the settings by.

    Returns:
        training and selection part; the selection has a tenth of the distinct texts, the same share
        of every label, and at most 2,000 rows.

    Raises:
        DataError: no text can be held out.
    """
    share = min(HELD_OUT_SHARE, MOST_HELD_OUT / len(train))
    try:
        _, held = split_validation(train, fraction=share, seed=seed)
    except DataError:
        raise _too_few(train) from None
    held_out = Counter(row.texts for row in held.examples)
    # The share is one of texts: if repeated texts make too many rows, the most repeated go back.
    for texts, _ in held_out.most_common():
        if held_out.total() <= MOST_HELD_OUT:
            break
        del held_out[texts]
    if not held_out:
        raise _too_few(train)
    return divide(train, held_out)


def _too_few(train: Dataset) -> DataError:
    return DataError("too few texts to hold some out", source=train.source)


def _task_data(
    name: str,
    metric: Metric | None,
    splits: Mapping[str, Dataset],
    notes: tuple[str, ...] = (),
    *,
    label_separator: str | None = None,
) -> TaskData:
    """metric: None: the one for its kind of labels."""
    train, *others = splits.values()
    check_trainable(train, label_separator=label_separator)
    for other in others:
        check_same_task(train, other)
    metric = metric or Metric.default(multi_label=train.multi_label)
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


def _local_splits(folder: Path, *, label_separator: str | None = None) -> dict[str, Dataset]:
    """The splits that a folder has, train first."""
    splits: dict[str, Dataset] = {}
    for split in SPLITS:
        paths = [path for end in READERS if (path := folder / f"{split}{end}").exists()]
        if len(paths) > 1:
            names = listing([path.name for path in paths])
            raise DataError(f"which one is the split {split}: {names}?", source=folder)
        if paths:
            splits[split] = read_examples(str(paths[0]), label_separator=label_separator)
        elif split == "train":
            raise DataError(f"no file train ({', '.join(READERS)})", source=folder)
    return splits


def _read_from_hub(task: Task, split: str) -> Dataset:
    source = f"{PREFIX}{task.hub}@{task.splits[split]}"
    hub, check_label = HubName.parse(source, split=split), LabelCheck(source, task.label)
    try:
        examples = tuple(
            _example(task, row, check_label, source=source, line=number)
            for number, row in read_hub(hub, Columns(task.columns, ()), source=source)
        )
    except DataError as error:
        if error.line is not None:
            raise
        # The fault is with the hub or the name, not with a row.
        message = str(error).removeprefix(f"{source}: ")
        raise DataError(
            f"{message}; with --data-root, the folder {task.name} in it is read", source=source
        ) from None
    return dataset_of(source, examples, sha256=None)


def _example(
    task: Task, row: Mapping[str, object], check_label: LabelCheck, *, source: str, line: int
) -> Example:
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
    check_label(values[task.label], line)
    pair = None if task.text_pair is None else task.text_pair.format_map(values)
    return Example(task.text.format_map(values), pair, sys.intern(values[task.label]), line)
