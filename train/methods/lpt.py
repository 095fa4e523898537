"""LPT: a late prompt, generated from the state of the text's first token at a middle layer.

Source: Liu et al., "Late Prompt Tuning: A Late Prompt Could Be Better Than Many Prompts", Findings
of EMNLP 2022, the variant with a prompt generator: n -> 256, ReLU, 256 -> t * n, dropout.
"""

import torch
from torch import Tensor
from torch.nn import functional

from adapters.backbone.model import Trunk
from adapters.format.spec import FirstTokenPrompt
from adapters.packed.packing import PackedBatch
from train.methods.method import AdapterMethod, Design, first_tokens

WIDTH = 256


class Lpt(AdapterMethod):
    """`generator.down.weight`: [n, 256]; `generator.up.weight`: [256, t * n]; both have a bias."""

    learning_rate = 1e-3
    # The preset's, as for ID-SPAM: the generators have the same size.
    weight_decay = None

    def prompt_of(self, design: Design) -> FirstTokenPrompt:
        return FirstTokenPrompt(
            length=design.prompt_length, layer=design.insertion_layer, bottleneck=WIDTH
        )

    def prompts(self, trunk: Trunk, batch: PackedBatch) -> Tensor:
        tensors = self.tensors
        states = first_tokens(trunk.hidden, batch).float()
        down, up = tensors["generator.down.weight"], tensors["generator.up.weight"]
        states = torch.relu(torch.addmm(tensors["generator.down.bias"], states, down))
        prompts = torch.addmm(tensors["generator.up.bias"], states, up)
        prompts = functional.dropout(prompts, self.design.dropout, self.training)
        return prompts.view(len(batch.rows) * self.design.prompt_length, -1)
