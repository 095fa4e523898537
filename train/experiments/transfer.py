"""Train on one task, measure on another; then go on with a few rows of that one: the paper's tables
6 and 11.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import permutations
from pathlib import Path
from typing import TypeAlias

from adapters.format.durable import write_atomically
from train.config.settings import FitSettings
from train.data.dataset import Dataset, split_validation
from train.data.task_data import TaskData, hold_out
from train.data.tasks import SHARED_LABELS, TASKS, as_labels_of
from train.errors import DataError, SettingsError
from train.experiments import pages
from train.experiments.cells import Kind, Plan, Rows, RunReport
from train.experiments.compare import check_names, load_tasks
from train.experiments.display import Display, SilentDisplay
from train.experiments.few_rows import few_rows
from train.experiments.session import Findings, Session
from train.experiments.tables import (
    MAJORITY,
    Outcomes,
    Score,
    controls_first,
    score_of,
    score_table,
    write_results,
)
from train.methods import METHODS
from train.metrics import Metric

# --- merged from train.experiments.transfer_page

# Trained on, measured on.
Pair: TypeAlias = tuple[str, str]


@dataclass(frozen=True, slots=True)
class TransferPlans:
    """The runs of a transfer by what they are for; lists are by seed.

    whole: on a whole task. further: those of the first task, then a few rows of the second. fresh:
    a few rows alone.
    """

    methods: tuple[str, ...]
    pairs: tuple[Pair, ...]
    whole: dict[tuple[str, str], list[Plan]] = field(default_factory=lambda: defaultdict(list))
    further: dict[tuple[str, Pair], list[Plan]] = field(default_factory=lambda: defaultdict(list))
    fresh: dict[tuple[str, str], list[Plan]] = field(default_factory=lambda: defaultdict(list))

    @property
    def all(self) -> list[Plan]:
        """Every run."""
        groups = (*self.whole.values(), *self.further.values(), *self.fresh.values())
        return [plan for found in groups for plan in found]


def transfer_page(
    plans: TransferPlans,
    data: Mapping[str, TaskData],
    outcomes: Outcomes,
    *,
    shots: int,
    conditions: str,
) -> str:
    """All tables of what is known.

    Args:
        conditions: the section that says how it was measured.
    """
    cells = [plan.cell for plan in plans.all]
    rows = {task: plans.whole[plans.methods[0], task][0].rows for task in data}
    return pages.page(
        "# Transfer between tasks",
        pages.progress_line(cells, outcomes),
        "Percent: the plain mean of accuracy and macro-F1, mean ± standard deviation of the seeds, "
        "on rows that nothing was chosen by. Bold: the best prompt.",
        "## Trained on one task, measured on another\n\nNo row of the other task was seen.",
        _over_pairs(
            plans,
            outcomes,
            lambda method, pair: _score(plans.whole[method, pair[0]], pair[1], outcomes),
        ),
        f"## The same, then trained on {shots} rows of the other task\n\n"
        f"A part of the {shots} rows chooses the epoch.",
        _over_pairs(
            plans,
            outcomes,
            lambda method, pair: _score(plans.further[method, pair], pair[1], outcomes),
        ),
        f"## To be read beside it: {shots} rows of the task and nothing else",
        _over_tasks(data, plans, outcomes, plans.fresh),
        "## To be read beside it: the whole task",
        _over_tasks(data, plans, outcomes, plans.whole),
        pages.failed_section(cells, outcomes),
        pages.data_section(data, rows),
        conditions,
    )


def _over_pairs(
    plans: TransferPlans, outcomes: Outcomes, score: Callable[[str, Pair], Score]
) -> str:
    rows = {MAJORITY: [_majority(plans, target, outcomes) for _, target in plans.pairs]}
    for method in controls_first(plans.methods):
        rows[method] = [score(method, pair) for pair in plans.pairs]
    return score_table([f"{source} → {target}" for source, target in plans.pairs], rows)


def _over_tasks(
    tasks: Iterable[str],
    plans: TransferPlans,
    outcomes: Outcomes,
    found: Mapping[tuple[str, str], Sequence[Plan]],
) -> str:
    names = list(tasks)
    rows = {MAJORITY: [_majority(plans, task, outcomes) for task in names]}
    for method in controls_first(plans.methods):
        rows[method] = [_score(found[method, task], task, outcomes) for task in names]
    return score_table(names, rows)


def _score(plans: Sequence[Plan], split: str, outcomes: Outcomes) -> Score:
    def figure(report: RunReport) -> float:
        return plans[0].rows.metric.of(report.metrics[split])

    return score_of([plan.cell for plan in plans], outcomes, figure)


def _majority(plans: TransferPlans, task: str, outcomes: Outcomes) -> Score:
    """The task's own: of the first method that has it, for it depends on the rows alone."""
    found = []
    for method in plans.methods:
        runs = plans.whole[method, task]
        metric = runs[0].rows.metric
        cells = [plan.cell for plan in runs]
        found.append(score_of(cells, outcomes, partial(_of_majority, metric, task)))
    return next((score for score in found if score.is_complete), found[0])


def _of_majority(metric: Metric, split: str, report: RunReport) -> float:
    return metric.of(report.majority[split])


# --- merged from train.experiments.transfer

