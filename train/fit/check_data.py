"""The checks of `fit` on its data, from before the training to the lists beside the adapter."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from adapters.tokenizer import TextEncoder
from train.data.dataset import Dataset, check_same_task, check_trainable
from train.data.repeats import Repeats, dropped_rows, find_repeats, without_leaks
from train.loop.encoded_splits import Split
from train.loop.progress import Progress
from train.objective import Activation, Objective
from train.report.data_checks import DataChecks, Reading, write_repeats, write_suspects
from train.report.suspects import find_suspects


@dataclass(slots=True)
class CheckedData:
    """The rows to train on, and what was found so far.

    given, repeats: before any row was left out. sets: after that. groups: of each row of
    `sets["train"]`; rows of the same text have the same number.
    """

    given: Mapping[str, Dataset]
    repeats: Repeats
    sets: dict[str, Dataset]
    groups: Sequence[int]
    checks: DataChecks

    def read(
        self,
        splits: Mapping[str, Split],
        encoder: TextEncoder,
        progress: Progress,
        *,
        max_length: int,
    ) -> None:
        """Count what the tokenizer cannot read and what is cut."""
        reading = {
            name: Reading.of(split.cache.encodings, encoder, max_length)
            for name, split in splits.items()
        }
        self.checks = replace(self.checks, reading=reading)
        for line in self.checks.of_reading():
            progress.note(line)

    def finish(
        self,
        objective: Objective,
        activation: Activation,
        features: Tensor,
        classes: Tensor,
        labels: Sequence[str],
        output: Path,
        *,
        seed: int,
        write: bool,
    ) -> DataChecks:
        """Look for rows that are probably labelled wrong, and write both lists.

        Args:
            features, classes: of the training rows.
            output: the adapter's file.
            write: whether this process writes.

        Raises:
            OSError: a list cannot be written.
        """
        suspects = find_suspects(
            objective, activation, features, classes, self.groups, labels=len(labels), seed=seed
        )
        files = {}
        if write:
            files["suspects"] = write_suspects(output, self.sets["train"], labels, suspects)
            if (name := write_repeats(output, self.given, self.repeats)) is not None:
                files["repeats"] = name
        likely = sum(suspect.likely for suspect in suspects)
        return replace(self.checks, suspects=likely, files=files)


def check_data(sets: Mapping[str, Dataset], progress: Progress, *, drop: bool) -> CheckedData:
    """Compare all rows, and leave out what leaks if the caller wants that.

    Raises:
        DataError: what is left cannot be trained on.
    """
    repeats = find_repeats(sets)
    checks = DataChecks.of(sets, repeats, drop=drop)
    for line in checks.of_rows():
        progress.note(line)
    kept, groups = dict(sets), list(repeats.groups)
    if drop:
        kept = without_leaks(sets, repeats)
        dropped = dropped_rows(repeats).get("train", set())
        groups = [group for row, group in enumerate(groups) if row not in dropped]
        check_trainable(kept["train"])
        for name, dataset in kept.items():
            if name != "train":
                check_same_task(kept["train"], dataset)
    return CheckedData(sets, repeats, kept, groups, checks)
