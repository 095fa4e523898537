"""Small data that can be learnt and runs that a test can interrupt, for tests of training."""

import random
from pathlib import Path
from typing import Any

import torch

from adapters.format.files import Adapter, load_adapter
from train.config.settings import FitSettings
from train.data.dataset import Dataset, Example
from train.fit.fit import fit
from train.loop.progress import EpochReport, Progress
from train.report.report import FitReport

EPOCHS = 4


def dataset(rows: int, *, seed: int, labels: tuple[str, str] = ("good", "bad")) -> Dataset:
    """Texts that say good or bad among other words. labels: what good and bad are called."""
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
    given = {"epochs": EPOCHS, "batch_size": 8, "learning_rate": 3e-3, "patience": EPOCHS} | values
    return FitSettings(backbone=backbone, device="cpu", seed=5, **given)


def fitted(
    settings: FitSettings, output: Path, progress: Progress | None = None
) -> tuple[FitReport, Adapter]:
    """One run on the three data sets, and what it wrote."""
    report = fit(TRAIN, VALIDATION, TEST, settings, output, progress or Progress())
    return report, load_adapter(output)


def is_same(one: Adapter, other: Adapter) -> bool:
    """Bit for bit."""
    return one.tensors.keys() == other.tensors.keys() and all(
        torch.equal(tensor, other.tensors[name]) for name, tensor in one.tensors.items()
    )


class Interrupt(Progress):
    """Ctrl-C, or another end, after so many steps."""

    def __init__(self, steps: int, error: BaseException | None = None) -> None:
        self.left = steps
        self.error = error or KeyboardInterrupt()

    def advance(
        self,
        texts: int,  # noqa: ARG002  # the protocol's
        *,
        loss: float | None = None,
        accuracy: float | None = None,  # noqa: ARG002  # the protocol's
    ) -> None:
        if loss is not None:
            self.left -= 1
        if self.left == 0:
            raise self.error


class Told(Progress):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.stages: list[str] = []
        self.epochs: list[EpochReport] = []

    def note(self, message: str) -> None:
        self.notes.append(message)

    def begin(self, stage: str, *, texts: int, later: int = 0) -> None:  # noqa: ARG002  # the protocol's
        self.stages.append(stage)

    def epoch_done(self, report: EpochReport) -> None:
        self.epochs.append(report)
