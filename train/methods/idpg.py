"""IDPG: prompts for every layer, generated from the text's [BOS] vector after a frozen pass.

Source: Wu et al., "IDPG: An Instance-Dependent Prompt Generation Method", NAACL 2022, the variant
M-IDPG-DNN: dropout, n -> 16, GELU, dropout, 16 -> 5 n. Layers share the matrices; each has its
own bias. The paper's prompts come after [BOS] and ours before it. This computes the same:
between the layers of an encoder prompts have no position.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from adapters.backbone.model import Trunk
from adapters.packed.packing import PackedBatch, RowShape
from train.methods.method import Baseline, first_tokens, inserted, read

LENGTH, WIDTH = 5, 16


class Idpg(Baseline):
    """`down`: [n, 16]; `up`: [16, 5 n]; `biases`: [layers, 5 n]."""

    learning_rate = 3e-3
    not_an_adapter = "its prompts need a second pass over every text, and one for every layer"

    def add_parameters(self) -> None:
        super().add_parameters()
        n = self.backbone.hidden_size
        self.down = self.normal((n, WIDTH), fan_in=n)
        self.up = self.normal((WIDTH, LENGTH * n), fan_in=WIDTH)
        self.biases = nn.Parameter(torch.zeros(self.backbone.layers, LENGTH * n))

    @property
    def shape(self) -> RowShape:
        return RowShape(LENGTH, pooling=self.design.pooling)

    def states(self, batch: PackedBatch, trunk: Trunk) -> Tensor:
        shared = self._generate(batch, trunk)
        prompts = [(shared + bias).view(-1, self.backbone.hidden_size) for bias in self.biases]
        hidden, layout = inserted(trunk.hidden, prompts[0], batch)
        positions = _prompt_positions(batch)
        for layer in range(1, self.backbone.layers):
            hidden = self.backbone.run_layers(hidden, layer - 1, layer, layout)
            hidden = hidden.index_copy(0, positions, prompts[layer].to(hidden.dtype))
        return read(self.backbone, hidden, batch)

    def _generate(self, batch: PackedBatch, trunk: Trunk) -> Tensor:
        """The prompts before each layer's bias is added, float32 [rows, 5 n]."""
        with torch.no_grad():
            last = self.backbone.trunk(batch, self.backbone.layers, start=trunk).hidden
            states = self.backbone.final_norm(first_tokens(last, batch)).float()
        rate = self.design.dropout
        states = functional.dropout(states, rate, self.training)
        states = functional.dropout(functional.gelu(states @ self.down), rate, self.training)
        return states @ self.up


def _prompt_positions(batch: PackedBatch) -> Tensor:
    """Positions of the inserted prompts, in the order of the rows: int64 [rows * t]."""
    return torch.nonzero(batch.insertions[0].expand >= batch.layout.tokens).squeeze(1)
