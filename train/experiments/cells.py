"""The data of an experiment: cells, what they need to run, how they ended, and where that is kept.

A cell's key contains a hash of everything that decides its result, so a stored result is never
mistaken for one of other settings or other data.
"""

import fcntl
import hashlib
import json
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Self, TypeAlias

from adapters.format.durable import write_atomically
from train.config.settings import FitSettings
from train.data.dataset import Dataset
from train.errors import OutputError
from train.loop.progress import EpochReport
from train.metrics import AnyMetrics, Metric, Metrics, MultiLabelMetrics

# Raised when a change of the code changes results: outcomes of other formats are not read.
FORMAT = 1

# The duration of an epoch, relative to a soft prompt in the middle of the backbone.
_RELATIVE_COST = {"head-only": 0.2, "head-only-mean": 0.2, "fine-tuning": 3.0} | dict.fromkeys(
    ("lora", "vectors", "idspam+vectors"), 2.0
)


class Kind(StrEnum):
    """The kind of experiment that a cell belongs to."""

    COMPARE = "compare"
    ABLATE = "ablate"
    TRANSFER = "transfer"


@dataclass(frozen=True, slots=True)
class Cell:
    """One run: a method on a task with a seed.

    variant: the difference from the plain run (`prompt_length=5`, `100 rows after qqp`), else "".
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
        """For people."""
        parts = (self.task, self.method, self.variant, f"seed {self.seed}")
        return " ".join(part for part in parts if part)


@dataclass(frozen=True, slots=True)
class TaskSplits:
    """The data that runs are trained and measured on, hashed once for all of them.

    splits: `train`, `selection` (chooses the best epoch), and the reported ones. characters: by
    split.
    """

    splits: Mapping[str, Dataset]
    metric: Metric
    sha256: str
    characters: Mapping[str, int]

    @classmethod
    def of(cls, splits: Mapping[str, Dataset], metric: Metric) -> Self:
        """Hash the rows themselves, because several parts of one file share the file's hash."""
        digest = hashlib.sha256()
        for name, dataset in splits.items():
            digest.update(f"{name} {dataset.sha256} {len(dataset)}\n".encode())
            for row in dataset.examples:
                digest.update(json.dumps([row.text, row.text_pair, row.label]).encode())
        characters = {
            name: sum(len(row.text) + len(row.text_pair or "") for row in dataset.examples)
            for name, dataset in splits.items()
        }
        return cls(splits, metric, digest.hexdigest(), characters)

    @property
    def reported(self) -> list[str]:
        """The splits that are used for no choice; the first one is the task's main result."""
        return [name for name in self.splits if name not in ("train", "selection")]

    def cost(self, method: str, *, epochs: int) -> float:
        """Roughly proportional to a run's duration: characters that pass through the backbone."""
        training = _RELATIVE_COST.get(method, 1.0) * epochs * self.characters["train"]
        return training + sum(self.characters.values())


@dataclass(frozen=True, slots=True)
class PlannedCell:
    """A cell and everything that its run needs.

    cost: without a unit, for scheduling. weights: where to write the trained tensors, if they are
    needed. adapter: where to write them as an adapter file, if they are to be kept. after: the cell
    that it starts from; `initial` holds that cell's trained tensors.
    """

    cell: Cell
    data: TaskSplits
    settings: FitSettings
    cost: float
    weights: Path | None = None
    adapter: Path | None = None
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
    """A cell with its key.

    Args:
        decides: everything that decides the result besides method and seed, as JSON values.
    """
    content = {"format": FORMAT, "method": method, "seed": seed, **decides}
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    names = (kind.value, task, method, variant, f"s{seed}", digest[:16])
    key = "-".join(_file_name_part(name) for name in names if name)
    return Cell(kind, task, method, variant, seed, key)


def _file_name_part(name: str) -> str:
    return re.sub("[^a-z0-9._]+", "_", name.lower()).strip("._")[:48] or "_"


@dataclass(frozen=True, slots=True)
class RunReport:
    """The result of one run.

    metrics, majority: by split. peak_memory: bytes (`train.loop.memory`). best_epoch: from 1.
    answers: by reported split, what was answered for each row (`train.experiments.answers`); empty
    in results of versions that did not keep them.
    """

    method: str
    seed: int
    metrics: Mapping[str, AnyMetrics]
    majority: Mapping[str, AnyMetrics]
    trainable_parameters: int
    seconds: float
    seconds_per_epoch: float
    peak_memory: int
    epochs: tuple[EpochReport, ...]
    best_epoch: int
    learning_rate: float
    answers: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Self:
        """
        Raises:
            ValueError, KeyError, TypeError: not what `dataclasses.asdict` gives.
        """
        fields = dict(content)
        fields["epochs"] = tuple(EpochReport(**epoch) for epoch in fields["epochs"])
        for name in ("metrics", "majority"):
            fields[name] = {split: _metrics(each) for split, each in fields[name].items()}
        return cls(**fields)


