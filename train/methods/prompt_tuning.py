"""Prompt Tuning: t free vectors before the embeddings.

Source: Lester, Al-Rfou, Constant, "The Power of Scale for Parameter-Efficient Prompt Tuning", EMNLP
2021. They start as the embeddings of randomly drawn tokens. The head reads [BOS], at index t;
PEFT's version reads index 0, which is a prompt vector.
"""

import torch
from torch import Tensor, nn

from adapters.backbone.model import Backbone, Trunk
from adapters.packed.packing import PackedBatch, RowShape
from train.methods.method import PromptBaseline


class PromptTuning(PromptBaseline):
    """`prompt`: [t, n]."""

    learning_rate = 2e-2

    def add_parameters(self) -> None:
        super().add_parameters()
        self.prompt = nn.Parameter(
            token_embeddings(self.backbone, self.design.prompt_length, self.random)
        )

    @property
    def shape(self) -> RowShape:
        return RowShape(self.design.prompt_length, pooling=self.design.pooling)

    def prompts(self, trunk: Trunk, batch: PackedBatch) -> Tensor:
        return self.prompt.repeat(len(batch.rows), 1)


def token_embeddings(backbone: Backbone, count: int, random: torch.Generator) -> Tensor:
    """The embedding layer's output for tokens drawn at random, float32 [count, n]."""
    ids = torch.randint(len(backbone.word_embeddings.weight), (count,), generator=random).to(
        backbone.device
    )
    zeros = torch.zeros_like(ids)
    with torch.no_grad():
        return backbone.embed(ids, zeros, zeros).float()
