"""One experiment at work: its folder, its backbone, where its cells run. Knows no table."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from adapters.backbone.loading import DEFAULT_BACKBONE, load_backbone, resolve_device
from train.config.defaults import design_of, settings_for
from train.config.recipe import recipe_of
from train.config.settings import FitSettings
from train.errors import SettingsError
from train.experiments.cells import (
    Cell,
    DamagedOutcome,
    Kind,
    Outcome,
    Plan,
    Rows,
    Store,
    cell_of,
    cost_of,
)
from train.experiments.display import Display
from train.experiments.pages import conditions_section
from train.experiments.pool import Places, run_plans
from train.experiments.tables import Outcomes
from train.metrics import Metric

# One small run keeps no GPU busy: between its kernels there is room for others.
JOBS_PER_GPU = 4


@dataclass(frozen=True, slots=True)
class Findings:
    """What became of an experiment.

    outcomes: by the cells' keys. metrics: what each task is judged by. A command whose findings
    have failed cells is to end with code 1: the next start tries them again.
    """

    output: Path
    cells: tuple[Cell, ...]
    outcomes: Outcomes
    metrics: Mapping[str, Metric]

    @property
    def failed(self) -> tuple[Outcome, ...]:
        """The cells that were run and have no report."""
        found = (self.outcomes.get(cell.key) for cell in self.cells)
        return tuple(outcome for outcome in found if outcome and outcome.failure is not None)


class Session:
    """Plans cells and runs them; a context manager that holds its folder alone.

    Args:
        settings: of every cell; plans override what their variant is about.
        jobs: cells at once; None: by the devices, on a CPU by the cores.

    Raises:
        OutputError: the folder cannot be written, or another process works there.
        AdapterError: the backbone cannot be loaded.
    """

    def __init__(
        self,
        kind: Kind,
        output: Path,
        settings: FitSettings,
        *,
        jobs: int | None,
        display: Display,
    ) -> None:
        self.kind = kind
        self.settings = settings
        self.display = display
        self.store = Store(output)
        self.places = places_of(settings.device, jobs)

    def __enter__(self) -> Self:
        self.store.__enter__()
        try:
            # On the CPU: what is asked of it is what it is, and it costs no worker its memory.
            self.backbone = load_backbone(self.settings.backbone or DEFAULT_BACKBONE, device="cpu")
        except BaseException:
            self.store.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.store.__exit__(kind, error, trace)

    def plan(
        self,
        task: str,
        method: str,
        rows: Rows,
        *,
        seed: int,
        variant: str = "",
        overrides: Mapping[str, Any] | None = None,
        starts_from: Plan | None = None,
    ) -> Plan:
        """A cell's plan.

        Raises:
            SettingsError: settings that this backbone cannot have.
        """
        given = replace(self.settings, seed=seed, resume=False, **overrides or {})
        settings = settings_for(method, given)
        recipe = recipe_of(method, settings, rows.sets["train"], rows.metric)
        cell = cell_of(
            self.kind,
            task,
            method,
            variant=variant,
            seed=seed,
            decides={
                "rows": rows.sha256,
                "design": asdict(design_of(settings, self.backbone)),
                "recipe": asdict(recipe),
                "backbone": self.backbone.identity.fingerprint,
                "device": resolve_device(self.places.devices[0]).type,
                "dtype": settings.dtype,
                "starts_from": starts_from.cell.key if starts_from else None,
            },
        )
        cost = cost_of(method, rows, epochs=recipe.epochs)
        if starts_from is None:
            return Plan(cell, rows, settings, cost)
        initial = self.weights_path(starts_from.cell)
        return Plan(cell, rows, settings, cost, after=starts_from.cell, initial=initial)

    def weights_path(self, cell: Cell) -> Path:
        """Where a cell's trained tensors are kept for others to start from."""
        return self.store.weights / f"{cell.key}.safetensors"

    def conditions(self, tasks: Sequence[str], outcomes: Outcomes) -> str:
        """The section of a report that says how it was measured."""
        identity = self.backbone.identity
        return conditions_section(
            self.settings,
            backbone=identity.name,
            fingerprint=identity.fingerprint,
            tasks=tasks,
            places=self.places,
            outcomes=outcomes,
        )

    def _finished(self, plan: Plan) -> Outcome | None:
        """What an earlier start has found out: only a report counts, a failure is tried again."""
        try:
            outcome = self.store.read(plan.cell)
        except DamagedOutcome as error:
            self.display.note(
                f"{plan.cell.title}: its file is damaged, computing it again ({error})"
            )
            return None
        if outcome is None:
            return None
        if outcome.report is None:
            self.display.note(f"{plan.cell.title}: failed before, trying again ({outcome.failure})")
            return None
        return outcome

    def run(self, plans: Sequence[Plan], publish: Callable[[Outcomes], None]) -> dict[str, Outcome]:
        """Run what is not finished yet; returns the outcomes of all.

        Args:
            publish: is called at once, and with every new outcome.

        Raises:
            KeyboardInterrupt: everything is saved; a line says how to go on.
        """
        found: dict[str, Outcome] = {}
        for plan in plans:
            if (outcome := self._finished(plan)) is not None:
                found[plan.cell.key] = outcome
        wanted = {plan.after for plan in plans if plan.cell.key not in found}
        for plan in plans:
            if plan.cell in wanted and plan.weights is not None and not plan.weights.exists():
                found.pop(plan.cell.key, None)
        left = [plan for plan in plans if plan.cell.key not in found]
        self.display.begin(
            cells=len(plans),
            finished=len(plans) - len(left),
            costs={plan.cell: plan.cost for plan in left},
        )
        publish(found)

        def ended(outcome: Outcome) -> None:
            found[outcome.cell.key] = outcome
            publish(found)

        try:
            run_plans(left, self.places, cells=self.store.cells, display=self.display, ended=ended)
        except KeyboardInterrupt:
            again = self.settings.command or "the same command"
            self.display.note(f"interrupted; what is finished is kept; to go on: {again}")
            raise
        return found


def places_of(device: str, jobs: int | None) -> Places:
    """Devices and worker processes.

    Args:
        device: of the settings; `auto` takes every GPU there is.

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
    usual = max(1, cores // 2)
    if devices[0].startswith("cuda"):
        usual = max(len(devices), min(JOBS_PER_GPU * len(devices), usual))
    chosen = jobs or usual
    # torch has counted them itself, and reads OMP_NUM_THREADS.
    return Places(devices, jobs=chosen, threads=max(1, torch.get_num_threads() // chosen))