def _metrics(content: Mapping[str, float]) -> AnyMetrics:
    kind = MultiLabelMetrics if "micro_f1" in content else Metrics
    return kind(**content)


class DamagedOutcome(Exception):
    """A cell's file that cannot be read; the message says why."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a cell ended: with a report, or with the reason why there is none.

    device: where it ran. trace: the traceback of an unexpected error.
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
            "report": None if self.report is None else asdict(self.report),
        }
        return json.dumps(content, indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Self:
        """
        Raises:
            DamagedOutcome: not what `to_json` writes.
        """
        try:
            content: dict[str, Any] = json.loads(text)
            cell = dict(content["cell"])
            report, failure = content["report"], content["failure"]
            if (report is None) == (failure is None):
                raise DamagedOutcome("neither or both of report and failure")
            return cls(
                cell=Cell(**cell | {"kind": Kind(cell["kind"])}),
                report=None if report is None else RunReport.from_dict(report),
                failure=failure,
                device=content["device"],
                trace=content["trace"],
            )
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise DamagedOutcome(f"{type(error).__name__}: {error}") from None


# By the cells' keys; cells that have not ended yet are absent.
Outcomes: TypeAlias = Mapping[str, Outcome]


@dataclass(frozen=True, slots=True)
class Findings:
    """The result of an experiment.

    metrics: by task, the one that judges it. advice: one sentence, at the end of a comparison. If
    cells failed, the command exits with code 1, and
    its next start tries them again.
    """

    output: Path
    cells: tuple[Cell, ...]
    outcomes: Outcomes
    metrics: Mapping[str, Metric]
    advice: str = ""

    @property
    def failed(self) -> tuple[Outcome, ...]:
        """The outcomes without a report."""
        ended = (self.outcomes.get(cell.key) for cell in self.cells)
        return tuple(outcome for outcome in ended if outcome and outcome.failure is not None)


class Store:
    """A folder of outcomes; one process at a time may use it, as a context manager.

    If an error ends the block before anything was written, the folder is as before.

    Raises:
        OutputError: the folder cannot be created, or another process uses it.
    """

    def __init__(self, output: Path) -> None:
        self.output = output
        self.cells = output / "cells"
        self.weights = output / "weights"
        self._lock: int | None = None
        # What it created, in this order.
        self._created: list[Path] = []

    def __enter__(self) -> Self:
        lock = self.output / ".lock"
        paths = (*reversed(self.output.parents), self.output, self.cells, self.weights, lock)
        self._created = [path for path in paths if not path.exists()]
        try:
            self.cells.mkdir(parents=True, exist_ok=True)
            self.weights.mkdir(exist_ok=True)
            self._lock = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
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

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and not self._has_content():
            self._remove_created()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _has_content(self) -> bool:
        own = {self.cells, self.weights, self.output / ".lock"}
        folders = [folder for folder in (self.output, self.cells, self.weights) if folder.is_dir()]
        return any(path not in own for folder in folders for path in folder.iterdir())

    def _remove_created(self) -> None:
        for path in reversed(self._created):
            with suppress(OSError):
                path.rmdir() if path.is_dir() else path.unlink()

    def read(self, cell: Cell) -> Outcome | None:
        """How a cell ended; None if it has not ended yet.

        Raises:
            DamagedOutcome: its file cannot be read, or belongs to another cell.
        """
        try:
            text = outcome_path(self.cells, cell).read_text(encoding="utf-8")
        except FileNotFoundError:
            return None
        except (OSError, UnicodeDecodeError) as error:
            raise DamagedOutcome(str(error)) from None
        outcome = Outcome.from_json(text)
        if outcome.cell != cell:
            raise DamagedOutcome("it belongs to another cell")
        return outcome

    def adapter_path(self, cell: Cell) -> Path:
        """Where the adapter of a cell is kept for people."""
        return self.output / "adapters" / f"{cell.key}.safetensors"

    def weights_path(self, cell: Cell) -> Path:
        """Where a cell's trained tensors are kept for others to start from."""
        return self.weights / f"{cell.key}.safetensors"


def outcome_path(cells: Path, cell: Cell) -> Path:
    """The file of a cell's outcome in the folder `cells`."""
    return cells / f"{cell.key}.json"


def checkpoint_path(cells: Path, cell: Cell) -> Path:
    """The file of a running cell's training state in the folder `cells`."""
    return cells / f"{cell.key}.state"


def write_outcome(cells: Path, outcome: Outcome) -> None:
    """Store how a cell ended in the folder `cells`."""
    write_atomically(outcome_path(cells, outcome.cell), outcome.to_json().encode())
