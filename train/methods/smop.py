"""SMoP: several short prompts; a router chooses one for every text.

Source: Choi et al., "SMoP: Towards Efficient and Effective Prompt Tuning with Sparse
Mixture-of-Prompts", EMNLP 2023. k = 4 prompts of l = 5 vectors. The router is a linear map of the
text's mean embedding; in training its logits are multiplied by Gaussian noise. The chosen prompt is
multiplied by its probability, through which the router learns.
"""

import torch
from torch import Tensor, nn

from adapters.backbone.model import Trunk
from adapters.packed.layout import row_means
from adapters.packed.packing import PackedBatch, RowShape
from train.methods.method import PromptBaseline
from train.methods.prompt_tuning import token_embeddings

PROMPTS, LENGTH = 4, 5
NOISE = 0.01


class Smop(PromptBaseline):
    """`bank`: [k, l, n]; `router`: [n, k]."""

    learning_rate = 2e-2

    def add_parameters(self) -> None:
        super().add_parameters()
        n = self.backbone.hidden_size
        bank = token_embeddings(self.backbone, PROMPTS * LENGTH, self.random)
        self.bank = nn.Parameter(bank.view(PROMPTS, LENGTH, n))
        self.router = nn.Parameter(torch.empty(n, PROMPTS))
        nn.init.orthogonal_(self.router, generator=self.random)

    @property
    def shape(self) -> RowShape:
        return RowShape(LENGTH, pooling=self.design.pooling)

    def prompts(self, trunk: Trunk, batch: PackedBatch) -> Tensor:
        routed = row_means(trunk.hidden, batch.layout) @ self.router
        if self.training:
            routed = routed * (1 + NOISE * torch.randn_like(routed))
        shares, chosen = routed.softmax(dim=-1).max(dim=-1)
        prompts = self.bank[chosen] * shares[:, None, None]
        return prompts.flatten(0, 1)
