"""DePT: a short prompt, and a low-rank table added to the word embeddings by position.

Source: Shi and Lipani, "DePT: Decomposed Prompt Tuning for Parameter-Efficient Fine-tuning", ICLR
2024: 40 vectors, and (alpha / sqrt(r)) A B with A [256, r], B [r, n] from zero, r = 45, alpha = 8.
The prompt has its own learning rate, far above the table's. The factor alpha / sqrt(r) is part of A
here, in its start and in its learning rate: with Adam's steps that is the same training.
"""

import torch
from torch import Tensor, nn

from adapters.backbone.model import Trunk
from adapters.format.spec import EmbeddingTable, StaticPrompt
from adapters.packed.packing import PackedBatch
from train.methods.method import AdapterMethod, Design
from train.methods.prompt_tuning import token_embeddings

LENGTH, RANK, ALPHA, MOST_TOKENS = 40, 45, 8, 256
_FACTOR: float = ALPHA / RANK**0.5


class Dept(AdapterMethod):
    """`prompt.vectors`: [40, n]; `prompt.table.a`: [256, r]; `prompt.table.b`: [r, width of the
    word embeddings], which are narrower than its states in ELECTRA."""

    learning_rate = 2e-2

    def prompt_of(self, design: Design) -> StaticPrompt:
        width = self.backbone.word_embeddings.embedding_dim
        table = EmbeddingTable(positions=MOST_TOKENS, rank=RANK, width=width)
        return StaticPrompt(length=LENGTH, table=table)

    def initial_value(self, name: str, shape: tuple[int, ...]) -> Tensor:
        match name:
            case "prompt.vectors":
                return token_embeddings(self.backbone, LENGTH, self.random)
            case "prompt.table.a":
                start = torch.empty(shape)
                nn.init.kaiming_uniform_(start, a=5**0.5, generator=self.random)
                return start * _FACTOR
            case "prompt.table.b":
                return torch.zeros(shape)
        return super().initial_value(name, shape)

    def rate_factor(self, name: str) -> float:
        return {"prompt.table.a": 0.1 * _FACTOR, "prompt.table.b": 0.1}.get(name, 1.0)

    def states(self, batch: PackedBatch, trunk: Trunk) -> Tensor:
        table = self.tensors["prompt.table.a"] @ self.tensors["prompt.table.b"]
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
        return self.tensors["prompt.vectors"].repeat(len(batch.rows), 1)
