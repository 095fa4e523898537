"""SMoP: several short prompts; a router chooses one for every text.

Source: Choi et al., "SMoP: Towards Efficient and Effective Prompt Tuning with Sparse
Mixture-of-Prompts", EMNLP 2023. k = 4 prompts of l = 5 vectors. The router is a linear map of the
text's mean embedding; in training its logits are multiplied by Gaussian noise. The chosen prompt is
multiplied by its probability, through which the router learns.
"""

import torch
from torch import Tensor, nn

from adapters.backbone.model import Trunk
from adapters.format.spec import RoutedPrompt
from adapters.packed.layout import row_means
from adapters.packed.packing import PackedBatch
from train.methods.method import AdapterMethod, Design
from train.methods.prompt_tuning import token_embeddings

PROMPTS, LENGTH = 4, 5
NOISE = 0.01


class Smop(AdapterMethod):
    """`generator.bank`: [k, l * n]; `generator.router`: [n, k]."""

    learning_rate = 2e-2

    def prompt_of(self, design: Design) -> RoutedPrompt:
        return RoutedPrompt(length=LENGTH, prompts=PROMPTS)

    def initial_value(self, name: str, shape: tuple[int, ...]) -> Tensor:
        if name == "generator.bank":
            return token_embeddings(self.backbone, PROMPTS * LENGTH, self.random).view(shape)
        if name == "generator.router":
            return nn.init.orthogonal_(torch.empty(shape), generator=self.random)
        return super().initial_value(name, shape)

    def prompts(self, trunk: Trunk, batch: PackedBatch) -> Tensor:
        routed = row_means(trunk.hidden, batch.layout) @ self.tensors["generator.router"]
        if self.training:
            routed = routed * (1 + NOISE * torch.randn_like(routed))
        shares, chosen = routed.softmax(dim=-1).max(dim=-1)
        prompts = self.tensors["generator.bank"][chosen] * shares[:, None]
        return prompts.view(len(batch.rows) * LENGTH, -1)
