"""A method with one setting changed at a time: how much each of them matters."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from adapters.format.spec import FinalActivation, GeneratorInput, GeneratorPooling
from train.config.defaults import OWN_SETTINGS, design_of, method_of
from train.config.settings import FitSettings, MethodName
from train.data.task_data import TaskData
from train.errors import SettingsError
from train.experiments import plots
from train.experiments.cells import Cell, Findings, Kind, PlannedCell, TaskSplits
from train.experiments.display import Display
from train.experiments.session import Session, check_names, load_tasks, open_session, splits_of
from train.experiments.tables import (
    Score,
    image,
    mean_of,
    number_range,
    page,
    reports_of,
    split_score,
    task_heading,
)
from train.report.markdown import table


@dataclass(frozen=True, slots=True)
class Switch:
    """A setting and the values to try. title: for people.

    values: None means the input of every layer of the backbone.
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
    label_separator: str | None = None,
    switches: Sequence[str] | None = None,
    jobs: int | None = None,
    display: Display | None = None,
) -> Findings:
    """Run a method, ID-SPAM with vectors unless the settings name another, with every value of
    every switch; all other settings stay as given.

    Continues where an earlier call with the same arguments stopped. `results.csv` and `report.md`
    are written after every run, a plot for every switch at the end.

    Args:
        label_separator: of tasks that are files or folders, as `read_examples` takes it.
        switches: names of `SWITCHES`; None: all that the method has.

    Raises:
        TrainingError: unusable tasks, settings or folder. A failed run raises nothing.
        AdapterError: the backbone cannot be loaded.
        KeyboardInterrupt: everything is saved.
    """
    check_names("seeds", [str(seed) for seed in seeds])
    method = method_of(settings)
    switches = switches_of(method) if switches is None else switches
    check_names("switches", switches, SWITCHES)
    _check_switches(method, switches)
    with open_session(Kind.ABLATE, output, settings, jobs=jobs, display=display) as session:
        data = load_tasks(tasks, data_root, label_separator=label_separator)
        splits = {(name, seed): splits_of(data[name], seed=seed) for name in data for seed in seeds}
        design = asdict(design_of(method, settings, session.backbone))
        variants = {
            name: _variants(SWITCHES[name], design[name], layers=session.backbone.layers)
            for name in switches
        }
        planned: dict[tuple[Variant, str], list[PlannedCell]] = {
            (variant, name): [
                session.plan(
                    name,
                    method,
                    splits[name, seed],
                    seed=seed,
                    variant=variant.name,
                    overrides={} if variant.is_default else {variant.switch: variant.value},
                )
                for seed in seeds
            ]
            for of_switch in variants.values()
            for variant in of_switch
            for name in data
        }
        # The default belongs to the table of every switch, but runs only once.
        unique = {each.cell: each for group in planned.values() for each in group}
        ablation = _Ablation(
            session,
            method,
            data,
            {name: splits[name, seeds[0]] for name in data},
            variants,
            {key: [each.cell for each in group] for key, group in planned.items()},
            tuple(unique),
        )
        try:
            session.run(list(unique.values()), ablation.publish)
        finally:
            ablation.plot()
    metrics = {name: task.metric for name, task in data.items()}
    return Findings(output, ablation.cells, session.outcomes, metrics)


def switches_of(method: MethodName) -> tuple[str, ...]:
    """The switches that a method has."""
    return tuple(name for name in SWITCHES if name in OWN_SETTINGS[method])


def _check_switches(method: MethodName, switches: Sequence[str]) -> None:
    """
    Raises:
        SettingsError: the method has not all of them, or none at all.
    """
    own = switches_of(method)
    if foreign := [name for name in switches if name not in own]:
        have = f"it has {', '.join(own)}" if own else "it has none of the switches"
        raise SettingsError([f"--switches {','.join(foreign)}: not of {method}; {have}"])
    if not switches or method is MethodName.BEST:
        raise SettingsError([f"--method {method}: nothing to switch"])


@dataclass(frozen=True, slots=True)
class Variant:
    """One value of one switch. is_default: whether the settings have this value anyway."""

    switch: str
    value: Any
    is_default: bool

    @property
    def name(self) -> str:
        """Empty for the default of every switch, because it is the same run."""
        return "" if self.is_default else f"{self.switch}={self.value}"


def _variants(switch: Switch, default: Any, *, layers: int) -> list[Variant]:
    """The values to try, in order, including the default."""
    values = list(range(layers) if switch.values is None else switch.values)
    if default not in values:
        values = sorted([*values, default])
    return [Variant(switch.name, value, is_default=value == default) for value in values]


@dataclass(frozen=True, slots=True)
class _Ablation:
    """The report of an ablation.

    splits: by task, of the first seed. variants: by switch. groups: cells by variant and task.
    """

    session: Session
    method: str
    data: Mapping[str, TaskData]
    splits: Mapping[str, TaskSplits]
    variants: Mapping[str, Sequence[Variant]]
    groups: Mapping[tuple[Variant, str], Sequence[Cell]]
    cells: tuple[Cell, ...]

    def publish(self) -> None:
        """Write `results.csv` and `report.md` from the outcomes so far."""
        explanation = (
            "Percent: mean ± standard deviation over the seeds, on rows used for no choice. "
            "All other settings are those of the rows marked *default*."
        )
        self.session.write_report(
            f"Switches of {self.method}, one at a time",
            [explanation, *(self._table(SWITCHES[name]) for name in self.variants)],
            cells=self.cells,
            data=self.data,
            splits=self.splits,
        )

    def plot(self) -> None:
        """Draw a plot for every switch, and write the report that shows them."""
        for name, variants in self.variants.items():
            plots.write_switch(
                self.session.store.output / "plots" / name,
                title=SWITCHES[name].title,
                values=[variant.value for variant in variants],
                scores={
                    task: [self._score(variant, task) for variant in variants] for task in self.data
                },
                logarithmic=SWITCHES[name].logarithmic,
            )
        self.publish()

    def _score(self, variant: Variant, task: str) -> Score:
        return split_score(
            self.groups[variant, task],
            self.session.outcomes,
            self.data[task].metric,
            self.splits[task].reported[0],
        )

    def _table(self, switch: Switch) -> str:
        header = [switch.title, "trained parameters"]
        header += [task_heading(name, task.metric) for name, task in self.data.items()]
        header += ["mean"] if len(self.data) > 1 else []
        rows = []
        for variant in self.variants[switch.name]:
            scores = [self._score(variant, task) for task in self.data]
            if len(scores) > 1:
                scores.append(mean_of(scores))
            cells = [cell for task in self.data for cell in self.groups[variant, task]]
            reports = reports_of(cells, self.session.outcomes)
            mark = " *default*" if variant.is_default else ""
            sizes = number_range([report.trainable_parameters for report in reports])
            rows.append([f"{variant.value}{mark}", sizes, *(score.percent() for score in scores)])
        output, text = self.session.store.output, f"scores by {switch.title}"
        plot = image(output, f"plots/{switch.name}.png", text)
        return page(f"## {switch.title.capitalize()}", table(header, rows), plot)
