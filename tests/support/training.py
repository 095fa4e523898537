"""Small learnable data, quick runs on it, and progress that interrupts a run or records it."""

import random
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from adapters.format.files import Adapter, load_adapter
from train.config.settings import FitSettings
from train.data.dataset import Dataset, Example
from train.fit.fit import fit
from train.loop.graphs import Run, StepInputs
from train.loop.progress import EpochReport, Progress
from train.report.card_file import card_path
from train.report.data_checks import repeats_path, suspects_path
from train.report.report import FitReport

EPOCHS = 4


def dataset(rows: int, *, seed: int, labels: tuple[str, str] = ("good", "bad")) -> Dataset:
    """Texts with the word good or bad among others. labels: the labels for good and bad."""
    rng = random.Random(seed)
    examples = []
    for _ in range(rows):
        chosen = rng.choice((0, 1))
        words = [
            rng.choice(("the", "card", "my", "call", "you", "now"))
            for _ in range(rng.randint(1, 8))
        ]
        words.insert(rng.randint(0, len(words)), ("good", "bad")[chosen])
        examples.append(Example(" ".join(words), None, labels[chosen]))
    return Dataset(f"made-{seed}", f"{seed:064x}", tuple(examples))


TRAIN, VALIDATION, TEST = dataset(90, seed=1), dataset(40, seed=2), dataset(40, seed=3)


def settings_of(backbone: str | None, **values: Any) -> FitSettings:
    """A quick run; `values` are any of FitSettings'."""
    quick = {"epochs": EPOCHS, "batch_size": 8, "learning_rate": 3e-3, "patience": EPOCHS} | values
    return FitSettings(backbone=backbone, device="cpu", seed=5, **quick)


def fitted(
    settings: FitSettings, output: Path, progress: Progress | None = None
) -> tuple[FitReport, Adapter]:
    """One run on the three data sets: its report and its adapter."""
    report = fit(TRAIN, VALIDATION, TEST, settings, output, progress or Progress())
    return report, load_adapter(output)


def files_of(output: Path) -> list[Path]:
    """What one run on the three data sets leaves: their rows repeat each other."""
    return sorted([output, card_path(output), repeats_path(output), suspects_path(output)])


def is_same(one: Adapter, other: Adapter) -> bool:
    """Whether all tensors are equal, bit for bit."""
    return one.tensors.keys() == other.tensors.keys() and all(
        torch.equal(tensor, other.tensors[name]) for name, tensor in one.tensors.items()
    )


class Interrupt(Progress):
    """Ctrl-C, or another error, after this number of steps."""

    def __init__(self, steps: int, error: BaseException | None = None) -> None:
        self.left = steps
        self.error = error or KeyboardInterrupt()

    def advance(
        self,
        texts: int,  # noqa: ARG002  # Progress has it
        *,
        loss: float | None = None,
        accuracy: float | None = None,  # noqa: ARG002  # Progress has it
    ) -> None:
        if loss is not None:
            self.left -= 1
        if self.left == 0:
            raise self.error


class RecordingProgress(Progress):
    """Records notes, stages and epochs."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.stages: list[str] = []
        self.epochs: list[EpochReport] = []

    def note(self, message: str) -> None:
        self.notes.append(message)

    def begin(self, stage: str, *, texts: int, later: int = 0) -> None:  # noqa: ARG002  # Progress has it
        self.stages.append(stage)

    def epoch_done(self, report: EpochReport) -> None:
        self.epochs.append(report)


class PlainRecorder:
    """Records nothing and runs the step again (`train.loop.graphs.Recorder`): all of it but CUDA.

    Attributes:
        recorded, replayed: how often.
    """

    def __init__(self) -> None:
        self.recorded = self.replayed = 0

    def lane(self) -> AbstractContextManager[None]:
        return nullcontext()

    def record(self, run: Run, inputs: StepInputs) -> Run:  # noqa: ARG002  # Recorder has it
        self.recorded += 1

        def replay(inputs: StepInputs) -> torch.Tensor:
            self.replayed += 1
            return run(inputs)

        return replay
