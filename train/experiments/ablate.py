"""ID-SPAM with one switch changed at a time: what each of them is worth."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from adapters.format.durable import write_atomically
from adapters.format.spec import FinalActivation, GeneratorInput, GeneratorPooling
from train.config.defaults import design_of
from train.config.settings import FitSettings
from train.data.task_data import TaskData
from train.experiments import pages
from train.experiments import plots as figures
from train.experiments.cells import Cell, Kind, Plan, Rows
from train.experiments.compare import check_names, load_tasks, rows_of
from train.experiments.display import Display, SilentDisplay
from train.experiments.session import Findings, Session
from train.experiments.tables import Outcomes, Score, mean_of, reports_of, score_of, write_results
from train.report.markdown import table

METHOD = "idspam"


@dataclass(frozen=True, slots=True)
class Switch:
    """A setting and the values that are tried. title: for people.

    values: None: the input of every layer of the backbone.
    """

    name: str
    title: str
    values: tuple[Any, ...] | None
    logarithmic: bool = False


SWITCHES: Mapping[str, Switch] = {
    switch.name: switch
    for switch in (
        Switch("insertion_layer", "insertion layer m", None),
        Switch("prompt_length", "prompt length t", (1, 2, 5, 10, 20, 50), logarithmic=True),
        Switch("bottleneck", "bottleneck c", (8, 34, 128, 256), logarithmic=True),
        Switch("final_activation", "final activation", tuple(FinalActivation)),
        Switch("generator_input", "generator input", tuple(GeneratorInput)),
        Switch("generator_pooling", "generator pooling", tuple(GeneratorPooling)),
    )
}


def ablate(
    tasks: Sequence[str],
    seeds: Sequence[int],
    settings: FitSettings,
    output: Path,
    *,
    data_root: Path | None,
    switches: Sequence[str] = tuple(SWITCHES),
    jobs: int | None = None,
    display: Display | None = None,
) -> Findings:
    """Run ID-SPAM with every value of every switch, the others as the settings have them.

    Goes on where an earlier call with the same arguments was stopped. `results.csv` and `report.md`
    are written after every run, a plot for every switch at the end.

    Args:
        switches: names of `SWITCHES`.

    Raises:
        TrainingError: unusable tasks, settings or folder. A run that fails raises nothing.
        AdapterError: the backbone cannot be loaded.
        KeyboardInterrupt: everything is saved.
    """
    check_names("seeds", [str(seed) for seed in seeds])
    check_names("switches", switches, SWITCHES)
    with Session(
        Kind.ABLATE, output, settings, jobs=jobs, display=display or SilentDisplay()
    ) as session:
        data = load_tasks(tasks, data_root)
        rows = {(name, seed): rows_of(data[name], seed=seed) for name in data for seed in seeds}
        design = asdict(design_of(settings, session.backbone))
        variants = [
            Variant(SWITCHES[name], value, is_default=value == design[name])
            for name in switches
            for value in _values(SWITCHES[name], design[name], layers=session.backbone.layers)
        ]
        plans = {
            (variant, name): [
                session.plan(
                    name,
                    METHOD,
                    rows[name, seed],
                    seed=seed,
                    variant=variant.name,
                    overrides={} if variant.is_default else {variant.switch.name: variant.value},
                )
                for seed in seeds
            ]
            for variant in variants
            for name in data
        }
        ablation = _Ablation(session, data, {name: rows[name, seeds[0]] for name in data}, plans)
        try:
            outcomes = session.run(ablation.plans, ablation.publish)
        finally:
            ablation.plot()
    metrics = {name: task.metric for name, task in data.items()}
    return Findings(output, ablation.cells, outcomes, metrics)


@dataclass(frozen=True, slots=True)
class Variant:
    """One value of one switch. is_default: whether the settings have it anyway."""

    switch: Switch
    value: Any
    is_default: bool

    @property
    def name(self) -> str:
        """The same for the default of every switch: it is the same run."""
        return "" if self.is_default else f"{self.switch.name}={self.value}"


def _values(switch: Switch, default: Any, *, layers: int) -> list[Any]:
    """What is tried, in order; what the settings have is among it."""
    values = range(layers) if switch.values is None else switch.values
    if default in values:
        return list(values)
    return sorted([*values, default])


class _Ablation:
    """The cells of an ablation and what is made of them."""

    def __init__(
        self,
        session: Session,
        data: Mapping[str, TaskData],
        rows: Mapping[str, Rows],
        plans: Mapping[tuple[Variant, str], Sequence[Plan]],
    ) -> None:
        self._session = session
        self._data = data
        self._rows = rows
        self._of = {key: [plan.cell for plan in found] for key, found in plans.items()}
        self._variants = list(dict.fromkeys(variant for variant, _ in plans))
        # The default stands in every switch's table and is run once.
        self.plans = list({plan.cell: plan for found in plans.values() for plan in found}.values())
        self.cells: tuple[Cell, ...] = tuple(plan.cell for plan in self.plans)
        self._output = session.store.output
        self._outcomes: Outcomes = {}

    @property
    def _switches(self) -> list[Switch]:
        return list(dict.fromkeys(variant.switch for variant in self._variants))

    def publish(self, outcomes: Outcomes) -> None:
        """Write `results.csv` and `report.md` of what is known."""
        self._outcomes = outcomes
        write_results(self._output / "results.csv", self.cells, outcomes)
        text = pages.page(
            "# Switches of ID-SPAM, one at a time",
            pages.progress_line(self.cells, outcomes),
            "Percent: mean ± standard deviation of the seeds, on rows that nothing was chosen by. "
            "Everything else is as in the rows marked *default*.",
            *(self._table(switch, outcomes) for switch in self._switches),
            pages.failed_section(self.cells, outcomes),
            pages.data_section(self._data, self._rows),
            self._session.conditions(tuple(self._data), outcomes),
        )
        write_atomically(self._output / "report.md", text.encode())

    def plot(self) -> None:
        """Write a plot for every switch of what is known, and the report that shows them."""
        for switch in self._switches:
            variants = [variant for variant in self._variants if variant.switch == switch]
            figures.write_switch(
                self._output / "plots" / switch.name,
                title=switch.title,
                values=[variant.value for variant in variants],
                scores={
                    task: [self._score(variant, task, self._outcomes) for variant in variants]
                    for task in self._data
                },
                logarithmic=switch.logarithmic,
            )
        self.publish(self._outcomes)

    def _score(self, variant: Variant, task: str, outcomes: Outcomes) -> Score:
        metric = self._data[task].metric
        split = pages.reported(self._rows[task])[0]
        cells = self._of[variant, task]
        return score_of(cells, outcomes, lambda report: metric.of(report.metrics[split]))

    def _table(self, switch: Switch, outcomes: Outcomes) -> str:
        header = [switch.title, "trained parameters"]
        header += [f"{pages.shown(name)} ({task.metric})" for name, task in self._data.items()]
        rows = []
        for variant in self._variants:
            if variant.switch != switch:
                continue
            scores = [self._score(variant, task, outcomes) for task in self._data]
            cells = [cell for task in self._data for cell in self._of[variant, task]]
            sizes = [report.trainable_parameters for report in reports_of(cells, outcomes)]
            marked = " *default*" if variant.is_default else ""
            means = [mean_of(scores)] if len(scores) > 1 else []
            texts = [score.percent() for score in (*scores, *means)]
            rows.append([f"{variant.value}{marked}", pages.span(sizes), *texts])
        mean = ["mean"] if len(self._data) > 1 else []
        plot = pages.image(self._output, f"plots/{switch.name}.png", f"scores by {switch.title}")
        return pages.page(f"## {switch.title.capitalize()}", table([*header, *mean], rows), plot)
