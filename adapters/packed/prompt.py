"""The ID-SPAM equation, for training and for serving on a CPU.

Source: Muppidi, Nandy, Bandyopadhyay, "Leveraging Self-Attention for Input-Dependent Soft Prompting
in LLMs", ACL 2025 (arXiv 2506.05629). For a text with E in R^(S x n):

    A      = mean over tokens of softmax((E Wq)(E Wk)^T / sqrt(d_k)) (E Wv)            [n]
    prompt = act(relu(A W_down + b_down) W_up + b_up), reshaped to (t, n)              [t, n]

The mean of the softmax's rows is a probability distribution w over the text's tokens, so
A = (w^T E) Wv. Wv therefore multiplies one vector for each text, and w says which tokens the prompt
was made from. Texts have no padding here, so no mask is needed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional

from adapters.format.spec import AttentionPrompt, FinalActivation
from adapters.packed.layout import Layout
from adapters.packed.packing import Generation


@dataclass(frozen=True, slots=True)
class GeneratorWeights:
    """The tensors of one prompt generator, as in a file or folded for serving.

    query, key: [n, d_k], both None if tokens are pooled by their mean; once folded, query is [n, n]
    and key None. value: [n, n], None once folded into down. down: [n, c]. up: [c, t * n].
    """

    query: Tensor | None
    key: Tensor | None
    value: Tensor | None
    down: Tensor
    down_bias: Tensor
    up: Tensor
    up_bias: Tensor
    scale: float
    final_activation: FinalActivation
    prompt_length: int

    @classmethod
    def of(cls, prompt: AttentionPrompt, tensors: dict[str, Tensor]) -> Self:
        """Of an adapter's tensors, named as in `AttentionPrompt.shapes`."""
        return cls(
            query=tensors.get("generator.query"),
            key=tensors.get("generator.key"),
            value=tensors["generator.value"],
            down=tensors["generator.down.weight"],
            down_bias=tensors["generator.down.bias"],
            up=tensors["generator.up.weight"],
            up_bias=tensors["generator.up.bias"],
            scale=prompt.attention_size**-0.5,
            final_activation=prompt.final_activation,
            prompt_length=prompt.length,
        )

    def folded(self) -> Self:
        """The same function up to rounding: scaled Wq Wk^T as one matrix, Wv inside W_down."""
        assert self.value is not None
        query = None
        if self.query is not None and self.key is not None:
            query = self.query @ self.key.T * self.scale
        down = self.value @ self.down
        return replace(self, query=query, key=None, value=None, down=down, scale=1.0)

    def cast(self, dtype: torch.dtype) -> Self:
        """Cast the weights that multiply every token; the others multiply one vector a text."""
        query, key = (None if each is None else each.to(dtype) for each in (self.query, self.key))
        return replace(self, query=query, key=key)


def project(tokens: Tensor, weights: GeneratorWeights) -> tuple[Tensor, Tensor]:
    """Queries and keys of every token, each [T, d].

    Zeros if tokens are pooled by their mean: every token then gets the same weight.
    """
    if weights.query is None:
        zeros = tokens.new_zeros(len(tokens), 1)
        return zeros, zeros
    queries = tokens @ weights.query.to(tokens.dtype)
    if weights.scale != 1.0:  # folded weights contain it
        queries = queries * weights.scale
    keys = tokens if weights.key is None else tokens @ weights.key.to(tokens.dtype)
    return queries, keys


def token_weights(queries: Tensor, keys: Tensor, layout: Layout) -> Tensor:
    """w of every text: the mean of the softmax's rows, float32 [T]. It sums to one over a text."""
    if queries.is_cuda:
        return _padded_token_weights(queries, keys, layout)
    pieces = []
    for run_queries, run_keys in zip(layout.by_run(queries), layout.by_run(keys), strict=True):
        scores = torch.bmm(run_queries, run_keys.transpose(1, 2))
        pieces.append(scores.float().softmax(dim=-1).mean(dim=1).flatten())
    return torch.cat(pieces)


