"""Baselines without a prompt: the same answer always, and a class head on the frozen backbone.

Every result is shown next to them, so that nobody mistakes a failed run for a good one. The head
reads [BOS] or the mean of the tokens, whichever is better on the validation rows, because [BOS]
alone is a weak control for sentence encoders.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from adapters.backbone.model import Backbone
from adapters.format.spec import Pooling
from train.loop.trunk_cache import TrunkCache
from train.metrics import AnyMetrics
from train.objective import Objective
from train.thresholds import choose_thresholds

CHUNK_TOKENS = 8192
# Weight of the squared norm, relative to the mean cross-entropy, for features of unit variance.
PENALTY = 1e-3
ITERATIONS = 100
# `FIRST` reads a prompt vector, and a head alone has none.
POOLINGS = (Pooling.ANSWER, Pooling.MEAN)


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
    backbone: Backbone,
    objective: Objective,
    caches: Mapping[str, TrunkCache],
    classes: Mapping[str, Tensor],
    *,
    labels: int,
) -> dict[str, AnyMetrics]:
    """A logistic regression on the backbone's last hidden states.

    Thresholds of labels are chosen on the validation rows, as an adapter's are.

    Args:
        caches, classes: by split, `train` among them.
    """
    features = {split: _features(backbone, cache) for split, cache in caches.items()}
    results = [
        _logistic_regression(
            objective,
            {split: by_pooling[pooling] for split, by_pooling in features.items()},
            classes,
            labels,
        )
        for pooling in POOLINGS
    ]

    def validation_score(result: dict[str, AnyMetrics]) -> float:
        return objective.metric.of(result["validation"]) if "validation" in result else 0.0

    return max(results, key=validation_score)


@torch.no_grad()
def _features(backbone: Backbone, cache: TrunkCache) -> dict[Pooling, Tensor]:
    """The pooled last hidden state of every example, float32 [examples, n] on the CPU."""
    features = {pooling: torch.empty(len(cache), backbone.hidden_size) for pooling in POOLINGS}
    for chosen in cache.chunks(CHUNK_TOKENS):
        batch = cache.pack(chosen)
        trunk = backbone.trunk(batch, backbone.layers, start=cache.trunk(chosen, batch))
        states = backbone.final_norm(trunk.hidden).float().cpu()
        starts, lengths = (
            torch.from_numpy(batch.layout.starts),
            torch.from_numpy(batch.layout.lengths),
        )
        index = torch.tensor(chosen)[torch.from_numpy(batch.order)]
        features[Pooling.ANSWER][index] = states[
            starts + lengths - 1 if backbone.family.causal else starts
        ]
        features[Pooling.MEAN][index] = torch.stack(
            [piece.mean(dim=0) for piece in states.split(lengths.tolist())]
        )
    return features


def _logistic_regression(
    objective: Objective,
    features: Mapping[str, Tensor],
    classes: Mapping[str, Tensor],
    labels: int,
) -> dict[str, AnyMetrics]:
    train = features["train"]
    centre, scale = train.mean(dim=0), train.std(dim=0).clamp_min(1e-6)
    weight = torch.zeros(train.shape[1], labels, requires_grad=True)
    bias = torch.zeros(labels, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=ITERATIONS, line_search_fn="strong_wolfe"
    )
    inputs = (train - centre) / scale

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (
            objective.loss(inputs @ weight + bias, classes["train"]) / len(inputs)
            + PENALTY * weight.square().sum()
        )
        loss.backward()
        return loss

    optimizer.step(closure)
    logits = {
        split: (((features[split] - centre) / scale) @ weight + bias).detach()
        for split in features.keys() - {"train"}
    }
    thresholds = None
    if "validation" in logits and classes["validation"].dim() == 2:
        thresholds = choose_thresholds(logits["validation"], classes["validation"])
    return {
        split: objective.measure(
            objective.predict(split_logits, thresholds=thresholds), classes[split], labels=labels
        )
        for split, split_logits in logits.items()
    }
