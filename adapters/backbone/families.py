"""The supported model families: where their parts are and how to run their last layer.

Every family runs the unmodified modules of `transformers`. `adapters.layers.bert` runs the weights
of BERT-like layers by faster code. The last layer runs only for the positions that are read: its
attention sees all tokens, but the output projection, norms and feed-forward work on the few
positions whose states are needed.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from adapters.errors import UnsupportedBackbone
from adapters.layers import plain
from adapters.layers.bert import BertLayer
from adapters.layers.plain import LayerParts
from adapters.layers.tuning import LayerTuning
from adapters.packed.layout import Extents


@dataclass(frozen=True, slots=True)
class Tokens:
    """The T tokens of a batch, int64 [T] each.

    offsets: from a row's start. shifts: what a token's position is beyond its offset; None: nothing
    for all tokens. words: [T, width], in place of the embeddings of `input_ids`, or None.
    """

    input_ids: Tensor
    token_type_ids: Tensor
    offsets: Tensor
    shifts: Tensor | None = None
    words: Tensor | None = None

    @property
    def positions(self) -> Tensor:
        """Offsets with shifts."""
        return self.offsets if self.shifts is None else self.offsets + self.shifts

    @property
    def ids(self) -> Tensor | None:
        """[1, T], None if the words are given."""
        return self.input_ids[None] if self.words is None else None

    @property
    def given(self) -> Tensor | None:
        """[1, T, width], or None."""
        return None if self.words is None else self.words[None]


@dataclass(frozen=True, slots=True)
class Family:
    """How to run one `model_type`.

    embed: (model, tokens) -> [1, T, n], the input of the first layer. layers: the transformer
    layers, each called with [1, T, n]. read: (last layer, [1, T, n], positions [R], layout) ->
    [R, n]. parts: of one of the layers. max_tokens: of a text. intermediate_size: the width of the
    feed-forward part. final_norm: (model, [T, n]) -> [T, n], after the last layer.
    """

    embed: Callable[[Any, Tokens], Tensor]
    layers: Callable[[Any], nn.ModuleList]
    read: Callable[[Any, Tensor, Tensor, Extents], Tensor]
    parts: Callable[[Any], LayerParts]
    max_tokens: Callable[[Any], int]
    intermediate_size: Callable[[Any], int]
    final_norm: Callable[[Any, Tensor], Tensor] = lambda _, states: states
    causal: bool = False

    def forward_tuned(
        self, layer: Any, states: Tensor, layout: Extents, tuning: LayerTuning
    ) -> Tensor:
        """A layer with the adapters' changes: [T, n] -> [T, n]."""
        if isinstance(layer, BertLayer):
            return layer.forward_tuned(states, layout, tuning)
        return plain.forward(self.parts(layer), states, layout, tuning)

    def read_tuned(
        self, layer: Any, states: Tensor, positions: Tensor, layout: Extents, tuning: LayerTuning
    ) -> Tensor:
        """The last layer with the adapters' changes: [T, n] -> [positions, n]."""
        if isinstance(layer, BertLayer):
            return layer.read_tuned(states, positions, layout, tuning)
        return plain.read(self.parts(layer), states, positions, layout, tuning)


def _embed_bert(model: Any, tokens: Tokens) -> Tensor:
    return _embedded(model, tokens, tokens.token_type_ids, tokens.positions)


def _embedded(model: Any, tokens: Tokens, token_type_ids: Tensor, positions: Tensor) -> Tensor:
    embedded: Tensor = model.embeddings(
        input_ids=tokens.ids,
        token_type_ids=token_type_ids[None],
        position_ids=positions[None],
        inputs_embeds=tokens.given,
    )
    return embedded


def _embed_electra(model: Any, tokens: Tokens) -> Tensor:
    embedded = _embed_bert(model, tokens)
    project = getattr(model, "embeddings_project", None)
    return embedded if project is None else project(embedded)


def _embed_roberta(model: Any, tokens: Tokens) -> Tensor:
    # RoBERTa counts positions from padding_idx + 1 on and does not count padding tokens. A text may
    # spell "<pad>", so padding occurs within texts.
    padding = model.embeddings.padding_idx
    input_ids, offsets = tokens.input_ids, tokens.offsets
    real = (input_ids != padding).long()
    counted = real.cumsum(0)
    starts = torch.arange(len(offsets), device=offsets.device) - offsets
    before = (counted - real)[starts]
    positions = (counted - before) * real + padding
    if tokens.shifts is not None:
        # After prompt vectors it counts every token: it has no ids then.
        shifted = offsets + tokens.shifts + padding + 1
        positions = torch.where(tokens.shifts > 0, shifted, positions)
    return _embedded(model, tokens, torch.zeros_like(tokens.token_type_ids), positions)


