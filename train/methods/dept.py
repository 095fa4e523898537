"""DePT: a short prompt, and a low-rank table added to the word embeddings by position.

Source: Shi and Lipani, "DePT: Decomposed Prompt Tuning for Parameter-Efficient Fine-tuning", ICLR
2024: 40 vectors, and (alpha / sqrt(r)) A B with A [256, r], B [r, n] from zero, r = 45, alpha = 8.
The prompt has its own learning rate, far above the table's.
"""

import torch
from torch import Tensor, nn

from adapters.backbone.model import Trunk
from adapters.packed.packing import PackedBatch, RowShape
from train.methods.method import PromptBaseline
from train.methods.prompt_tuning import token_embeddings

LENGTH, RANK, ALPHA, MOST_TOKENS = 40, 45, 8, 256


class Dept(PromptBaseline):
    """`prompt`: [40, n]; `table_a`: [256, r]; `table_b`: [r, width of the word embeddings]."""

    learning_rate = 2e-2

    def add_parameters(self) -> None:
        super().add_parameters()
        self.prompt = nn.Parameter(token_embeddings(self.backbone, LENGTH, self.random))
        self.table_a = nn.Parameter(torch.empty(MOST_TOKENS, RANK))
        nn.init.kaiming_uniform_(self.table_a, a=5**0.5, generator=self.random)
        # ELECTRA's word embeddings are narrower than its states.
        width = self.backbone.word_embeddings.embedding_dim
        self.table_b = nn.Parameter(torch.zeros(RANK, width))

    @property
    def shape(self) -> RowShape:
        return RowShape(LENGTH, pooling=self.design.pooling)

    def rate_factor(self, name: str) -> float:
        return 0.1 if name.startswith("table") else 1.0

    def states(self, batch: PackedBatch, trunk: Trunk) -> Tensor:
        table = (ALPHA / RANK**0.5) * self.table_a @ self.table_b
        added: Tensor = table[batch.offsets.clamp_max(MOST_TOKENS - 1)]

        def add(_: nn.Module, __: object, words: Tensor) -> Tensor:
            return words + added.to(words.dtype)

        hook = self.backbone.word_embeddings.register_forward_hook(add)
        try:
            embedded = self.backbone.embed(batch.input_ids, batch.token_type_ids, batch.offsets)
        finally:
            hook.remove()
        return super().states(batch, Trunk(0, embedded, embedded))

    def prompts(self, trunk: Trunk, batch: PackedBatch) -> Tensor:
        return self.prompt.repeat(len(batch.rows), 1)
