"""What every system of `training` gets: texts, labels, batches, a device."""

import random
from collections.abc import Iterator
from dataclasses import dataclass

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
    """One training set, the same for all systems.

    source: a backbone's name or folder. dtype: the type of computation. texts, labels: by row.
    """

    source: str
    device: str
    dtype: ComputeType
    batch_size: int
    texts: tuple[str, ...]
    labels: tuple[str, ...]

    def dataset(self) -> Dataset:
        """The rows as `train` reads them."""
        rows = zip(self.texts, self.labels, strict=True)
        examples = tuple(Example(text, None, label) for text, label in rows)
        return Dataset("random words", "0" * 64, examples)

    def batches(self, epoch: int = 0) -> Iterator[list[int]]:
        """The rows of each step, in the order that `train.loop.loop` has in this epoch."""
        order = np.random.default_rng([SEED, epoch]).permutation(len(self.texts))
        for first in range(0, len(order), self.batch_size):
            yield order[first : first + self.batch_size].tolist()


@dataclass(frozen=True, slots=True)
class Epoch:
    """Forward, backward, clipping and step over all batches. loss: the mean over rows."""

    seconds: float
    loss: float


def make_work(
    source: str,
    *,
    device: torch.device,
    dtype: ComputeType,
    rows: int,
    mean_tokens: float,
    batch_size: int,
) -> Work:
    """Random words with random labels; both labels occur."""
    texts = make_texts(words_of(source), count=rows, mean_tokens=mean_tokens)
    rng = random.Random(0)
    labels = [*LABELS, *rng.choices(LABELS, k=rows - len(LABELS))]
    return Work(source, str(device), dtype, batch_size, tuple(texts), tuple(labels))
