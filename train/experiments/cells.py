"""What an experiment is made of: cells, and what a worker needs to run one. Knows no process.

A cell's key names everything that decides its result, so that a result is never taken for that of
other settings or other data.
"""

import fcntl
import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from adapters.backbone.model import Backbone
from adapters.format.durable import write_atomically
from train.config.defaults import backbone_of, settings_for
from train.config.settings import FitSettings
from train.data.dataset import Dataset
from train.errors import DataError, OutputError
from train.fit.training import Training, measured, set_up
from train.loop.memory import peak_memory, reset_peak
from train.loop.progress import EpochReport, Progress
from train.methods import METHODS
from train.metrics import Metric, Metrics
from train.report.baselines import majority

# --- merged from train.experiments.cells

# Raised when the code changes what a run gives: results of other numbers are not read.
FORMAT = 1

# Time of an epoch beside that of a soft prompt in the middle of the backbone: packing only.
_WEIGHT = {"head-only": 0.2, "head-only-mean": 0.2, "lora": 2.0, "fine-tuning": 3.0}


class Kind(StrEnum):
    """Which question a cell answers."""

    COMPARE = "compare"
    ABLATE = "ablate"
    TRANSFER = "transfer"


@dataclass(frozen=True, slots=True)
class Cell:
    """One run: a method on a task with a seed.

    variant: what sets it apart from the task's plain run (`prompt_length=5`, `from qqp`), else "".
    key: its file name, with a hash of everything that decides the result.
    """

    kind: Kind
    task: str
    method: str
    variant: str
    seed: int
    key: str

    @property
    def title(self) -> str:
        """For lines that people read."""
        parts = (self.task, self.method, self.variant, f"seed {self.seed}")
        return " ".join(part for part in parts if part)


@dataclass(frozen=True, slots=True)
class Rows:
    """What runs are trained and measured on, hashed once for all of them.

    sets: `train`, `selection`, and what is measured at the end. characters: by set.
    """

    sets: Mapping[str, Dataset]
    metric: Metric
    sha256: str
    characters: Mapping[str, int]

    @classmethod
    def of(cls, sets: Mapping[str, Dataset], metric: Metric) -> Self:
        """Hashes the rows themselves: parts of one file share its hash."""
        digest = hashlib.sha256()
        for name, found in sets.items():
            digest.update(f"{name} {found.sha256} {len(found)}\n".encode())
            for row in found.examples:
                digest.update(json.dumps([row.text, row.text_pair, row.label]).encode())
        characters = {
            name: sum(len(row.text) + len(row.text_pair or "") for row in found.examples)
            for name, found in sets.items()
        }
        return cls(sets, metric, digest.hexdigest(), characters)


@dataclass(frozen=True, slots=True)
class Plan:
    """A cell and all that its run needs.

    cost: in no unit, for packing. weights: where the trained tensors go, if they are wanted.
    after: the cell that it starts from, whose tensors are `initial`.
    """

    cell: Cell
    rows: Rows
    settings: FitSettings
    cost: float
    weights: Path | None = None
    after: Cell | None = None
    initial: Path | None = None


def cell_of(
    kind: Kind,
    task: str,
    method: str,
    *,
    variant: str,
    seed: int,
    decides: Mapping[str, Any],
) -> Cell:
    """A cell and its key.

    Args:
        decides: everything that decides the result besides method and seed: JSON values.
    """
    content = {"format": FORMAT, "method": method, "seed": seed, **decides}
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    names = (kind.value, task, method, variant, f"s{seed}", digest[:16])
    key = "-".join(_safe(name) for name in names if name)
    return Cell(kind, task, method, variant, seed, key)


def cost_of(method: str, rows: Rows, *, epochs: int) -> float:
    """About proportional to the run's time: characters that go through the backbone."""
    training = _WEIGHT.get(method, 1.0) * epochs * rows.characters["train"]
    return training + sum(rows.characters.values())


def _safe(name: str) -> str:
    return re.sub("[^a-z0-9._]+", "_", name.lower()).strip("._")[:48] or "_"


# --- merged from train.runs


@dataclass(frozen=True, slots=True)
class RunReport:
    """One run. metrics, majority: by split. peak_memory: bytes (`train.loop.memory`). best_epoch: from
    1."""

    method: str
    seed: int
    metrics: Mapping[str, Metrics]
    majority: Mapping[str, Metrics]
    trainable_parameters: int
    seconds: float
    seconds_per_epoch: float
    peak_memory: int
    epochs: tuple[EpochReport, ...]
    best_epoch: int
    learning_rate: float

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """
        Raises:
            ValueError, KeyError, TypeError: not what `to_json` writes.
        """
        content: dict[str, Any] = json.loads(text)
        content["epochs"] = tuple(EpochReport(**epoch) for epoch in content["epochs"])
        for name in ("metrics", "majority"):
            content[name] = {key: Metrics(**found) for key, found in content[name].items()}
        return cls(**content)


class Backbones:
    """Loads a backbone once for all runs of a process that leave it as it is."""

    def __init__(self) -> None:
        self._kept: dict[tuple[object, ...], Backbone] = {}

    def take(self, settings: FitSettings, *, changed: bool) -> Backbone:
        """The settings' backbone. changed: whether it will not be the same afterwards."""
        key = (settings.backbone, settings.device, settings.dtype)
        backbone = self._kept.pop(key, None) or backbone_of(settings)
        if not changed:
            self._kept[key] = backbone
        return backbone


