"""A logistic regression on the frozen backbone: a control, and what judges training labels.

It reads the last hidden states, computed from those that the trunk's cache keeps: the upper layers
run once for each row.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Self, TypeAlias

import torch
from torch import Tensor

from adapters.backbone.model import Backbone
from adapters.format.spec import Pooling
from train.loop.trunk_cache import TrunkCache
from train.objective import Objective

CHUNK_TOKENS = 8192
# Weight of the squared norm, relative to the mean cross-entropy, for features of unit variance.
PENALTY = 1e-3
ITERATIONS = 100
# `FIRST` reads a prompt vector, and a head alone has none.
POOLINGS = (Pooling.ANSWER, Pooling.MEAN)

# By pooling and split: float32 [examples, n] on the CPU.
Features: TypeAlias = Mapping[Pooling, Mapping[str, Tensor]]


def features_of(
    backbone: Backbone,
    caches: Mapping[str, TrunkCache],
    *,
    advance: Callable[[int], object] = lambda _: None,
) -> Features:
    """The pooled last hidden state of every example.

    Args:
        caches: by split.
        advance: called with the number of examples that were just read.
    """
    by_split = {split: _pooled(backbone, cache, advance) for split, cache in caches.items()}
    return {
        pooling: {split: pooled[pooling] for split, pooled in by_split.items()}
        for pooling in POOLINGS
    }


@dataclass(frozen=True, slots=True)
class LinearHead:
    """centre, scale: of the features, [n]. weight: [n, labels]. bias: [labels]."""

    centre: Tensor
    scale: Tensor
    weight: Tensor
    bias: Tensor

    @classmethod
    def fit(
        cls,
        objective: Objective,
        features: Tensor,
        true: Tensor,
        *,
        labels: int,
        penalty: float = PENALTY,
        iterations: int = ITERATIONS,
        advance: Callable[[int], object] = lambda _: None,
    ) -> Self:
        """Fit it to rows by L-BFGS.

        Args:
            features: [rows, n].
            true: as `classes_of` gives it.
            advance: called with the number of rows after each pass over them.
        """
        centre, scale = (
            features.mean(dim=0),
            features.std(dim=0, unbiased=len(features) > 1).clamp_min(1e-6),
        )
        weight = torch.zeros(features.shape[1], labels, requires_grad=True)
        bias = torch.zeros(labels, requires_grad=True)
        optimizer = torch.optim.LBFGS(
            [weight, bias], max_iter=iterations, line_search_fn="strong_wolfe"
        )
        inputs = (features - centre) / scale

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = (
                objective.loss(inputs @ weight + bias, true) / len(inputs)
                + penalty * weight.square().sum()
            )
            loss.backward()
            advance(len(inputs))
            return loss

        optimizer.step(closure)
        return cls(centre, scale, weight.detach(), bias.detach())

    def logits(self, features: Tensor) -> Tensor:
        """[rows, n] -> [rows, labels]."""
        return ((features - self.centre) / self.scale) @ self.weight + self.bias


@torch.no_grad()
def _pooled(
    backbone: Backbone, cache: TrunkCache, advance: Callable[[int], object]
) -> dict[Pooling, Tensor]:
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
        advance(len(chosen))
    return features