def _padded_token_weights(queries: Tensor, keys: Tensor, layout: Layout) -> Tensor:
    """The same over padded rows. A GPU pays for every run of equal lengths, a CPU for padding."""
    grid = layout.grid
    scores = torch.bmm(grid.pad(queries), grid.pad(keys).transpose(1, 2)).float()
    shares = scores.masked_fill(~grid.real.unsqueeze(1), -torch.inf).softmax(dim=-1)
    means = (shares * grid.real.unsqueeze(2)).sum(dim=1) / grid.lengths.unsqueeze(1)
    return grid.unpad(means)


def weighted_sums(tokens: Tensor, weights: Tensor, layout: Layout) -> Tensor:
    """w^T E of every text: float32 [rows, n]."""
    if tokens.is_cuda:
        grid = layout.grid
        shares = weights.new_zeros(grid.real.numel()).index_copy(0, grid.cells, weights)
        return torch.bmm(shares.view(len(grid.real), 1, -1), grid.pad(tokens).float()).squeeze(1)
    pieces = [
        torch.bmm(shares.unsqueeze(1), values.float()).squeeze(1)
        for shares, values in zip(layout.by_run(weights), layout.by_run(tokens), strict=True)
    ]
    return torch.cat(pieces)


def soft_prompt(pooled: Tensor, weights: GeneratorWeights) -> Tensor:
    """Pooled vectors to prompts: [rows, n] -> [rows * t, n], float32."""
    values = pooled if weights.value is None else pooled @ weights.value
    bottleneck = torch.relu(torch.addmm(weights.down_bias, values, weights.down))
    prompt = torch.addmm(weights.up_bias, bottleneck, weights.up)
    match weights.final_activation:
        case FinalActivation.RELU:
            prompt = torch.relu(prompt)
        case FinalActivation.TANH:
            prompt = torch.tanh(prompt)
        case FinalActivation.NONE:
            pass
    return prompt.view(len(pooled) * weights.prompt_length, -1)


def generate(
    source: Tensor, generation: Generation, generators: Mapping[int, GeneratorWeights]
) -> tuple[Tensor, Tensor]:
    """Prompts of all rows that insert together, whichever adapters they have.

    Args:
        source: [T', n], the states that the generators attend over.
        generators: by the batch's adapter index.

    Returns:
        Prompts [sum of t, n] in the rows' order, in `source`'s dtype; token weights, float32 [T].
    """
    tokens = source if generation.tokens is None else source.index_select(0, generation.tokens)
    members = [generators[group.adapter] for group in generation.groups]
    queries, keys = _projected(tokens, generation, members)
    w = token_weights(queries, keys, generation.layout)
    pooled = weighted_sums(tokens, w, generation.layout)
    return _prompts(pooled, generation, members).to(source.dtype), w


def _projected(
    tokens: Tensor, generation: Generation, members: Sequence[GeneratorWeights]
) -> tuple[Tensor, Tensor]:
    """Queries and keys of all groups' tokens, in the rows' order."""
    grouping = generation.grouping
    if grouping is None:
        return project(tokens, members[0])
    parts = tokens[grouping.tokens].split([group.tokens for group in generation.groups])
    projected = [project(*pair) for pair in zip(parts, members, strict=True)]
    if all(member.key is None for member in members):  # folded: the tokens themselves are the keys
        queries = _concat([queries for queries, _ in projected], tokens.shape[1])
        return queries[grouping.tokens_back], tokens
    width = max(states.shape[1] for pair in projected for states in pair)
    queries, keys = (_concat(parts, width) for parts in zip(*projected, strict=True))
    return queries[grouping.tokens_back], keys[grouping.tokens_back]


def _prompts(pooled: Tensor, generation: Generation, members: Sequence[GeneratorWeights]) -> Tensor:
    """Prompts of all groups' pooled vectors, in the rows' order."""
    grouping = generation.grouping
    if grouping is None:
        return soft_prompt(pooled, members[0])
    parts = pooled[grouping.rows].split([group.rows for group in generation.groups])
    prompts = [soft_prompt(*pair) for pair in zip(parts, members, strict=True)]
    return torch.cat(prompts)[grouping.prompts_back]


def _concat(parts: Sequence[Tensor], width: int) -> Tensor:
    """[T, width]: columns that an adapter lacks are zero and add nothing to a score."""
    return torch.cat([functional.pad(part, (0, width - part.shape[1])) for part in parts])
