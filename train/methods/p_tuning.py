"""P-Tuning: a small network turns t free vectors into a prompt before the embeddings.

Source: Liu et al., "GPT Understands, Too", AI Open 2023, with PEFT's MLP encoder: two hidden
layers as wide as the backbone, each followed by ReLU.
"""

import torch
from torch import Tensor, nn

from adapters.backbone.model import Trunk
from adapters.packed.packing import PackedBatch, RowShape
from train.methods.method import PromptBaseline


class PTuning(PromptBaseline):
    """`free`: [t, n]; `weights`, `biases`: three layers n -> n."""

    learning_rate = 1e-3

    def add_parameters(self) -> None:
        super().add_parameters()
        n = self.backbone.hidden_size
        self.free = self.normal((self.design.prompt_length, n), fan_in=1)
        self.weights = nn.ParameterList([self.normal((n, n), fan_in=n) for _ in range(3)])
        self.biases = nn.ParameterList([nn.Parameter(torch.zeros(n)) for _ in range(3)])

    @property
    def shape(self) -> RowShape:
        return RowShape(self.design.prompt_length, pooling=self.design.pooling)

    def prompts(self, trunk: Trunk, batch: PackedBatch) -> Tensor:
        states: Tensor = self.free
        for index, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            states = torch.addmm(bias, states if index == 0 else torch.relu(states), weight)
        return states.repeat(len(batch.rows), 1)
