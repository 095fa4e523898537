"""How a prompt is made, for training and for serving on a CPU: the ID-SPAM equation.

Source: Muppidi, Nandy, Bandyopadhyay, "Leveraging Self-Attention for Input-Dependent Soft Prompting
in LLMs", ACL 2025 (arXiv 2506.05629). For a text with E in R^(S x n):

    A      = mean over tokens of softmax((E Wq)(E Wk)^T / sqrt(d_k)) (E Wv)            [n]
    prompt = act(relu(A W_down + b_down) W_up + b_up), reshaped to (t, n)              [t, n]

The mean of the softmax's rows is a probability distribution w over the text's tokens, so
A = (w^T E) Wv. Wv therefore multiplies one vector for each text, and w says which tokens the prompt
was made from. Texts have no padding here, so no mask is needed.

The other prompts are this equation with parts left out:

    first-token (LPT):  A is the state of the first token, without Wv
    routed (SMoP):      A is the mean of the embeddings; instead of relu, of softmax(A W_down) only
                        the largest share is kept, and W_up holds the prompts
    static:             b_up alone
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional

from adapters.format.spec import (
    AttentionPrompt,
    FinalActivation,
    Prompt,
    RoutedPrompt,
    StaticPrompt,
)
from adapters.packed.layout import Layout
from adapters.packed.packing import Generation, PackedBatch, PromptSource


@dataclass(frozen=True, slots=True)
class GeneratorWeights:
    """The tensors of one prompt, as in a file or folded for serving; None where it lacks a part.

    query, key: [n, d_k], both None unless it attends; once folded, query is [n, n] and key None.
    value: [n, n], None once folded into down. down: [n, c]. up: [c, t * n]. up_bias: [t * n].
    routes: only the largest share of c passes on. table: float32 [positions, width], added to the
    word embeddings; the last row belongs to all later positions too.
    """

    query: Tensor | None
    key: Tensor | None
    value: Tensor | None
    down: Tensor | None
    down_bias: Tensor | None
    up: Tensor | None
    up_bias: Tensor | None
    scale: float
    final_activation: FinalActivation
    prompt_length: int
    routes: bool = False
    table: Tensor | None = None

    @classmethod
    def of(
        cls, prompt: Prompt, tensors: dict[str, Tensor], *, positions: int | None = None
    ) -> Self:
        """Of an adapter's tensors, named as in the prompt's `shapes`.

        Args:
            positions: the most tokens of a text: a table needs no more rows.
        """
        scale, activation = 1.0, FinalActivation.NONE
        if isinstance(prompt, AttentionPrompt):
            scale, activation = prompt.attention_size**-0.5, prompt.final_activation
        up_bias, table = tensors.get("generator.up.bias"), None
        if isinstance(prompt, StaticPrompt):
            up_bias = tensors["prompt.vectors"].flatten()
            if prompt.table is not None:
                rows = tensors["prompt.table.a"][:positions]
                table = rows.float() @ tensors["prompt.table.b"].float()
        routes = isinstance(prompt, RoutedPrompt)
        return cls(
            query=tensors.get("generator.query"),
            key=tensors.get("generator.key"),
            value=tensors.get("generator.value"),
            down=tensors.get("generator.router" if routes else "generator.down.weight"),
            down_bias=tensors.get("generator.down.bias"),
            up=tensors.get("generator.bank" if routes else "generator.up.weight"),
            up_bias=up_bias,
            scale=scale,
            final_activation=activation,
            prompt_length=prompt.length,
            routes=routes,
            table=table,
        )

    def folded(self) -> Self:
        """The same function up to rounding: scaled Wq Wk^T as one matrix, Wv inside W_down."""
        query, down = None, self.down
        if self.query is not None and self.key is not None:
            query = self.query @ self.key.T * self.scale
        if self.value is not None and self.down is not None:
            down = self.value @ self.down
        return replace(self, query=query, key=None, value=None, down=down, scale=1.0)

    def cast(self, dtype: torch.dtype) -> Self:
        """Cast the weights that multiply every token; the others multiply one vector a text."""
        query, key = (None if each is None else each.to(dtype) for each in (self.query, self.key))
        return replace(self, query=query, key=key)

    @property
    def tensors(self) -> list[Tensor]:
        """All that it has."""
        values = (getattr(self, name) for name in self.__slots__)
        return [value for value in values if isinstance(value, Tensor)]


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
        return padded_token_weights(queries, keys, layout)
    pieces = []
    for run_queries, run_keys in zip(layout.by_run(queries), layout.by_run(keys), strict=True):
        scores = torch.bmm(run_queries, run_keys.transpose(1, 2))
        pieces.append(scores.float().softmax(dim=-1).mean(dim=1).flatten())
    return torch.cat(pieces)


def padded_token_weights(queries: Tensor, keys: Tensor, layout: Layout) -> Tensor:
    """The same over padded rows. A GPU pays for every run of equal lengths, a CPU for padding."""
    grid = layout.grid
    scores = torch.bmm(grid.pad(queries), grid.pad(keys).transpose(1, 2)).float()
    shares = scores.masked_fill(~grid.real.unsqueeze(1), -torch.inf).softmax(dim=-1)
    means = (shares * grid.real.unsqueeze(2)).sum(dim=1) / grid.lengths.unsqueeze(1)
    return grid.unpad(means)


def weighted_sums(tokens: Tensor, weights: Tensor, layout: Layout) -> Tensor:
    """w^T E of every text: float32 [rows, n]."""
    if tokens.is_cuda:
        return padded_weighted_sums(tokens, weights, layout)
    pieces = [
        torch.bmm(shares.unsqueeze(1), values.float()).squeeze(1)
        for shares, values in zip(layout.by_run(weights), layout.by_run(tokens), strict=True)
    ]
    return torch.cat(pieces)


def padded_weighted_sums(tokens: Tensor, weights: Tensor, layout: Layout) -> Tensor:
    """The same over padded rows."""
    grid = layout.grid
    shares = weights.new_zeros(grid.real.numel()).index_copy(0, grid.cells, weights)
    return torch.bmm(shares.view(len(grid.real), 1, -1), grid.pad(tokens).float()).squeeze(1)


def soft_prompt(pooled: Tensor, weights: GeneratorWeights) -> Tensor:
    """Pooled vectors to prompts: [rows, n] -> [rows * t, n], float32.

    A static prompt reads only how many rows there are.
    """
    if weights.down is None or weights.up is None:
        assert weights.up_bias is not None
        return weights.up_bias.float().view(weights.prompt_length, -1).repeat(len(pooled), 1)
    values = pooled if weights.value is None else pooled @ weights.value
    if weights.routes:
        prompt = _largest_share(values @ weights.down) @ weights.up
    else:
        assert weights.down_bias is not None
        assert weights.up_bias is not None
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


def _largest_share(routed: Tensor) -> Tensor:
    """The largest share of a softmax, zero elsewhere: [rows, k] -> [rows, k]."""
    shares = routed.softmax(dim=-1)
    share, chosen = shares.max(dim=-1, keepdim=True)
    return torch.zeros_like(shares).scatter(1, chosen, share)


def generate(
    source: Tensor, generation: Generation, generators: Mapping[int, GeneratorWeights]
) -> tuple[Tensor, Tensor | None]:
    """Prompts of all rows that insert together, whichever adapters they have.

    Args:
        source: [T', n], the states that the prompts are made from.
        generators: by the batch's adapter index.

    Returns:
        Prompts [sum of t, n] in the rows' order, in `source`'s dtype; token weights, float32 [T],
        one a row if prompts are made from the first token, None if they are made from nothing.
    """
    members = [generators[group.adapter] for group in generation.groups]
    if generation.source is PromptSource.NOTHING:
        nothing = source.new_empty(len(generation.rows), 0)
        return _prompts(nothing, generation, members).to(source.dtype), None
    tokens = source if generation.tokens is None else source.index_select(0, generation.tokens)
    if generation.source is PromptSource.FIRST_TOKEN:
        prompts = _prompts(tokens.float(), generation, members).to(source.dtype)
        return prompts, torch.ones(len(tokens), device=source.device)
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


def add_tables(words: Tensor, batch: PackedBatch, tables: Mapping[int, Tensor]) -> Tensor:
    """The word embeddings with DePT's tables added by position: [T, width] -> [T, width].

    Args:
        tables: [positions, width], by the batch's adapter index.
    """
    pieces = list(words.split(batch.layout.lengths.tolist()))
    for index, row in enumerate(batch.rows):
        if (table := tables.get(row.adapter)) is not None:
            piece = pieces[index]
            added = table[: len(piece)]
            if len(added) < len(piece):
                last = table[-1:].expand(len(piece) - len(added), -1)
                added = torch.cat([added, last])
            pieces[index] = piece + added.to(piece.dtype)
    return torch.cat(pieces)
