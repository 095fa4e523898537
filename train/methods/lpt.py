"""LPT: a late prompt, generated from the state of the text's first token at a middle layer.

Source: Liu et al., "Late Prompt Tuning: A Late Prompt Could Be Better Than Many Prompts", Findings
of EMNLP 2022, the variant with a prompt generator: n -> 256, ReLU, 256 -> t * n, dropout.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from adapters.backbone.model import Trunk
from adapters.packed.packing import PackedBatch, RowShape
from train.methods.method import PromptBaseline, first_tokens

WIDTH = 256


class Lpt(PromptBaseline):
    """`down`: [n, 256]; `up`: [256, t * n]; both have a bias."""

    learning_rate = 1e-3
    # The preset's, as for ID-SPAM: the generators have the same size.
    weight_decay = None

    def add_parameters(self) -> None:
        super().add_parameters()
        n, t = self.backbone.hidden_size, self.design.prompt_length
        self.down = self.normal((n, WIDTH), fan_in=n)
        self.down_bias = nn.Parameter(torch.zeros(WIDTH))
        self.up = self.normal((WIDTH, t * n), fan_in=WIDTH)
        self.up_bias = nn.Parameter(torch.zeros(t * n))

    @property
    def shape(self) -> RowShape:
        design = self.design
        return RowShape(design.prompt_length, design.insertion_layer, pooling=design.pooling)

    def prompts(self, trunk: Trunk, batch: PackedBatch) -> Tensor:
        states = first_tokens(trunk.hidden, batch).float()
        states = torch.relu(torch.addmm(self.down_bias, states, self.down))
        prompts = torch.addmm(self.up_bias, states, self.up)
        prompts = functional.dropout(prompts, self.design.dropout, self.training)
        return prompts.view(len(batch.rows) * self.design.prompt_length, -1)
