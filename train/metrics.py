"""From predicted and true classes to figures. Knows no model."""

import torch
from torch import Tensor

from train.report import Metrics


def measure(predicted: Tensor, true: Tensor, *, labels: int) -> Metrics:
    """Accuracy, and the plain mean of F1 over the labels that occur among `true` or `predicted`.

    Args:
        predicted, true: int64 [rows], at least one row.
    """
    confusion = (
        torch.bincount(true * labels + predicted, minlength=labels * labels)
        .view(labels, labels)
        .double()
    )
    hits, present = confusion.diagonal(), confusion.sum(0) + confusion.sum(1)
    f1 = (2 * hits / present)[present > 0]
    return Metrics(accuracy=float(hits.sum() / confusion.sum()), macro_f1=float(f1.mean()))
