"""Tiny random backbones and adapters: real architectures, seeded, without a download."""

import string
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import WordPiece
from tokenizers.processors import TemplateProcessing
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from adapters.backbone.loading import fingerprint
from adapters.backbone.model import Backbone
from adapters.format.files import Adapter
from adapters.format.spec import AdapterSpec, AttentionPrompt, BackboneIdentity, Head
from adapters.tokenizer import TextEncoder

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
WORDS = (
    "the",
    "a",
    "free",
    "win",
    "now",
    "call",
    "hello",
    "good",
    "bad",
    "card",
    "my",
    "is",
    "not",
    "you",
)


# The names of the settings, and those of the spec's parts.
PROMPT_FIELDS = {
    "bottleneck": "bottleneck",
    "attention_size": "attention_size",
    "generator_input": "source",
    "generator_pooling": "pooling",
    "final_activation": "final_activation",
}
HEAD_FIELDS = {"head": "kind", "pooling": "pooling", "hidden": "hidden"}


def make_tokenizer() -> Tokenizer:
    """A fast BERT tokenizer that knows a few words and every printable ASCII character."""
    letters = sorted(set(string.ascii_lowercase + string.digits + string.punctuation))
    pieces = (
        *SPECIAL,
        *WORDS,
        *(item for item in letters if item not in WORDS),
        *(f"##{item}" for item in letters),
    )
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(piece, vocabulary[piece]) for piece in ("[CLS]", "[SEP]")],
    )
    return tokenizer


def make_backbone(
    *, seed: int = 0, layers: int = 3, hidden_size: int = 32, max_tokens: int = 128
) -> Backbone:
    """A random BERT, float32 on the CPU. Another seed is another backbone, and fingerprint."""
    tokenizer = make_tokenizer()
    config = BertConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=2 * hidden_size,
        max_position_embeddings=max_tokens,
        # Wide enough that different texts get visibly different answers.
        initializer_range=0.2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = BertModel(config, add_pooling_layer=False)
    identity = BackboneIdentity(name=f"tiny-bert-{seed}", fingerprint=fingerprint(model))
    return Backbone(model, TextEncoder(tokenizer), identity)


def make_spec(
    backbone: Backbone,
    *,
    labels: tuple[str, ...] = ("ham", "spam"),
    prompt_length: int = 3,
    insertion_layer: int = 1,
    **fields: Any,
) -> AdapterSpec:
    """A spec made for `backbone`.

    fields: any of AdapterSpec's, and those of `PROMPT_FIELDS` and `HEAD_FIELDS`.
    """
    prompt = {PROMPT_FIELDS[name]: fields.pop(name) for name in PROMPT_FIELDS if name in fields}
    head = {HEAD_FIELDS[name]: fields.pop(name) for name in HEAD_FIELDS if name in fields}
    defaults = {"bottleneck": 8, "attention_size": backbone.hidden_size}
    declared = {
        "prompt": AttentionPrompt(
            **defaults | {"length": prompt_length, "layer": insertion_layer} | prompt
        ),
        "head": Head(**head),
        "max_length": backbone.max_tokens,
    } | fields
    return AdapterSpec(
        backbone=backbone.identity,
        tokenizer_sha256=backbone.encoder.sha256,
        hidden_size=backbone.hidden_size,
        labels=labels,
        **declared,
    )


def attention_of(adapter: Adapter) -> AttentionPrompt:
    """The prompt of an ID-SPAM adapter."""
    assert isinstance(adapter.spec.prompt, AttentionPrompt)
    return adapter.spec.prompt


def make_adapter(
    backbone: Backbone,
    *,
    seed: int = 0,
    labels: tuple[str, ...] = ("ham", "spam"),
    prompt_length: int = 3,
    insertion_layer: int = 1,
    **fields: Any,
) -> Adapter:
    """A random adapter for `backbone`: the same seed and fields are the same adapter."""
    spec = make_spec(
        backbone,
        labels=labels,
        prompt_length=prompt_length,
        insertion_layer=insertion_layer,
        **fields,
    )
    random = torch.Generator().manual_seed(seed)
    tensors = {
        name: torch.randn(shape, generator=random) * _spread(name, shape)
        for name, shape in spec.shapes().items()
    }
    return Adapter(spec, tensors)


def _spread(name: str, shape: tuple[int, ...]) -> float:
    """Wide enough that different adapters give visibly different answers."""
    if name.startswith("tuning."):
        # [L, inputs, outputs] of a matrix, [L, width] of vectors.
        return shape[1] ** -0.5 if len(shape) == 3 else 0.3
    return 2.0 if len(shape) == 1 else 2.0 * shape[0] ** -0.5


def save_backbone(folder: Path, *, hidden_size: int = 32, layers: int = 2) -> Path:
    """A tiny random BERT with its tokenizer as a Hugging Face folder, for services in processes."""
    tokenizer = make_tokenizer()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        cls_token="[CLS]",
        sep_token="[SEP]",
        pad_token="[PAD]",
        unk_token="[UNK]",
        mask_token="[MASK]",
    )
    fast.save_pretrained(folder)
    config = BertConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=2 * hidden_size,
        max_position_embeddings=128,
    )
    BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    return folder
