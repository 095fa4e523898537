"""The report of a transfer: the paper's tables 6 and 11, and what they are to be read beside."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypeAlias

from train.experiments import pages
from train.experiments.cells import Plan
from train.experiments.results_csv import MAJORITY
from train.experiments.score_table import controls_first, score_table
from train.experiments.scores import Outcomes, Score, score_of
from train.metrics import Metric
from train.runs import RunReport
from train.task_data import TaskData

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
