"""Every method on every task: the paper's main table, and the costs of the methods."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from train.config.settings import FitSettings
from train.data.task_data import TaskData
from train.experiments import plots
from train.experiments.cells import Cell, Findings, Kind, TaskSplits
from train.experiments.display import Display
from train.experiments.session import Session, check_names, load_tasks, open_session, splits_of
from train.experiments.tables import (
    MAJORITY,
    Score,
    controls_first,
    image,
    majority_score,
    mean_of,
    number_range,
    reports_of,
    score_of,
    score_table,
    split_score,
    task_heading,
)
from train.methods import METHODS
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
    jobs: int | None = None,
    display: Display | None = None,
) -> Findings:
    """Run every method on every task with every seed, and write tables and plots.

    Continues where an earlier call with the same arguments stopped. `results.csv` and `report.md`
    are written after every run, the plots at the end.

    Args:
        tasks: as `load_task` takes them.
        output: a folder, created if it does not exist.
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
        comparison = _Comparison(
            session,
            data,
            {name: splits[name, seeds[0]] for name in data},
            tuple(methods),
            tuple(each.cell for each in planned),
        )
        try:
            session.run(planned, comparison.publish)
        finally:
            comparison.plot()
    metrics = {name: task.metric for name, task in data.items()}
    return Findings(output, comparison.cells, session.outcomes, metrics)


@dataclass(frozen=True, slots=True)
class _Comparison:
    """The report of a comparison. splits: by task, of the first seed."""

    session: Session
    data: Mapping[str, TaskData]
    splits: Mapping[str, TaskSplits]
    methods: tuple[str, ...]
    cells: tuple[Cell, ...]

    def publish(self) -> None:
        """Write `results.csv` and `report.md` from the outcomes so far."""
        images = (
            image(self.session.store.output, f"plots/{name}.png", name.replace("_", " "))
            for name in plots.COMPARISON_PLOTS
        )
        self.session.write_report(
            "Methods compared",
            [self._scores("validation"), self._scores("test"), self._costs(), *images],
            cells=self.cells,
            data=self.data,
            splits=self.splits,
        )

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
