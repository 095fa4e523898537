"""Prompt Tuning: t free vectors before the embeddings.

Source: Lester, Al-Rfou, Constant, "The Power of Scale for Parameter-Efficient Prompt Tuning", EMNLP
2021. They start as the embeddings of randomly drawn tokens. The head reads [BOS], at index t;
PEFT's version reads index 0, which is a prompt vector.
"""

import torch
from torch import Tensor

from adapters.backbone.model import Backbone, Trunk
from adapters.format.spec import StaticPrompt
from adapters.packed.packing import PackedBatch
from train.methods.method import AdapterMethod, Design


class PromptTuning(AdapterMethod):
    """`prompt.vectors`: [t, n]."""

    learning_rate = 2e-2

    def prompt_of(self, design: Design) -> StaticPrompt:
        return StaticPrompt(length=design.prompt_length)

    def initial_value(self, name: str, shape: tuple[int, ...]) -> Tensor:
        if name == "prompt.vectors":
            return token_embeddings(self.backbone, shape[0], self.random)
        return super().initial_value(name, shape)

    def prompts(self, trunk: Trunk, batch: PackedBatch) -> Tensor:
        return self.tensors["prompt.vectors"].repeat(len(batch.rows), 1)


def token_embeddings(backbone: Backbone, count: int, random: torch.Generator) -> Tensor:
    """The embedding layer's output for tokens drawn at random, float32 [count, n]."""
    ids = torch.randint(len(backbone.word_embeddings.weight), (count,), generator=random).to(
        backbone.device
    )
    zeros = torch.zeros_like(ids)
    with torch.no_grad():
        return backbone.embed(ids, zeros, zeros).float()
