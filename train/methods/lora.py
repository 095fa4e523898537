"""LoRA: a product of two narrow matrices added to some of the layers' linear maps.

Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022; by default r = 8
on queries and values, as its authors use it on RoBERTa. A test compares function and initial values
with PEFT's.
"""

from adapters.format.spec import LoraTuning, Tuning
from train.methods.method import AdapterMethod, Design


class Lora(AdapterMethod):
    """The matrices and a head. The design's dropout is also that of the matrices' inputs."""

    learning_rate = 1e-3

    def tuning_of(self, design: Design) -> Tuning:
        return LoraTuning(
            layers=design.tuned_layers or (0, self.backbone.layers),
            intermediate_size=self.backbone.intermediate_size,
            rank=design.rank,
            scaling=design.scaling,
            sites=design.sites,
        )
