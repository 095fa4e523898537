"""How long, how fast and towards what a method is trained, nothing left open."""

from dataclasses import dataclass

from train.metrics import Metric


@dataclass(frozen=True, slots=True)
class Recipe:
    """What the loop needs of the settings, nothing left open.

    batch_size: texts a step. micro_batch: texts whose gradients are computed at once. metric: what
    the best epoch is best in.
    """

    epochs: int
    batch_size: int
    micro_batch: int
    learning_rate: float
    warmup_ratio: float
    weight_decay: float
    patience: int
    seed: int
    metric: Metric
