"""The score that each label needs to belong to an answer, chosen on validation rows.

A label's best threshold for F1 is rarely a half, least of all where few texts have the label
(Lipton, Elkan and Narayanaswamy, Optimal Thresholding of Classifiers to Maximize F1, 2014). But a
threshold that is fitted to few texts is fitted to their noise. So it is shrunk twice, on the scale
of logits: the threshold of all labels together towards a half, and each label's towards that. The
weight of what was fitted is n / (n + SUPPORT), n the texts that have the label.
"""

import math

import torch
from torch import Tensor

# Texts with a label at which its own threshold counts as much as that of all labels together.
SUPPORT = 20
# Beyond these scores (0.018 and 0.982) a threshold is a guess about scores that were not seen.
MOST_LOGIT = 4.0
# Thresholds are stored with so many digits.
DIGITS = 4


def choose_thresholds(logits: Tensor, true: Tensor) -> tuple[float, ...]:
    """A threshold for each label, between 0 and 1.

    They are a half each if the chosen ones do not raise micro-F1 on these rows.

    Args:
        logits: float [rows, labels], divided by the temperature.
        true: float [rows, labels], 1 for the labels that a text has.
    """
    logits, has = logits.detach().double().cpu(), true.cpu() > 0
    supports = has.sum(dim=0).tolist()
    together = _shrunk(_best(logits.reshape(-1), has.reshape(-1)), 0.0, sum(supports))
    cuts = [
        _shrunk(_best(logits[:, label], has[:, label]), together, support)
        for label, support in enumerate(supports)
    ]
    thresholds = tuple(round(1 / (1 + math.exp(-cut)), DIGITS) for cut in cuts)
    halves = (0.5,) * len(cuts)
    if _micro_f1(logits, has, thresholds) <= _micro_f1(logits, has, halves):
        return halves
    return thresholds


def _best(logits: Tensor, has: Tensor) -> float | None:
    """The cut between two logits with the highest F1; of equal ones the nearest to zero.

    None if no text has the label.

    Args:
        logits: float64 [decisions].
        has: bool [decisions].
    """
    positives = int(has.sum())
    if not positives:
        return None
    ordered, order = logits.sort(descending=True)
    hits = has[order].cumsum(dim=0)
    counts = torch.arange(1, len(ordered) + 1)
    f1 = 2 * hits / (counts + positives)
    # The cut after the k-th logit is half way to the next; after the last, one below it.
    following = torch.cat([ordered[1:], ordered[-1:] - 2.0])
    cuts = (ordered + following) / 2
    f1[ordered == following] = -1.0
    best = cuts[f1 == f1.max()]
    return float(best[best.abs().argmin()])


def _shrunk(best: float | None, towards: float, support: int) -> float:
    if best is None:
        return towards
    limited = min(max(best, -MOST_LOGIT), MOST_LOGIT)
    weight = support / (support + SUPPORT)
    return weight * limited + (1 - weight) * towards


def _micro_f1(logits: Tensor, has: Tensor, thresholds: tuple[float, ...]) -> float:
    predicted = logits.sigmoid() >= torch.tensor(thresholds, dtype=torch.float64)
    occurrences = int(predicted.sum() + has.sum())
    return 2 * int((predicted & has).sum()) / occurrences if occurrences else 0.0
