"""Every method on every task: the paper's main table, and the costs of the methods."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from statistics import fmean

from train.config.defaults import DEFAULT_METHOD
from train.config.settings import FitSettings
from train.data.task_data import TaskData
from train.experiments import plots
from train.experiments.advice import Candidate, advice
from train.experiments.cells import Cell, Findings, Kind, TaskSplits
from train.experiments.differences import Spread, Spreads
from train.experiments.display import Display
from train.experiments.session import Session, check_names, load_tasks, open_session, splits_of
from train.experiments.tables import (
    MAJORITY,
    PairOfMethods,
    Score,
    controls_first,
    difference_cell,
    image,
    majority_score,
    mean_difference_cell,
    mean_of,
    number_range,
    reports_of,
    score_of,
    score_table,
    split_score,
    task_heading,
    write_differences,
)
from train.methods import METHODS
from train.metrics import RESAMPLES
from train.report.markdown import table


def compare(
    tasks: Sequence[str],
    methods: Sequence[str],
    seeds: Sequence[int],
    settings: FitSettings,
    output: Path,
    *,
    data_root: Path | None,
    label_separator: str | None = None,
    keep: bool = False,
    jobs: int | None = None,
    display: Display | None = None,
) -> Findings:
    """Run every method on every task with every seed, and write tables and plots.

    Continues where an earlier call with the same arguments stopped. `results.csv` and `report.md`
    are written after every run, the plots at the end.

    Args:
        tasks: as `load_task` takes them.
        output: a folder, created if it does not exist.
        keep: also write every run's weights as an adapter file, where they are one.
        label_separator: of tasks that are files or folders, as `read_examples` takes it.

    Raises:
        TrainingError: unusable tasks, settings or folder. A failed run raises nothing.
        AdapterError: the backbone cannot be loaded.
        KeyboardInterrupt: everything is saved.
    """
    check_names("methods", methods, METHODS)
    check_names("seeds", [str(seed) for seed in seeds])
    with open_session(Kind.COMPARE, output, settings, jobs=jobs, display=display) as session:
        data = load_tasks(tasks, data_root, label_separator=label_separator)
        splits = {(name, seed): splits_of(data[name], seed=seed) for name in data for seed in seeds}
        planned = [
            session.plan(name, method, splits[name, seed], seed=seed)
            for name in data
            for method in methods
            for seed in seeds
        ]
        if keep:
            planned = [
                replace(each, adapter=session.store.adapter_path(each.cell))
                if METHODS[each.cell.method].not_an_adapter is None
                else each
                for each in planned
            ]
        comparison = _Comparison(
            session,
            data,
            {name: splits[name, seeds[0]] for name in data},
            tuple(methods),
            tuple(each.cell for each in planned),
            Spreads({name: splits[name, seeds[0]] for name in data}),
        )
        try:
            session.run(planned, comparison.publish)
        finally:
            comparison.plot()
    metrics = {name: task.metric for name, task in data.items()}
    return Findings(output, comparison.cells, session.outcomes, metrics, advice=comparison.advice())


@dataclass(frozen=True, slots=True)
class _Comparison:
    """The report of a comparison. splits: by task, of the first seed."""

    session: Session
    data: Mapping[str, TaskData]
    splits: Mapping[str, TaskSplits]
    methods: tuple[str, ...]
    cells: tuple[Cell, ...]
    spreads: Spreads

    def publish(self) -> None:
        """Write `results.csv` and `report.md` from the outcomes so far."""
        images = (
            image(self.session.store.output, f"plots/{name}.png", name.replace("_", " "))
            for name in plots.COMPARISON_PLOTS
        )
        self.session.write_report(
            "Methods compared",
            [
                self._scores("validation"),
                self._differences("validation"),
                self._scores("test"),
                self._differences("test"),
                self._costs(),
                *images,
            ],
            cells=self.cells,
            data=self.data,
            splits=self.splits,
            closing=f"## Advice\n\n{advised}" if (advised := self.advice()) else "",
        )
        write_differences(self.session.store.output / "differences.csv", self._all_differences())

    def advice(self) -> str:
        """One sentence; empty until every run has ended well, and with one method alone."""
        if len(self.methods) < 2:
            return ""
        candidates = []
        for method in self.methods:
            scores = {
                name: self._spread(name, method, self.splits[name].reported[0])
                for name in self.data
            }
            known = {name: score for name, score in scores.items() if isinstance(score, Spread)}
            if len(known) < len(scores):
                return ""
            cells = [cell for cell in self.cells if cell.method == method]
            reports = reports_of(cells, self.session.outcomes)
            parameters = fmean(report.trainable_parameters for report in reports)
            served = METHODS[method].not_an_adapter is None
            candidates.append(Candidate(method, known, parameters, served))
        constant = mean_of(
            [self._majority(name, self.splits[name].reported[0]) for name in self.data]
        )
        assert constant.mean is not None, "every run is complete"
        return advice(candidates, constant.mean)

    def plot(self) -> None:
        """Draw the plots from the outcomes so far, and write the report that shows them."""
        plots.write_comparison(
            self.session.store.output / "plots",
            scores={
                method: mean_of(
                    [self._score(name, method, self.splits[name].reported[0]) for name in self.data]
                )
                for method in self.methods
            },
            reports={
                name: {
                    method: reports_of(self._cells(name, method), self.session.outcomes)
                    for method in self.methods
                }
                for name in self.data
            },
            metrics={name: task.metric for name, task in self.data.items()},
        )
        self.publish()

    def _cells(self, task: str, method: str) -> list[Cell]:
        return [cell for cell in self.cells if (cell.task, cell.method) == (task, method)]

    def _score(self, task: str, method: str, split: str) -> Score:
        cells, metric = self._cells(task, method), self.data[task].metric
        return split_score(cells, self.session.outcomes, metric, split)

    def _spread(self, task: str, method: str, split: str) -> Spread | str:
        return self.spreads.of(self._cells(task, method), self.session.outcomes, split)

    def _differences(self, split: str) -> str:
        """How far every method is from one of them, and which of that is larger than chance."""
        names = [name for name in self.data if split in self.splits[name].reported]
        if not names or len(self.methods) < 2:
            return ""
        preferred = (DEFAULT_METHOD.value, "idspam", self.methods[0])
        reference = next(method for method in preferred if method in self.methods)
        others = [method for method in controls_first(self.methods) if method != reference]
        of_reference = [self._spread(name, reference, split) for name in names]
        rows = []
        for method in others:
            spreads = [self._spread(name, method, split) for name in names]
            pairs = list(zip(spreads, of_reference, strict=True))
            rows.append([method, *(difference_cell(*pair) for pair in pairs)])
            if len(names) > 1:
                rows[-1].append(mean_difference_cell(pairs))
        heads = [task_heading(name, self.data[name].metric) for name in names]
        head = ["method", *heads, *(["mean"] if len(names) > 1 else [])]
        compared = len(others) * len(names)
        return (
            f"## Differences to {reference}, {split} rows\n\n"
            f"Points that a method is above or below {reference}, with the 95 % interval of a "
            "paired bootstrap: the rows, the same ones for both methods, and the seeds of each are "
            f"drawn {RESAMPLES:,} times. Bold: larger than chance. If none of these {compared} "
            f"differences were real, about {max(1, round(compared / 20))} would still be bold. "
            "`differences.csv` has every pair of methods.\n\n" + table(head, rows)
        )

    def _all_differences(self) -> Iterator[PairOfMethods]:
        """Every pair of methods, in every split that is reported."""
        for name in self.data:
            for split in self.splits[name].reported:
                for one, other in combinations(self.methods, 2):
                    first, second = (self._spread(name, each, split) for each in (one, other))
                    if isinstance(first, Spread) and isinstance(second, Spread):
                        yield PairOfMethods(name, split, one, other, first.minus(second))

    def _majority(self, task: str, split: str) -> Score:
        groups = [self._cells(task, method) for method in self.methods]
        return majority_score(groups, self.session.outcomes, self.data[task].metric, split)

    def _scores(self, split: str) -> str:
        """The paper's table, of the tasks that have the split."""
        names = [name for name in self.data if split in self.splits[name].reported]
        if not names:
            return ""
        rows = {MAJORITY: [self._majority(name, split) for name in names]}
        for method in controls_first(self.methods):
            rows[method] = [self._score(name, method, split) for name in names]
        heads = [task_heading(name, self.data[name].metric) for name in names]
        return (
            f"## Scores, {split} rows\n\n"
            "Percent: mean ± standard deviation over the seeds. The best epoch is chosen on rows "
            "held out of the training data; these rows are measured once. Bold: the best prompt."
            "\n\n" + score_table(heads, rows)
        )

    def _costs(self) -> str:
        outcomes = self.session.outcomes
        header = ["method", "trained parameters", "learning rate", "peak memory, MiB"]
        header += [f"{task_heading(name)}, s an epoch" for name in self.data]
        rows = []
        for method in controls_first(self.methods):
            reports = reports_of([cell for cell in self.cells if cell.method == method], outcomes)
            peaks = [round(report.peak_memory / 2**20) for report in reports]
            seconds = (
                score_of(self._cells(name, method), outcomes, lambda r: r.seconds_per_epoch).mean
                for name in self.data
            )
            rows.append(
                [
                    method,
                    number_range([report.trainable_parameters for report in reports]),
                    ", ".join(f"{rate:g}" for rate in sorted({r.learning_rate for r in reports})),
                    f"{max(peaks):,}" if peaks else "",
                    *("not run yet" if mean is None else f"{mean:.2f}" for mean in seconds),
                ]
            )
        return "## Costs\n\n" + table(header, rows)
