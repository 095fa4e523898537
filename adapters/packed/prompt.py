"""The ID-SPAM equation, once: training and serving both call these functions.

Knows no backbone and no file.

Source: Muppidi, Nandy, Bandyopadhyay, "Leveraging Self-Attention for Input-Dependent Soft Prompting
in LLMs", ACL 2025 (arXiv 2506.05629). For a text with E in R^(S x n):

    A      = mean over tokens of softmax((E Wq)(E Wk)^T / sqrt(d_k)) (E Wv)            [n]
    prompt = act(relu(A W_down + b_down) W_up + b_up), reshaped to (t, n)              [t, n]

The mean of the softmax's rows is a probability w over the text's tokens, so A = (w^T E) Wv: Wv
multiplies one vector a text, and w says which tokens the prompt was made from. A text has no
padding here, so nothing needs a mask.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional

from adapters.format.spec import AdapterSpec, FinalActivation
from adapters.packed.layout import Layout
from adapters.packed.packing import Generation


@dataclass(frozen=True, slots=True)
class GeneratorWeights:
    """The tensors of one prompt generator, as a file holds them or folded for serving.

    query, key: [n, d_k], both None when tokens are pooled by their mean. Folded: query is [n, n],
    key None. value: [n, n], None when folded into down. down: [n, c]; up: [c, t * n].
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
    def of(cls, spec: AdapterSpec, tensors: dict[str, Tensor]) -> Self:
        """Pick a generator's tensors out of an adapter's, by the names of `AdapterSpec.shapes`."""
        return cls(
            query=tensors.get("generator.query"),
            key=tensors.get("generator.key"),
            value=tensors["generator.value"],
            down=tensors["generator.down.weight"],
            down_bias=tensors["generator.down.bias"],
            up=tensors["generator.up.weight"],
            up_bias=tensors["generator.up.bias"],
            scale=spec.attention_size**-0.5,
            final_activation=spec.final_activation,
            prompt_length=spec.prompt_length,
        )

    def folded(self) -> Self:
        """The same function up to rounding: Wq Wk^T, scaled, as one matrix; Wv inside W_down."""
        assert self.value is not None
        query = None
        if self.query is not None and self.key is not None:
            query = self.query @ self.key.T * self.scale
        down = self.value @ self.down
        return replace(self, query=query, key=None, value=None, down=down, scale=1.0)

    def cast(self, dtype: torch.dtype) -> Self:
        """The per-token products in `dtype`; what works on one vector a text stays as it is."""
        query, key = (None if item is None else item.to(dtype) for item in (self.query, self.key))
        return replace(self, query=query, key=key)


def project(tokens: Tensor, weights: GeneratorWeights) -> tuple[Tensor, Tensor]:
    """Queries and keys of every token, each [T, d].

    Weights that pool by the mean score every token alike: zeros.
    """
    if weights.query is None:
        nothing = tokens.new_zeros(len(tokens), 1)
        return nothing, nothing
    queries = tokens @ weights.query.to(tokens.dtype)
    if weights.scale != 1.0:  # folded weights hold it
        queries = queries * weights.scale
    keys = tokens if weights.key is None else tokens @ weights.key.to(tokens.dtype)
    return queries, keys


def token_weights(queries: Tensor, keys: Tensor, layout: Layout) -> Tensor:
    """w of every text: the mean of the softmax's rows, float32 [T]; a text's sum to one."""
    if queries.is_cuda:
        return _token_weights_at_once(queries, keys, layout)
    pieces = []
    for some, others in zip(layout.by_run(queries), layout.by_run(keys), strict=True):
        scores = torch.bmm(some, others.transpose(1, 2))
        pieces.append(scores.float().softmax(dim=-1).mean(dim=1).flatten())
    return torch.cat(pieces)


def _token_weights_at_once(queries: Tensor, keys: Tensor, layout: Layout) -> Tensor:
    """The same over padded rows: a GPU pays for every run of equal lengths, a CPU for padding."""
    grid = layout.grid
    scores = torch.bmm(grid.of(queries), grid.of(keys).transpose(1, 2)).float()
    shares = scores.masked_fill(~grid.real.unsqueeze(1), -torch.inf).softmax(dim=-1)
    means = (shares * grid.real.unsqueeze(2)).sum(dim=1) / grid.lengths.unsqueeze(1)
    return grid.back(means)


def weighted_sums(tokens: Tensor, weights: Tensor, layout: Layout) -> Tensor:
    """w^T E of every text: float32 [rows, n]."""
    if tokens.is_cuda:
        grid = layout.grid
        shares = weights.new_zeros(grid.real.numel()).index_copy(0, grid.places, weights)
        return torch.bmm(shares.view(len(grid.real), 1, -1), grid.of(tokens).float()).squeeze(1)
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
    """Prompts of all rows that insert together, whatever their adapters.

    Args:
        source: [T', n] what the generators attend over.
        generators: by the batch's adapter index.

    Returns:
        prompts [sum of t, n] in the rows' order, of `source`'s dtype; token weights w, float32 [T].
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
    way = generation.by_adapter
    if way is None:
        return project(tokens, members[0])
    parts = tokens[way.tokens].split([group.tokens for group in generation.groups])
    projected = [project(*pair) for pair in zip(parts, members, strict=True)]
    if all(member.key is None for member in members):  # folded: the tokens themselves are the keys
        queries = _joined([some for some, _ in projected], tokens.shape[1])
        return queries[way.tokens_back], tokens
    width = max(states.shape[1] for pair in projected for states in pair)
    queries, keys = (_joined(some, width) for some in zip(*projected, strict=True))
    return queries[way.tokens_back], keys[way.tokens_back]


def _prompts(pooled: Tensor, generation: Generation, members: Sequence[GeneratorWeights]) -> Tensor:
    """Prompts of all groups' pooled vectors, in the rows' order."""
    way = generation.by_adapter
    if way is None:
        return soft_prompt(pooled, members[0])
    parts = pooled[way.rows].split([group.rows for group in generation.groups])
    prompts = [soft_prompt(*pair) for pair in zip(parts, members, strict=True)]
    return torch.cat(prompts)[way.slots_back]


def _joined(parts: Sequence[Tensor], width: int) -> Tensor:
    """One behind the other, [T, width]: columns that an adapter lacks are zero, scoring nothing."""
    return torch.cat([functional.pad(part, (0, width - part.shape[1])) for part in parts])
