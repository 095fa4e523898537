"""Train on one task, measure on another, then train further on a few rows of the other task.

These are the paper's tables 6 and 11.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from typing import TypeAlias

from train.config.settings import FitSettings
from train.data.dataset import Dataset, split_validation
from train.data.task_data import TaskData, hold_out
from train.data.tasks import SHARED_LABELS, TASKS, as_labels_of
from train.errors import DataError, SettingsError
from train.experiments.cells import Cell, Findings, Kind, Outcomes, PlannedCell, TaskSplits
from train.experiments.display import Display
from train.experiments.few_rows import few_rows
from train.experiments.session import Session, check_names, load_tasks, open_session
from train.experiments.tables import (
    MAJORITY,
    Score,
    controls_first,
    majority_score,
    score_table,
    split_score,
)
from train.methods import METHODS
from train.metrics import Metric

SHOTS = 100
# The share of the few rows that chooses the best epoch: a run may use no other rows for that.
SHOTS_HELD_OUT = 0.2
# The paper's metric; one for all tasks, so that all pairs can be compared.
METRIC = Metric.ACCURACY_F1

# Trained on, measured on.
Pair: TypeAlias = tuple[str, str]


def transfer(
    tasks: Sequence[str],
    methods: Sequence[str],
    seeds: Sequence[int],
    settings: FitSettings,
    output: Path,
    *,
    data_root: Path | None,
    jobs: int | None = None,
    display: Display | None = None,
) -> Findings:
    """For every method and every ordered pair of tasks whose labels mean the same: train on one
    task, measure the other unseen, train further on 100 rows of it, and measure again.

    Continues where an earlier call with the same arguments stopped. `results.csv` and `report.md`
    are written after every run.

    Args:
        tasks: names of `TASKS`, each with a partner among them.
        output: a folder, created if it does not exist.

    Raises:
        TrainingError: unusable tasks, settings or folder. A failed run raises nothing.
        AdapterError: the backbone cannot be loaded.
        KeyboardInterrupt: everything is saved.
    """
    check_names("tasks", tasks, TASKS)
    check_names("methods", methods, METHODS)
    check_names("seeds", [str(seed) for seed in seeds])
    pairs = pairs_of(tasks)
    with open_session(Kind.TRANSFER, output, settings, jobs=jobs, display=display) as session:
        data = load_tasks(tasks, data_root)
        runs = _TransferRuns(tuple(methods), pairs)
        for seed in seeds:
            runs.add_seed(session, data, seed=seed)
        planned = list(runs)
        cells = tuple(each.cell for each in planned)
        splits = {task: runs.whole[methods[0], task][0].data for task in data}

        def publish() -> None:
            session.write_report(
                "Transfer between tasks",
                _sections(runs, list(data), session.outcomes),
                cells=cells,
                data=data,
                splits=splits,
            )

        session.run(planned, publish)
        runs.drop_weights(session.outcomes)
    return Findings(output, cells, session.outcomes, dict.fromkeys(data, METRIC))


def pairs_of(tasks: Sequence[str]) -> list[Pair]:
    """Every (trained on, measured on) whose labels mean the same.

    Raises:
        SettingsError: a task without a partner.
    """
    pairs = [
        (source, target)
        for source, target in permutations(tasks, 2)
        if any({source, target} <= names for names in SHARED_LABELS)
    ]
    alone = [task for task in tasks if not any(task in pair for pair in pairs)]
    if alone:
        partners = "; ".join(", ".join(sorted(names)) for names in SHARED_LABELS)
        raise SettingsError(
            [f"tasks: {task} has no partner among the others (of {partners})" for task in alone]
        )
    return pairs


class _TransferRuns:
    """The runs of a transfer by their purpose; every list is by seed.

    whole: on a whole task, by method and task. further: started from `whole` of the first task of a
    pair, on a few rows of the second. fresh: on a few rows alone.
    """

    def __init__(self, methods: tuple[str, ...], pairs: Sequence[Pair]) -> None:
        self.methods = methods
        self.pairs = pairs
        self.whole: defaultdict[tuple[str, str], list[PlannedCell]] = defaultdict(list)
        self.further: defaultdict[tuple[str, Pair], list[PlannedCell]] = defaultdict(list)
        self.fresh: defaultdict[tuple[str, str], list[PlannedCell]] = defaultdict(list)

    def __iter__(self) -> Iterator[PlannedCell]:
        for runs in (*self.whole.values(), *self.further.values(), *self.fresh.values()):
            yield from runs

    def add_seed(self, session: Session, data: Mapping[str, TaskData], *, seed: int) -> None:
        """Plan every method with one seed."""
        whole = {task: _whole_task(task, data, self.pairs, seed=seed) for task in data}
        pairs = {pair: _few_rows(pair, data, seed=seed) for pair in self.pairs}
        alone = {task: _few_rows((task, task), data, seed=seed) for task in data}
        for method in self.methods:
            sources = {}
            for task, splits in whole.items():
                planned = session.plan(task, method, splits, seed=seed)
                weights = session.store.weights_path(planned.cell)
                sources[task] = replace(planned, weights=weights)
                self.whole[method, task].append(sources[task])
                self.fresh[method, task].append(
                    session.plan(task, method, alone[task], seed=seed, variant=f"{SHOTS} rows")
                )
            for (source, target), splits in pairs.items():
                self.further[method, (source, target)].append(
                    session.plan(
                        target,
                        method,
                        splits,
                        seed=seed,
                        variant=f"{SHOTS} rows after {source}",
                        starts_from=sources[source],
                    )
                )

    def drop_weights(self, outcomes: Outcomes) -> None:
        """Remove trained tensors, unless a failed run will start from them again."""
        needed = {
            each.initial
            for runs in self.further.values()
            for each in runs
            if outcomes[each.cell.key].report is None
        }
        for runs in self.whole.values():
            for each in runs:
                if each.weights is not None and each.weights not in needed:
                    each.weights.unlink(missing_ok=True)


def _whole_task(
    task: str, data: Mapping[str, TaskData], pairs: Sequence[Pair], *, seed: int
) -> TaskSplits:
    """A whole task, measured on itself and on every task that it is paired with."""
    train, selection = hold_out(data[task].train, seed=seed)
    splits = {"train": train, "selection": selection, task: _measured_split(data[task])}
    for source, target in pairs:
        if source == task:
            splits[target] = as_labels_of(
                _measured_split(data[target]), source=TASKS[target], target=TASKS[task]
            )
    return TaskSplits.of(splits, METRIC)


def _few_rows(pair: Pair, data: Mapping[str, TaskData], *, seed: int) -> TaskSplits:
    """A few rows of the second task with the labels of the first; every method gets the same."""
    source, target = pair
    chosen = few_rows(data[target].train, SHOTS, seed=seed)
    train, selection = split_validation(chosen, fraction=SHOTS_HELD_OUT, seed=seed)
    splits = {"train": train, "selection": selection, target: _measured_split(data[target])}
    if source != target:
        splits = {
            name: as_labels_of(dataset, source=TASKS[target], target=TASKS[source])
            for name, dataset in splits.items()
        }
    return TaskSplits.of(splits, METRIC)


def _measured_split(task: TaskData) -> Dataset:
    dataset = task.validation or task.test
    if dataset is None:
        raise DataError("neither validation nor test rows", source=task.train.source)
    return dataset


def _sections(runs: _TransferRuns, tasks: Sequence[str], outcomes: Outcomes) -> list[str]:
    """The tables of the report, from the outcomes so far."""

    def cells(planned: Sequence[PlannedCell]) -> list[Cell]:
        return [each.cell for each in planned]

    def scores(
        heads: Sequence[str], targets: Sequence[str], of: Callable[[str, int], list[PlannedCell]]
    ) -> str:
        """targets: by column, the measured task. of: the runs of a method, by column."""
        rows: dict[str, list[Score]] = {
            MAJORITY: [
                majority_score(
                    [cells(runs.whole[method, task]) for method in runs.methods],
                    outcomes,
                    METRIC,
                    task,
                )
                for task in targets
            ]
        }
        for method in controls_first(runs.methods):
            rows[method] = [
                split_score(cells(of(method, column)), outcomes, METRIC, task)
                for column, task in enumerate(targets)
            ]
        return score_table(heads, rows)

    pairs = runs.pairs
    arrows = [f"{source} → {target}" for source, target in pairs]
    targets = [target for _, target in pairs]
    return [
        "Percent: the plain mean of accuracy and macro-F1, mean ± standard deviation over the "
        "seeds, on rows that were used for no choice. Bold: the best prompt.",
        "## Trained on one task, measured on another\n\nNo row of the other task was seen.",
        scores(arrows, targets, lambda method, column: runs.whole[method, pairs[column][0]]),
        f"## The same, then trained on {SHOTS} rows of the other task\n\n"
        f"A part of the {SHOTS} rows chooses the epoch.",
        scores(arrows, targets, lambda method, column: runs.further[method, pairs[column]]),
        f"## For comparison: {SHOTS} rows of the task and nothing else",
        scores(tasks, tasks, lambda method, column: runs.fresh[method, tasks[column]]),
        "## For comparison: the whole task",
        scores(tasks, tasks, lambda method, column: runs.whole[method, tasks[column]]),
    ]
