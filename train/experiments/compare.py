"""Every method on every task: the paper's main table, with what it costs beside it."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from adapters.format.durable import write_atomically
from train.config.settings import FitSettings
from train.data.task_data import TaskData, hold_out, load_task, with_something_to_report
from train.errors import SettingsError
from train.experiments import pages
from train.experiments import plots as figures
from train.experiments.cells import Cell, Kind, Plan, Rows
from train.experiments.display import Display, SilentDisplay
from train.experiments.session import Findings, Session
from train.experiments.tables import (
    MAJORITY,
    Outcomes,
    Score,
    controls_first,
    mean_of,
    reports_of,
    score_of,
    score_table,
    write_results,
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
    jobs: int | None = None,
    display: Display | None = None,
) -> Findings:
    """Run every method on every task with every seed and write the tables and plots.

    Goes on where an earlier call with the same arguments was stopped. `results.csv` and `report.md`
    are written after every run, the plots at the end.

    Args:
        tasks: as `load_task` takes them.
        output: a folder, made if it is not there.

    Raises:
        TrainingError: unusable tasks, settings or folder. A run that fails raises nothing.
        AdapterError: the backbone cannot be loaded.
        KeyboardInterrupt: everything is saved.
    """
    check_names("methods", methods, METHODS)
    check_names("seeds", [str(seed) for seed in seeds])
    with Session(
        Kind.COMPARE, output, settings, jobs=jobs, display=display or SilentDisplay()
    ) as session:
        data = load_tasks(tasks, data_root)
        rows = {(name, seed): rows_of(data[name], seed=seed) for name in data for seed in seeds}
        plans = [
            session.plan(name, method, rows[name, seed], seed=seed)
            for name in data
            for method in methods
            for seed in seeds
        ]
        comparison = _Comparison(
            session, data, {name: rows[name, seeds[0]] for name in data}, plans
        )
        try:
            outcomes = session.run(plans, comparison.publish)
        finally:
            comparison.plot()
    metrics = {name: task.metric for name, task in data.items()}
    return Findings(output, comparison.cells, outcomes, metrics)


def check_names(what: str, names: Sequence[str], known: Mapping[str, object] | None = None) -> None:
    """
    Raises:
        SettingsError: none, one twice, or one that is not known.
    """
    faults = [] if names else [f"no {what} are given"]
    faults += [f"{what}: {name} twice" for name in dict.fromkeys(names) if names.count(name) > 1]
    if known is not None:
        faults += [
            f"{what}: {name} is none of {', '.join(known)}" for name in names if name not in known
        ]
    if faults:
        raise SettingsError(faults)


def load_tasks(sources: Sequence[str], data_root: Path | None) -> dict[str, TaskData]:
    """Tasks by their names, in the order given.

    Raises:
        SettingsError: none, or two of one name.
        DataError: one cannot be used.
    """
    loaded = [
        with_something_to_report(load_task(source, data_root=data_root)) for source in sources
    ]
    check_names("tasks", [task.name for task in loaded])
    return {task.name: task for task in loaded}


def rows_of(task: TaskData, *, seed: int) -> Rows:
    """A task's sets: selection is held out of the training rows, the other splits are reported.

    Raises:
        DataError: too few rows.
    """
    others = {"validation": task.validation, "test": task.test}
    reported = {name: found for name, found in others.items() if found is not None}
    train, selection = hold_out(task.train, seed=seed)
    return Rows.of({"train": train, "selection": selection} | reported, task.metric)


class _Comparison:
    """The cells of a comparison and what is made of them."""

    def __init__(
        self,
        session: Session,
        data: Mapping[str, TaskData],
        rows: Mapping[str, Rows],
        plans: Sequence[Plan],
    ) -> None:
        self._session = session
        self._data = data
        self._rows = rows
        self.cells = tuple(plan.cell for plan in plans)
        self._methods = tuple(dict.fromkeys(cell.method for cell in self.cells))
        self._output = session.store.output
        self._outcomes: Outcomes = {}

    def publish(self, outcomes: Outcomes) -> None:
        """Write `results.csv` and `report.md` of what is known."""
        self._outcomes = outcomes
        write_results(self._output / "results.csv", self.cells, outcomes)
        text = pages.page(
            "# Methods compared",
            pages.progress_line(self.cells, outcomes),
            *(self._scores(split, outcomes) for split in ("validation", "test")),
            self._costs(outcomes),
            *(
                pages.image(self._output, f"plots/{name}.png", name.replace("_", " "))
                for name in figures.COMPARISON
            ),
            pages.failed_section(self.cells, outcomes),
            pages.data_section(self._data, self._rows),
            self._session.conditions(tuple(self._data), outcomes),
        )
        write_atomically(self._output / "report.md", text.encode())

    def plot(self) -> None:
        """Write the plots of what is known, and the report that shows them."""
        outcomes = self._outcomes
        figures.write_comparison(
            self._output / "plots",
            scores={
                method: mean_of([self._score(name, method, outcomes) for name in self._data])
                for method in self._methods
            },
            reports={
                name: {
                    method: reports_of(self._cells(name, method), outcomes)
                    for method in self._methods
                }
                for name in self._data
            },
            metrics={name: task.metric for name, task in self._data.items()},
        )
        self.publish(outcomes)

    def _cells(self, task: str, method: str) -> list[Cell]:
        return [cell for cell in self.cells if (cell.task, cell.method) == (task, method)]

    def _score(
        self, task: str, method: str, outcomes: Outcomes, *, split: str | None = None
    ) -> Score:
        """split: None takes the first that is reported."""
        metric, chosen = self._data[task].metric, split or pages.reported(self._rows[task])[0]
        cells = self._cells(task, method)
        return score_of(cells, outcomes, lambda report: metric.of(report.metrics[chosen]))

    def _majority(self, task: str, split: str, outcomes: Outcomes) -> Score:
        """Of the first method that has it: it depends on the rows alone."""
        metric = self._data[task].metric
        found = [
            score_of(
                self._cells(task, method),
                outcomes,
                lambda report: metric.of(report.majority[split]),
            )
            for method in self._methods
        ]
        return next((score for score in found if score.is_complete), found[0])

    def _scores(self, split: str, outcomes: Outcomes) -> str:
        """The paper's table, of the tasks that have the split."""
        names = [name for name in self._data if split in pages.reported(self._rows[name])]
        if not names:
            return ""
        rows = {MAJORITY: [self._majority(name, split, outcomes) for name in names]}
        for method in controls_first(self._methods):
            rows[method] = [self._score(name, method, outcomes, split=split) for name in names]
        heads = [f"{pages.shown(name)} ({self._data[name].metric})" for name in names]
        return (
            f"## Scores, {split} rows\n\n"
            "Percent: mean ± standard deviation of the seeds. The best epoch is chosen on rows "
            "held out of the training data, these rows are measured once. Bold: the best prompt."
            "\n\n" + score_table(heads, rows)
        )

    def _costs(self, outcomes: Outcomes) -> str:
        header = ["method", "trained parameters", "learning rate", "peak memory, MiB"]
        header += [f"{pages.shown(name)}, s an epoch" for name in self._data]
        rows = []
        for method in controls_first(self._methods):
            cells = [cell for cell in self.cells if cell.method == method]
            found = reports_of(cells, outcomes)
            seconds = (
                score_of(self._cells(name, method), outcomes, lambda r: r.seconds_per_epoch).mean
                for name in self._data
            )
            rows.append(
                [
                    method,
                    pages.span([report.trainable_parameters for report in found]),
                    ", ".join(f"{rate:g}" for rate in sorted({r.learning_rate for r in found})),
                    pages.span([round(max(report.peak_memory for report in found) / 2**20)])
                    if found
                    else "",
                    *("not run yet" if each is None else f"{each:.2f}" for each in seconds),
                ]
            )
        return "## Costs\n\n" + table(header, rows)
