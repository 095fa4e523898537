"""What every system of `training` is given: texts, labels, batches, a device. Knows no system."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from benchmarks.texts import make_texts, words_of
from train.config.settings import ComputeType
from train.data.dataset import Dataset, Example

MAX_TOKENS = 256
PROMPT_LENGTH = 10
SEED = 13
LABELS = ("no", "yes")


@dataclass(frozen=True, slots=True)
class Work:
    """The same for all of them. source: a backbone's name or folder. dtype: what is computed in.

    texts, labels: row by row.
    """

    source: str
    device: str
    dtype: ComputeType
    batch_size: int
    texts: tuple[str, ...]
    labels: tuple[str, ...]

    def dataset(self) -> Dataset:
        """The rows as training reads them."""
        rows = zip(self.texts, self.labels, strict=True)
        examples = tuple(Example(text, None, label) for text, label in rows)
        return Dataset("random words", "0" * 64, examples)

    def batches(self) -> Iterator[list[int]]:
        """Which rows make a step, in the order of `train.loop.loop`'s first epoch."""
        order = np.random.default_rng([SEED, 0]).permutation(len(self.texts))
        for first in range(0, len(order), self.batch_size):
            yield order[first : first + self.batch_size].tolist()


@dataclass(frozen=True, slots=True)
class Epoch:
    """Forward, backward, clip and step over all batches. loss: the mean over rows."""

    seconds: float
    loss: float


class Trainee(Protocol):
    """One system with its model on its device, ready to train."""

    def epoch(self) -> Epoch:
        """Train one; the device has nothing left to do in the end."""

    def close(self) -> None:
        """Free what it kept beside the model."""


def make_work(
    source: str,
    *,
    device: torch.device,
    dtype: ComputeType,
    rows: int,
    mean_tokens: float,
    batch_size: int,
) -> Work:
    """Random words under random labels, of which both occur."""
    texts = make_texts(words_of(source), count=rows, mean_tokens=mean_tokens)
    rng = random.Random(0)
    labels = [*LABELS, *rng.choices(LABELS, k=rows - len(LABELS))]
    return Work(source, str(device), dtype, batch_size, tuple(texts), tuple(labels))
