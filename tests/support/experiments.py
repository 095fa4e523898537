"""Small experiments: four tiny tasks, a tiny random backbone, and a display that runs callbacks."""

import json
import multiprocessing
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.support import families
from train.config.settings import FitSettings
from train.experiments import pool
from train.experiments.cells import Cell, Findings, Kind, Outcome, RunReport
from train.experiments.compare import compare
from train.experiments.display import Display
from train.loop.progress import EpochReport
from train.metrics import Metrics

COMMAND = "the command"
# Epochs of a run that is long enough to be interrupted.
LONG = 45


# What a worker takes long to import.
_LOADED = ["train.experiments.pool", "accelerate", "transformers.models.bert.modeling_bert"]


@contextmanager
def warm_workers() -> Iterator[None]:
    """Workers are forked from a process that has loaded torch, until the block ends.

    A reader's load it themselves, for seconds; those of the process that test_killed.py kills, too.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_LOADED)
    with pytest.MonkeyPatch.context() as patch:
        # The pool uses nothing else of it.
        patch.setattr(pool, "multiprocessing", SimpleNamespace(get_context=lambda _: context))
        yield


# Pairs of tasks whose labels mean the same.
_TASKS = {
    "sst2": ("positive", "negative"),
    "imdb": ("positive", "negative"),
    "mrpc": ("equivalent", "not_equivalent"),
    "qqp": ("duplicate", "not_duplicate"),
}


def make_workspace(folder: Path) -> None:
    """Write a backbone, and four tasks with the names of real ones."""
    families.save("bert", folder / "bert")
    for task, labels in _TASKS.items():
        (folder / "data" / task).mkdir(parents=True)
        for split, rows in (("train", 60), ("validation", 30)):
            path = folder / "data" / task / f"{split}.jsonl"
            draw = random.Random(f"{task} {split}")
            lines = (json.dumps(_row(draw, labels, task in ("mrpc", "qqp"))) for _ in range(rows))
            path.write_text("\n".join(lines))


def _row(draw: random.Random, labels: tuple[str, str], paired: bool) -> dict[str, str]:
    """A row whose text has `good` or `bad` among other words."""
    index = draw.randrange(2)
    words = [draw.choice(("the", "card", "my", "call")) for _ in range(draw.randint(1, 5))]
    words.insert(draw.randint(0, len(words)), ("good", "bad")[index])
    row = {"text": " ".join(words), "label": labels[index]}
    return row | {"text_pair": "is it now"} if paired else row


def settings_of(workspace: Path, *, epochs: int = 3) -> FitSettings:
    """Settings for short runs on a CPU that never stop early."""
    return FitSettings(
        backbone=str(workspace / "bert"),
        device="cpu",
        command=COMMAND,
        epochs=epochs,
        patience=epochs,
        batch_size=16,
        learning_rate=3e-3,
    )


class Watch(Display):
    """Records what an experiment reports, and calls back."""

    def __init__(
        self,
        *,
        begin: Callable[[Mapping[Cell, float]], None] = lambda _: None,
        started: Callable[[Cell], None] = lambda _: None,
        progressed: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.notes: list[str] = []
        self.started_cells: list[Cell] = []
        self.stages: list[str] = []
        self._begin, self._started, self._progressed = begin, started, progressed

    def note(self, message: str) -> None:
        self.notes.append(message)

    def begin(self, *, cells: int, finished: int, costs: Mapping[Cell, float]) -> None:
        assert cells == finished + len(costs)
        self._begin(costs)

    def started(self, cell: Cell, device: str) -> None:
        assert device == "cpu"
        self.started_cells.append(cell)
        self._started(cell)

    def progressed(self, cell: Cell, stage: str, share: float) -> None:
        assert cell in self.started_cells
        assert 0 <= share <= 1
        self.stages.append(stage)
        self._progressed(stage)


def compare_long(workspace: Path, output: Path, watch: Watch | None = None) -> Findings:
    """One method on two tasks, one after the other, in the folder that `make_workspace` wrote."""
    return compare(
        ("sst2", "imdb"),
        ("idspam",),
        (1,),
        settings_of(workspace, epochs=LONG),
        output,
        data_root=workspace / "data",
        jobs=1,
        display=watch,
    )


def cell_named(task: str = "rte", method: str = "idspam", variant: str = "", seed: int = 1) -> Cell:
    """A cell with a readable key."""
    return Cell(Kind.COMPARE, task, method, variant, seed, f"{task}-{method}-{variant}-{seed}")


def report_of(cell: Cell, accuracy: float, *, epochs: int = 2) -> RunReport:
    """The report of a run with this accuracy on its reported rows."""
    metrics = Metrics(accuracy, accuracy, 0.0)
    history = tuple(
        EpochReport(number, 0.5, accuracy / 2 * number, 0.5, 1.0, 10.0)
        for number in range(1, epochs + 1)
    )
    return RunReport(
        method=cell.method,
        seed=cell.seed,
        metrics={"selection": Metrics(0.1, 0.1, 0.0), "validation": metrics},
        majority={"validation": Metrics(0.5, 0.3, 0.0)},
        trainable_parameters=1000,
        seconds=75.0,
        seconds_per_epoch=1.5,
        peak_memory=2**20,
        epochs=history,
        best_epoch=epochs,
        learning_rate=1e-3,
    )


def finished(cell: Cell, accuracy: float) -> Outcome:
    """The outcome of a successful run."""
    return Outcome(cell, report_of(cell, accuracy), None, device="cpu")


def failed(cell: Cell, why: str = "the loss | is nan") -> Outcome:
    """The outcome of a failed run."""
    return Outcome(cell, None, why, device="cpu")