def _embed_distilbert(model: Any, tokens: Tokens) -> Tensor:
    embedded: Tensor = model.embeddings(tokens.ids, tokens.given, tokens.positions[None])
    return embedded


def _embed_gpt2(model: Any, tokens: Tokens) -> Tensor:
    words = model.wte(tokens.ids) if tokens.given is None else tokens.given
    embedded: Tensor = model.drop(words + model.wpe(tokens.positions[None]))
    return embedded


def _read_distilbert(layer: Any, states: Tensor, positions: Tensor, layout: Extents) -> Tensor:
    attended, _ = layer.attention(states, None, layout=layout)
    answers = layer.sa_layer_norm(attended[:, positions] + states[:, positions])
    read: Tensor = layer.output_layer_norm(layer.ffn(answers) + answers)[0]
    return read


def _read_gpt2(layer: Any, states: Tensor, positions: Tensor, layout: Extents) -> Tensor:
    attended, _ = layer.attn(layer.ln_1(states), attention_mask=None, layout=layout)
    answers = attended[:, positions] + states[:, positions]
    read: Tensor = (answers + layer.mlp(layer.ln_2(answers)))[0]
    return read


def _parts_of_distilbert(layer: Any) -> LayerParts:
    attention, ffn = layer.attention, layer.ffn
    return LayerParts(
        attention=attention,
        heads=attention.n_heads,
        projection=(attention.q_lin, attention.k_lin, attention.v_lin),
        dense=attention.out_lin,
        attention_norm=layer.sa_layer_norm,
        up=ffn.lin1,
        activation=ffn.activation,
        down=ffn.lin2,
        output_norm=layer.output_layer_norm,
    )


def _parts_of_gpt2(layer: Any) -> LayerParts:
    attention = layer.attn
    return LayerParts(
        attention=attention,
        heads=attention.num_heads,
        projection=(attention.c_attn,),
        dense=attention.c_proj,
        attention_norm=layer.ln_1,
        up=layer.mlp.c_fc,
        activation=layer.mlp.act,
        down=layer.mlp.c_proj,
        output_norm=layer.ln_2,
        norm_first=True,
    )


def _bert_like(embed: Callable[[Any, Tokens], Tensor], *, padded_positions: bool = False) -> Family:
    return Family(
        embed=embed,
        layers=lambda model: nn.ModuleList(BertLayer(layer) for layer in model.encoder.layer),
        read=BertLayer.read,
        parts=lambda layer: layer.parts,
        max_tokens=lambda config: (
            config.max_position_embeddings - (config.pad_token_id + 1 if padded_positions else 0)
        ),
        intermediate_size=lambda config: int(config.intermediate_size),
    )


FAMILIES: dict[str, Family] = {
    "bert": _bert_like(_embed_bert),
    "roberta": _bert_like(_embed_roberta, padded_positions=True),
    "xlm-roberta": _bert_like(_embed_roberta, padded_positions=True),
    "electra": _bert_like(_embed_electra),
    "distilbert": Family(
        embed=_embed_distilbert,
        layers=lambda model: model.transformer.layer,
        read=_read_distilbert,
        parts=_parts_of_distilbert,
        max_tokens=lambda config: int(config.max_position_embeddings),
        intermediate_size=lambda config: int(config.hidden_dim),
    ),
    "gpt2": Family(
        embed=_embed_gpt2,
        layers=lambda model: model.h,
        read=_read_gpt2,
        parts=_parts_of_gpt2,
        max_tokens=lambda config: int(config.n_positions),
        intermediate_size=lambda config: int(config.n_inner or 4 * config.n_embd),
        final_norm=lambda model, states: model.ln_f(states),
        causal=True,
    ),
}

# Their layers are BERT's (`adapters.layers.bert`): int8 and float8 run no others.
BERT_FAMILIES = ("bert", "electra", "roberta", "xlm-roberta")


def family_of(config: Any) -> Family:
    """The family of a Hugging Face config.

    Raises:
        UnsupportedBackbone: with the model type, the supported ones, and the reason.
    """
    kind = str(config.model_type)
    if kind not in FAMILIES:
        raise UnsupportedBackbone(
            f"model type {kind!r} cannot run packed batches, which need absolute position "
            "embeddings and attention through transformers' attention interface; "
            f"supported: {', '.join(sorted(FAMILIES))}"
        )
    positions = getattr(config, "position_embedding_type", None) or "absolute"
    if (
        positions != "absolute"
        or getattr(config, "is_decoder", False)
        or getattr(config, "add_cross_attention", False)
    ):
        raise UnsupportedBackbone(
            f"this {kind} has {positions!r} positions or is configured as a decoder: only encoders "
            "(and GPT-2) with absolute positions can run packed batches"
        )
    return FAMILIES[kind]
