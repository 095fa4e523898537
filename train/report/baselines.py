"""Baselines without a prompt: the same answer always, and a class head on the frozen backbone.

Every result is shown next to them, so that nobody mistakes a failed run for a good one. The head
reads [BOS] or the mean of the tokens, whichever is better on the validation rows, because [BOS]
alone is a weak control for sentence encoders.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from adapters.format.spec import Pooling
from train.metrics import AnyMetrics
from train.objective import Objective
from train.report.linear_head import Features, LinearHead
from train.thresholds import choose_thresholds


def majority(
    objective: Objective, train: Tensor, others: Mapping[str, Tensor], *, labels: int
) -> dict[str, AnyMetrics]:
    """Always answer the most frequent label of `train`, or the set of labels that has the highest
    micro-F1 there.

    Args:
        train: its classes, as `classes_of` gives them.
        others: classes by split.
    """
    answer = _best_set(train) if train.dim() == 2 else torch.bincount(train).argmax()
    return {
        split: objective.measure(answer.expand(true.shape), true, labels=labels)
        for split, true in others.items()
    }


def _best_set(train: Tensor) -> Tensor:
    """The most frequent labels, as many as give the highest micro-F1: bool [labels]."""
    supports, order = train.sum(dim=0).sort(descending=True, stable=True)
    sizes = torch.arange(1, len(order) + 1)
    f1 = 2 * supports.cumsum(dim=0) / (sizes * len(train) + supports.sum())
    answer = torch.zeros(len(order), dtype=torch.bool)
    answer[order[: int(f1.argmax()) + 1]] = True
    return answer


def head_only(
    objective: Objective,
    features: Features,
    classes: Mapping[str, Tensor],
    *,
    labels: int,
    advance: Callable[[int], object] = lambda _: None,
) -> tuple[dict[str, AnyMetrics], Pooling]:
    """A logistic regression on the backbone's last hidden states, and what it reads of them.

    Thresholds of labels are chosen on the validation rows, as an adapter's are.

    Args:
        classes: by split, as the features.
        advance: called with the number of training rows after each pass over them.
    """
    results = {
        pooling: _measure_head(objective, by_split, classes, labels, advance)
        for pooling, by_split in features.items()
    }

    def validation_score(pooling: Pooling) -> float:
        metrics = results[pooling].get("validation")
        return 0.0 if metrics is None else objective.metric.of(metrics)

    best = max(results, key=validation_score)
    return results[best], best


def _measure_head(
    objective: Objective,
    features: Mapping[str, Tensor],
    classes: Mapping[str, Tensor],
    labels: int,
    advance: Callable[[int], object],
) -> dict[str, AnyMetrics]:
    head = LinearHead.fit(
        objective, features["train"], classes["train"], labels=labels, advance=advance
    )
    logits = {split: head.logits(features[split]) for split in features.keys() - {"train"}}
    thresholds = None
    if "validation" in logits and classes["validation"].dim() == 2:
        thresholds = choose_thresholds(logits["validation"], classes["validation"])
    return {
        split: objective.measure(
            objective.predict(split_logits, thresholds=thresholds), classes[split], labels=labels
        )
        for split, split_logits in logits.items()
    }