def run(
    method: str,
    sets: Mapping[str, Dataset],
    settings: FitSettings,
    *,
    metric: Metric,
    state: Path,
    progress: Progress,
    backbones: Backbones,
    initial: Path | None = None,
    weights: Path | None = None,
) -> RunReport:
    """Train and measure.

    Args:
        sets: `train`, `selection`, and whatever else is to be measured.
        state: where an interrupted run leaves what the next call goes on from.
        initial: trained tensors to start from, as `weights` has them.
        weights: where the trained tensors go, safetensors.

    Raises:
        TrainingError: unusable data or settings, a loss that is not finite.
        AdapterError: the backbone cannot be loaded or run.
    """
    kind = METHODS[method]
    settings = settings_for(method, settings)
    backbone = backbones.take(settings, changed=kind.changes_backbone)
    reset_peak(backbone.device)
    training = set_up(
        method,
        sets,
        replace(settings, resume=state.exists()),
        backbone,
        judge="selection",
        metric=metric,
        state_file=state,
        progress=progress,
    )
    try:
        if initial is not None and not state.exists():
            _start_from(training, initial)
        training.loop.fit(progress)
        report = _report(method, training)
        if weights is not None:
            write_atomically(weights, save(training.method.snapshot()))
    finally:
        training.close()
    state.unlink(missing_ok=True)
    return report


def _report(method: str, training: Training) -> RunReport:
    state, classes = training.loop.state, training.classes
    logits = training.logits()
    train = classes["train"]
    return RunReport(
        method=method,
        seed=training.recipe.seed,
        metrics=measured(logits, classes),
        majority=majority(
            train, {name: classes[name] for name in logits}, labels=len(training.labels)
        ),
        trainable_parameters=training.method.size,
        seconds=state.seconds,
        seconds_per_epoch=state.seconds / len(state.history),
        peak_memory=peak_memory(training.backbone.device),
        epochs=tuple(state.history),
        best_epoch=state.best_epoch,
        learning_rate=training.recipe.learning_rate,
    )


def _start_from(training: Training, path: Path) -> None:
    tensors: dict[str, Tensor] = load_file(path)
    wanted = {name: tuple(value.shape) for name, value in training.method.tensors.items()}
    if {name: tuple(value.shape) for name, value in tensors.items()} != wanted:
        raise DataError("tensors of another method, design or label count", source=path)
    with torch.no_grad():
        training.method.restore(tensors)


# --- merged from train.experiments.store


class DamagedOutcome(Exception):
    """A cell's file that cannot be read; its text says why."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a cell ended: with a report, or with the reason why there is none.

    device: what it ran on. trace: of an error that nobody foresaw.
    """

    cell: Cell
    report: RunReport | None
    failure: str | None
    device: str
    trace: str | None = None

    def to_json(self) -> str:
        """One JSON object, which `from_json` reads."""
        content = {
            "format": FORMAT,
            "cell": asdict(self.cell),
            "device": self.device,
            "failure": self.failure,
            "trace": self.trace,
            "report": None if self.report is None else json.loads(self.report.to_json()),
        }
        return json.dumps(content, indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Self:
        """
        Raises:
            DamagedOutcome: something else than `to_json` gives.
        """
        try:
            content: dict[str, Any] = json.loads(text)
            cell = dict(content["cell"])
            report, failure = content["report"], content["failure"]
            if (report is None) == (failure is None):
                raise DamagedOutcome("neither or both of report and failure")
            return cls(
                cell=Cell(**cell | {"kind": Kind(cell["kind"])}),
                report=None if report is None else RunReport.from_json(json.dumps(report)),
                failure=failure,
                device=content["device"],
                trace=content["trace"],
            )
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise DamagedOutcome(f"{type(error).__name__}: {error}") from None


class Store:
    """A folder of outcomes that one process writes at a time.

    Raises:
        OutputError: the folder cannot be made, or another process holds it.
    """

    def __init__(self, output: Path) -> None:
        self.output = output
        self.cells = output / "cells"
        self.weights = output / "weights"
        self._lock: int | None = None

    def __enter__(self) -> Self:
        try:
            self.cells.mkdir(parents=True, exist_ok=True)
            self.weights.mkdir(exist_ok=True)
            self._lock = os.open(self.output / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise OutputError(f"{self.output}: cannot be written ({error.strerror})") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            holder = os.read(self._lock, 32).decode(errors="replace").strip()
            os.close(self._lock)
            self._lock = None
            raise OutputError(
                f"{self.output}: another process works here (id {holder or 'unknown'})"
            ) from None
        os.ftruncate(self._lock, 0)
        os.pwrite(self._lock, f"{os.getpid()}\n".encode(), 0)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def read(self, cell: Cell) -> Outcome | None:
        """How a cell ended, None if it has not.

        Raises:
            DamagedOutcome: its file cannot be read, or is another cell's.
        """
        try:
            text = outcome_path(self.cells, cell).read_text(encoding="utf-8")
        except FileNotFoundError:
            return None
        except (OSError, UnicodeDecodeError) as error:
            raise DamagedOutcome(str(error)) from None
        outcome = Outcome.from_json(text)
        if outcome.cell != cell:
            raise DamagedOutcome("it is another cell's")
        return outcome


def outcome_path(cells: Path, cell: Cell) -> Path:
    """Where a cell's outcome is kept."""
    return cells / f"{cell.key}.json"


def cell_state_path(cells: Path, cell: Cell) -> Path:
    """Where the state of a cell's run is kept until it is finished."""
    return cells / f"{cell.key}.state"


def write_outcome(cells: Path, outcome: Outcome) -> None:
    """Keep how a cell ended."""
    write_atomically(outcome_path(cells, outcome.cell), outcome.to_json().encode())
