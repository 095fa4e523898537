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

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from adapters.packing import Generation, Group, Layout
from adapters.spec import AdapterSpec, FinalActivation


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
        """The same function up to rounding: Wq Wk^T as one matrix, Wv inside W_down."""
        assert self.value is not None
        query = None
        if self.query is not None and self.key is not None:
            query = self.query @ self.key.T
        return replace(self, query=query, key=None, value=None, down=self.value @ self.down)

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
    queries = tokens @ weights.query.to(tokens.dtype) * weights.scale
    keys = tokens if weights.key is None else tokens @ weights.key.to(tokens.dtype)
    return queries, keys


def token_weights(queries: Tensor, keys: Tensor, layout: Layout) -> Tensor:
    """w of every text: the mean of the softmax's rows, float32 [T]; a text's sum to one."""
    pieces = []
    for some, others in zip(layout.by_run(queries), layout.by_run(keys), strict=True):
        scores = torch.bmm(some, others.transpose(1, 2))
        pieces.append(scores.float().softmax(dim=-1).mean(dim=1).flatten())
    return torch.cat(pieces)


def weighted_sums(tokens: Tensor, weights: Tensor, layout: Layout) -> Tensor:
    """w^T E of every text: float32 [rows, n]."""
    pieces = [
        torch.bmm(shares.unsqueeze(1), values.float()).squeeze(1)
        for shares, values in zip(layout.by_run(weights), layout.by_run(tokens), strict=True)
    ]
    return torch.cat(pieces)


def soft_prompt(pooled: Tensor, weights: GeneratorWeights) -> Tensor:
    """Pooled vectors to prompts: [rows, n] -> [rows * t, n], float32."""
    values = pooled if weights.value is None else pooled @ weights.value
    bottleneck = torch.relu(values @ weights.down + weights.down_bias)
    prompt = bottleneck @ weights.up + weights.up_bias
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
    tokens = _of(source, generation.tokens)
    projected = [
        (group, project(_of(tokens, group.tokens), generators[group.adapter]))
        for group in generation.groups
    ]
    w = token_weights(*_together(projected, tokens), generation.layout)
    pooled = weighted_sums(tokens, w, generation.layout)
    prompts = pooled.new_empty(generation.slots, pooled.shape[1])
    for group in generation.groups:
        prompt = soft_prompt(_of(pooled, group.rows), generators[group.adapter])
        if group.slots is None:
            prompts = prompt
        else:
            prompts[group.slots] = prompt
    return prompts.to(source.dtype), w


def _together(
    projected: list[tuple[Group, tuple[Tensor, Tensor]]], tokens: Tensor
) -> tuple[Tensor, Tensor]:
    """All groups' queries and keys in the tokens' order, as wide as the widest."""
    if len(projected) == 1:
        return projected[0][1]
    width = max(queries.shape[1] for _, (queries, _) in projected)
    queries, keys = (tokens.new_zeros(len(tokens), width) for _ in range(2))
    for group, (some_queries, some_keys) in projected:
        # Columns that an adapter does not use stay zero and add nothing to its scores.
        queries[group.tokens, : some_queries.shape[1]] = some_queries
        keys[group.tokens, : some_keys.shape[1]] = some_keys
    return queries, keys


def _of(tensor: Tensor, chosen: Tensor | None) -> Tensor:
    return tensor if chosen is None else tensor.index_select(0, chosen)
