"""One experiment while it runs: its folder, its backbone, its data, and where its cells run."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from adapters.backbone.loading import DEFAULT_BACKBONE, load_backbone, resolve_device
from adapters.backbone.model import Backbone
from cli.hints import as_typed
from train.config.defaults import check_generator, design_of, settings_for
from train.config.recipe import recipe_of
from train.config.settings import FitSettings
from train.data.task_data import TaskData, hold_out, load_task, with_something_to_report
from train.errors import SettingsError
from train.experiments.cells import (
    Cell,
    DamagedOutcome,
    Kind,
    Outcome,
    PlannedCell,
    Store,
    TaskSplits,
    cell_of,
)
from train.experiments.display import Display
from train.experiments.pool import Placement, run_cells
from train.experiments.tables import conditions_section, write_report

# A small run does not keep a GPU busy: between its kernels there is room for others.
JOBS_PER_GPU = 4


@contextmanager
def open_session(
    kind: Kind,
    output: Path,
    settings: FitSettings,
    *,
    jobs: int | None,
    display: Display | None,
) -> Iterator["Session"]:
    """A session; locks its folder until the end of the block.

    Args:
        settings: of every cell; planned cells override what their variant changes.
        jobs: how many cells run at once; None chooses by the devices, on a CPU by the cores.

    Raises:
        SettingsError: as `check_generator`.
        OutputError: the folder cannot be written, or another process uses it.
        AdapterError: the backbone cannot be loaded.
    """
    check_generator(settings)
    placement = placement_of(settings.device, jobs)
    with Store(output) as store:
        # On the CPU: only its metadata is used, and the workers keep all GPU memory.
        backbone = load_backbone(settings.backbone or DEFAULT_BACKBONE, device="cpu")
        yield Session(kind, settings, store, backbone, placement, display or Display())


class Session:
    """Plans cells and runs them. outcomes: by the cells' keys; grows while cells run."""

    def __init__(
        self,
        kind: Kind,
        settings: FitSettings,
        store: Store,
        backbone: Backbone,
        placement: Placement,
        display: Display,
    ) -> None:
        self.store = store
        self.backbone = backbone
        self.outcomes: dict[str, Outcome] = {}
        self._kind = kind
        self._settings = settings
        self._placement = placement
        self._display = display

    def plan(
        self,
        task: str,
        method: str,
        data: TaskSplits,
        *,
        seed: int,
        variant: str = "",
        overrides: Mapping[str, Any] | None = None,
        starts_from: PlannedCell | None = None,
    ) -> PlannedCell:
        """A cell that can be run.

        Raises:
            SettingsError: settings that do not fit this backbone.
        """
        settings = settings_for(
            method, replace(self._settings, seed=seed, resume=False, **overrides or {})
        )
        recipe = recipe_of(method, settings, data.splits["train"], data.metric)
        cell = cell_of(
            self._kind,
            task,
            method,
            variant=variant,
            seed=seed,
            decides={
                "rows": data.sha256,
                "design": asdict(design_of(method, settings, self.backbone)),
                "recipe": asdict(recipe),
                "backbone": self.backbone.identity.fingerprint,
                "device": resolve_device(self._placement.devices[0]).type,
                "dtype": settings.dtype,
                "starts_from": starts_from.cell.key if starts_from else None,
            },
        )
        return PlannedCell(
            cell,
            data,
            settings,
            cost=data.cost(method, epochs=recipe.epochs),
            after=starts_from.cell if starts_from else None,
            initial=self.store.weights_path(starts_from.cell) if starts_from else None,
        )

    def run(self, planned: Sequence[PlannedCell], publish: Callable[[], None]) -> None:
        """Run the cells that have not finished yet; afterwards `outcomes` holds all of them.

        Args:
            publish: called at once, and after every new outcome.

        Raises:
            KeyboardInterrupt: everything is saved; a note says how to continue.
        """
        for each in planned:
            if (outcome := self._finished(each.cell)) is not None:
                self.outcomes[each.cell.key] = outcome
        sources = {each.after for each in planned if each.cell.key not in self.outcomes}
        for each in planned:
            is_gone = each.cell in sources and _is_missing(each.weights)
            if is_gone or _is_missing(each.adapter):
                self.outcomes.pop(each.cell.key, None)
        left = [each for each in planned if each.cell.key not in self.outcomes]
        self._display.begin(
            cells=len(planned),
            finished=len(planned) - len(left),
            costs={each.cell: each.cost for each in left},
        )
        publish()

        def ended(outcome: Outcome) -> None:
            self.outcomes[outcome.cell.key] = outcome
            publish()

        try:
            cells = self.store.cells
            run_cells(left, self._placement, cells=cells, display=self._display, ended=ended)
        except KeyboardInterrupt:
            command = self._settings.command
            again = "the same command" if command is None else as_typed(command)
            self._display.note(f"interrupted; finished cells are kept; to go on: {again}")
            raise

    def _finished(self, cell: Cell) -> Outcome | None:
        """The stored report of an earlier start, if any; a failed cell is tried again."""
        try:
            outcome = self.store.read(cell)
        except DamagedOutcome as error:
            self._display.note(f"{cell.title}: its file is damaged, computing it again ({error})")
            return None
        if outcome is not None and outcome.report is None:
            self._display.note(f"{cell.title}: failed before, trying again ({outcome.failure})")
            return None
        return outcome

    def write_report(
        self,
        title: str,
        sections: Iterable[str],
        *,
        cells: Sequence[Cell],
        data: Mapping[str, TaskData],
        splits: Mapping[str, TaskSplits],
        closing: str = "",
    ) -> None:
        """Write `results.csv` and `report.md` from the outcomes so far.

        Args:
            sections, closing: Markdown; `closing` comes last.
        """
        identity = self.backbone.identity
        write_report(
            self.store.output,
            title,
            sections,
            cells=cells,
            outcomes=self.outcomes,
            data=data,
            splits=splits,
            conditions=conditions_section(
                self._settings,
                backbone=identity.name,
                fingerprint=identity.fingerprint,
                tasks=data,
                jobs=self._placement.jobs,
                outcomes=self.outcomes,
            ),
            closing=closing,
        )


