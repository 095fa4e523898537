"""Finished cells on disk, one JSON file each, and the lock of their folder. Knows no process.

OUTPUT/cells/<key>.json     how a cell ended
OUTPUT/cells/<key>.state    where the run of an unfinished one stands
OUTPUT/weights/             trained tensors that other cells start from
"""

import fcntl
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from adapters.durable import write_atomically
from train.errors import OutputError
from train.experiments.cells import FORMAT, Cell, Kind
from train.runs import RunReport


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
