"""ID-SPAM: the method that this project serves, alone or with vectors in the layers.

Its equation is in `adapters.packed.prompt`, which serving runs too. Source: Muppidi, Nandy,
Bandyopadhyay, ACL 2025 (arXiv 2506.05629); `--preset paper` sets the adapter spec's switches as in
the paper.
"""

from typing import ClassVar

from torch import Tensor

from adapters.backbone.model import Trunk
from adapters.format.spec import AttentionPrompt, GeneratorInput, Tuning
from adapters.packed.packing import PackedBatch
from adapters.packed.prompt import GeneratorWeights, generate
from train.methods.method import AdapterMethod, Design
from train.methods.vectors import (
    HEAD_RATE,
    MANY_LABELS_VECTORS_RATE,
    VECTORS_RATE,
    vector_tuning,
)


class Idspam(AdapterMethod):
    """The prompt alone, before the frozen upper layers."""

    learning_rate: ClassVar[float | None] = None
    weight_decay = None

    def prompt_of(self, design: Design) -> AttentionPrompt:
        return AttentionPrompt(
            length=design.prompt_length,
            layer=design.insertion_layer,
            source=design.generator_input,
            pooling=design.generator_pooling,
            bottleneck=design.bottleneck,
            attention_size=design.attention_size,
            final_activation=design.final_activation,
        )

    def prompts(self, trunk: Trunk, batch: PackedBatch) -> Tensor:
        prompt = self.prompt_of(self.design)
        embeddings = prompt.source is GeneratorInput.EMBEDDINGS
        source = trunk.embeddings if embeddings else trunk.hidden
        assert source is not None, "a trunk for prompts from embeddings holds them"
        weights = {0: GeneratorWeights.of(prompt, {**self.tensors})}
        return generate(source, batch.insertions[0].generations[0], weights)[0]


GENERATOR_RATE = 3e-4


class IdspamVectors(Idspam):
    """The prompt, and vectors that scale and shift what the layers compute."""

    # The generator's. It memorises data at the rate that suits a head, once vectors help it.
    learning_rate = GENERATOR_RATE
    tuning_rate = VECTORS_RATE
    many_labels_rates = (1e-3, MANY_LABELS_VECTORS_RATE)

    def rate_factor(self, name: str) -> float:
        return HEAD_RATE / GENERATOR_RATE if name.startswith("head.") else 1.0

    def tuning_of(self, design: Design) -> Tuning:
        return vector_tuning(design, self.backbone)
