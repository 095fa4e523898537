"""Baselines without a prompt: the majority class, and a class head on the frozen backbone.

Every result is shown next to them, so that nobody mistakes a failed run for a good one. The head
reads [BOS] or the mean of the tokens, whichever is better on the validation rows, because [BOS]
alone is a weak control for sentence encoders.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from adapters.backbone.model import Backbone
from adapters.format.spec import Pooling
from train.loop.trunk_cache import TrunkCache
from train.metrics import Metrics, measure

CHUNK_TOKENS = 8192
# Weight of the squared norm, relative to the mean cross-entropy, for features of unit variance.
PENALTY = 1e-3
ITERATIONS = 100


def majority(train: Tensor, others: Mapping[str, Tensor], *, labels: int) -> dict[str, Metrics]:
    """Always answer the most frequent label of `train`.

    Args:
        train: its classes, int64 [rows].
        others: classes by split, int64 [rows].
    """
    most_frequent = int(torch.bincount(train, minlength=labels).argmax())
    return {
        split: measure(torch.full_like(true, most_frequent), true, labels=labels)
        for split, true in others.items()
    }


def head_only(
    backbone: Backbone,
    caches: Mapping[str, TrunkCache],
    classes: Mapping[str, Tensor],
    *,
    labels: int,
) -> dict[str, Metrics]:
    """A logistic regression on the backbone's last hidden states.

    Args:
        caches, classes: by split, `train` among them.
    """
    features = {split: _features(backbone, cache) for split, cache in caches.items()}
    results = [
        _logistic_regression(
            {split: by_pooling[pooling] for split, by_pooling in features.items()}, classes, labels
        )
        for pooling in Pooling
    ]

    def validation_accuracy(result: dict[str, Metrics]) -> float:
        return result["validation"].accuracy if "validation" in result else 0.0

    return max(results, key=validation_accuracy)


@torch.no_grad()
def _features(backbone: Backbone, cache: TrunkCache) -> dict[Pooling, Tensor]:
    """The pooled last hidden state of every example, float32 [examples, n] on the CPU."""
    features = {pooling: torch.empty(len(cache), backbone.hidden_size) for pooling in Pooling}
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
    features: Mapping[str, Tensor], classes: Mapping[str, Tensor], labels: int
) -> dict[str, Metrics]:
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
            functional.cross_entropy(inputs @ weight + bias, classes["train"])
            + PENALTY * weight.square().sum()
        )
        loss.backward()
        return loss

    optimizer.step(closure)
    metrics: dict[str, Metrics] = {}
    for split in features.keys() - {"train"}:
        with torch.no_grad():
            predicted = (((features[split] - centre) / scale) @ weight + bias).argmax(dim=-1)
        metrics[split] = measure(predicted, classes[split], labels=labels)
    return metrics
