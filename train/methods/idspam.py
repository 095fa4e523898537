"""ID-SPAM: the method that this project serves, alone or with vectors in the layers.

Its equation is in `adapters.packed.prompt`, which serving runs too. Source: Muppidi, Nandy,
Bandyopadhyay, ACL 2025 (arXiv 2506.05629); `--preset paper` sets the adapter spec's switches as in
the paper.
"""

from torch import Tensor

from adapters.backbone.model import Trunk
from adapters.format.spec import AttentionPrompt, GeneratorInput, Tuning
from adapters.packed.packing import PackedBatch
from adapters.packed.prompt import GeneratorWeights, generate
from train.methods.method import AdapterMethod, Design
from train.methods.vectors import VECTORS_RATE, vector_tuning


class Idspam(AdapterMethod):
    """The prompt alone, before the frozen upper layers."""

    learning_rate = None
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


class IdspamVectors(Idspam):
    """The prompt, and vectors that scale and shift what the layers compute."""

    tuning_rate = VECTORS_RATE

    def tuning_of(self, design: Design) -> Tuning:
        return vector_tuning(design, self.backbone)
