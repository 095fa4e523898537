"""How long, how fast and towards what a method is trained, nothing left open."""

from dataclasses import dataclass, fields

from adapters.backbone.model import Backbone
from adapters.format.spec import (
    AdapterSpec,
    FinalActivation,
    GeneratorInput,
    GeneratorPooling,
    HeadKind,
    Pooling,
)
from train.report.metrics import Metric

# --- merged from train.recipe


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


# --- merged from train.methods.design


@dataclass(frozen=True, slots=True)
class Design:
    """How a method is built, nothing left open. Fields are those of `AdapterSpec`, and the dropout.

    Baselines take from it what they have: prompt length, layer, pooling and head.
    """

    prompt_length: int
    bottleneck: int
    attention_size: int
    insertion_layer: int
    generator_input: GeneratorInput
    generator_pooling: GeneratorPooling
    final_activation: FinalActivation
    pooling: Pooling
    head: HeadKind
    max_length: int
    dropout: float

    def spec(self, backbone: Backbone, labels: tuple[str, ...]) -> AdapterSpec:
        """The spec of an adapter of this backbone for these labels."""
        switches = {
            item.name: getattr(self, item.name) for item in fields(self) if item.name != "dropout"
        }
        return AdapterSpec(
            backbone=backbone.identity,
            tokenizer_sha256=backbone.encoder.sha256,
            hidden_size=backbone.hidden_size,
            labels=labels,
            **switches,
        )