SHOTS = 100
# Of the few rows, for the best epoch: a run is not chosen by rows that it does not have.
SHOTS_HELD_OUT = 0.2
# As the paper: the figures of all pairs are of one kind.
METRIC = Metric.ACCURACY_F1


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
    """For every method and every ordered pair of tasks whose labels mean the same: train on one,
    measure the other unseen, go on training on 100 rows of it, measure again.

    Goes on where an earlier call with the same arguments was stopped. `results.csv` and `report.md`
    are written after every run.

    Args:
        tasks: names of `TASKS`, each with a partner among them.
        output: a folder, made if it is not there.

    Raises:
        TrainingError: unusable tasks, settings or folder. A run that fails raises nothing.
        AdapterError: the backbone cannot be loaded.
        KeyboardInterrupt: everything is saved.
    """
    check_names("tasks", tasks, TASKS)
    check_names("methods", methods, METHODS)
    check_names("seeds", [str(seed) for seed in seeds])
    pairs = pairs_of(tasks)
    with Session(
        Kind.TRANSFER, output, settings, jobs=jobs, display=display or SilentDisplay()
    ) as session:
        data = load_tasks(tasks, data_root)
        plans = TransferPlans(tuple(methods), tuple(pairs))
        for seed in seeds:
            _add(plans, session, data, seed=seed)
        cells = tuple(plan.cell for plan in plans.all)

        def publish(outcomes: Outcomes) -> None:
            write_results(output / "results.csv", cells, outcomes)
            conditions = session.conditions(tasks, outcomes)
            text = transfer_page(plans, data, outcomes, shots=SHOTS, conditions=conditions)
            write_atomically(output / "report.md", text.encode())

        outcomes = session.run(plans.all, publish)
        _drop_weights(plans, outcomes)
    return Findings(output, cells, outcomes, dict.fromkeys(data, METRIC))


def pairs_of(tasks: Sequence[str]) -> list[Pair]:
    """Every (trained on, measured on) whose labels mean the same.

    Raises:
        SettingsError: a task without a partner.
    """
    pairs = [
        (one, other)
        for one, other in permutations(tasks, 2)
        if any({one, other} <= names for names in SHARED_LABELS)
    ]
    alone = [task for task in tasks if not any(task in pair for pair in pairs)]
    if alone:
        partners = "; ".join(", ".join(sorted(names)) for names in SHARED_LABELS)
        raise SettingsError(
            [f"tasks: {task} has no partner among the others (of {partners})" for task in alone]
        )
    return pairs


def _add(
    plans: TransferPlans, session: Session, data: Mapping[str, TaskData], *, seed: int
) -> None:
    """Plan every method with one seed."""
    whole = {task: _source_rows(task, data, plans.pairs, seed=seed) for task in data}
    few = {pair: _few_rows(pair, data, seed=seed) for pair in plans.pairs}
    own = {task: _few_rows((task, task), data, seed=seed) for task in data}
    for method in plans.methods:
        sources = {}
        for task, rows in whole.items():
            plan = session.plan(task, method, rows, seed=seed)
            sources[task] = replace(plan, weights=session.weights_path(plan.cell))
            plans.whole[method, task].append(sources[task])
            plan = session.plan(task, method, own[task], seed=seed, variant=f"{SHOTS} rows")
            plans.fresh[method, task].append(plan)
        for (source, target), rows in few.items():
            plans.further[method, (source, target)].append(
                session.plan(
                    target,
                    method,
                    rows,
                    seed=seed,
                    variant=f"{SHOTS} rows after {source}",
                    starts_from=sources[source],
                )
            )


def _source_rows(
    task: str, data: Mapping[str, TaskData], pairs: Sequence[Pair], *, seed: int
) -> Rows:
    """A whole task, measured on itself and on every task that it is paired with."""
    train, selection = hold_out(data[task].train, seed=seed)
    sets = {"train": train, "selection": selection, task: _measured(data[task])}
    for source, target in pairs:
        if source == task:
            sets[target] = as_labels_of(
                _measured(data[target]), source=TASKS[target], target=TASKS[task]
            )
    return Rows.of(sets, METRIC)


def _few_rows(pair: Pair, data: Mapping[str, TaskData], *, seed: int) -> Rows:
    """A few of the second task's rows, the same for all, under the labels of the first."""
    source, target = pair
    chosen = few_rows(data[target].train, SHOTS, seed=seed)
    train, selection = split_validation(chosen, fraction=SHOTS_HELD_OUT, seed=seed)
    sets = {"train": train, "selection": selection, target: _measured(data[target])}
    if source != target:
        sets = {
            name: as_labels_of(found, source=TASKS[target], target=TASKS[source])
            for name, found in sets.items()
        }
    return Rows.of(sets, METRIC)


def _measured(task: TaskData) -> Dataset:
    found = task.validation or task.test
    if found is None:
        raise DataError("neither validation nor test rows", source=task.train.source)
    return found


def _drop_weights(plans: TransferPlans, outcomes: Outcomes) -> None:
    """Remove trained tensors once every run that starts from them is finished."""
    wanted = {
        plan.initial
        for found in plans.further.values()
        for plan in found
        if outcomes[plan.cell.key].report is None
    }
    for found in plans.whole.values():
        for plan in found:
            if plan.weights is not None and plan.weights not in wanted:
                plan.weights.unlink(missing_ok=True)