def _is_missing(path: Path | None) -> bool:
    """Whether a file that a cell writes is not there, although its outcome may be."""
    return path is not None and not path.exists()


def placement_of(device: str, jobs: int | None) -> Placement:
    """Choose devices and the number of worker processes.

    Args:
        device: of the settings; `auto` uses every GPU there is.

    Raises:
        SettingsError: fewer than one job.
        AdapterError: no such device.
    """
    if jobs is not None and jobs < 1:
        raise SettingsError([f"--jobs must be at least 1, not {jobs}"])
    cores = len(os.sched_getaffinity(0))
    gpus = torch.cuda.device_count() if device == "auto" else 0
    if gpus:
        devices = tuple(f"cuda:{index}" for index in range(gpus))
    else:
        devices = (str(resolve_device(device)),)
    default = max(1, cores // 2)
    if devices[0].startswith("cuda"):
        default = max(len(devices), min(JOBS_PER_GPU * len(devices), default))
    chosen = jobs or default
    # torch's own count, which follows OMP_NUM_THREADS.
    return Placement(devices, jobs=chosen, threads=max(1, torch.get_num_threads() // chosen))


def check_names(kind: str, names: Sequence[str], known: Mapping[str, object] | None = None) -> None:
    """
    Raises:
        SettingsError: there are none, one occurs twice, or one is unknown.
    """
    faults = [] if names else [f"no {kind} are given"]
    faults += [f"{kind}: {name} twice" for name in dict.fromkeys(names) if names.count(name) > 1]
    if known is not None:
        faults += [
            f"{kind}: {name} is none of {', '.join(known)}" for name in names if name not in known
        ]
    if faults:
        raise SettingsError(faults)


def load_tasks(
    sources: Sequence[str], data_root: Path | None, *, label_separator: str | None = None
) -> dict[str, TaskData]:
    """Tasks by their names, in the order given.

    Raises:
        SettingsError: there are none, or two have the same name.
        DataError: one cannot be used.
    """
    loaded = [
        with_something_to_report(
            load_task(source, data_root=data_root, label_separator=label_separator)
        )
        for source in sources
    ]
    check_names("tasks", [task.name for task in loaded])
    return {task.name: task for task in loaded}


def splits_of(task: TaskData, *, seed: int) -> TaskSplits:
    """A task's splits: selection is held out of the training rows, the others are reported.

    Raises:
        DataError: too few rows.
    """
    others = {"validation": task.validation, "test": task.test}
    reported = {name: dataset for name, dataset in others.items() if dataset is not None}
    train, selection = hold_out(task.train, seed=seed)
    return TaskSplits.of({"train": train, "selection": selection} | reported, task.metric)
