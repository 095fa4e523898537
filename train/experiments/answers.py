"""The answers of a run to the reported rows, as one short text for each split.

`0 2 1`: the positions of the labels, one for each row. Where a text has a set of labels, `0+2 - 1`:
the positions of its labels, `-` for none.
"""

import torch
from torch import Tensor


def packed(predicted: Tensor) -> str:
    """predicted: int64 [rows], or bool [rows, labels]."""
    if predicted.dim() == 1:
        return " ".join(map(str, predicted.tolist()))
    sets = (row.nonzero().ravel().tolist() for row in predicted)
    return " ".join("+".join(map(str, labels)) or "-" for labels in sets)


def unpacked(answers: str, *, labels: int, several: bool) -> Tensor:
    """What `packed` was given.

    Raises:
        ValueError: not what it gives.
    """
    parts = answers.split(" ")
    if not several:
        return torch.tensor([int(part) for part in parts])
    predicted = torch.zeros(len(parts), labels, dtype=torch.bool)
    for row, part in enumerate(parts):
        if part != "-":
            predicted[row, [int(label) for label in part.split("+")]] = True
    return predicted
