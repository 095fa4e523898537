"""Backbones of a real model's shape with seeded random weights, for machines without the model.

A shape is written as a Hugging Face folder and then loaded like any other backbone. Its answers
mean nothing; its speed, its memory and the work of its tokenizer are those of the real model.
"""

import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast, RobertaConfig, RobertaModel

from adapters.backbone.loading import DEFAULT_BACKBONE, locate_default

_ONSETS = (*"bcdfghjklmnprstvw", "br", "cr", "dr", "fl", "gr", "pl", "st", "tr", "sh", "th")
_VOWELS = ("a", "e", "i", "o", "u", "ai", "ea", "ou")
_CODAS = ("", "", "", "n", "r", "s", "t", "l", "m", "nd", "st", "ck", "ng")
_SPECIAL = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
# RoBERTa's. The tokenizer uses fewer tokens; the others remain as rows of weights.
_VOCABULARY = 50265


@dataclass(frozen=True, slots=True)
class Shape:
    """A RoBERTa's sizes. words: how many different ones its tokenizer knows."""

    layers: int
    hidden_size: int
    heads: int
    intermediate_size: int
    vocabulary: int = _VOCABULARY
    words: int = 8000


SHAPES: Mapping[str, Shape] = MappingProxyType(
    {
        "tiny": Shape(4, 64, 4, 128, vocabulary=2000, words=300),
        "roberta-base": Shape(12, 768, 12, 3072),
        "roberta-large": Shape(24, 1024, 16, 4096),
    }
)


def located(name: str, folder: Path) -> str:
    """A path or name for `load_backbone` and `IDSPAM_BACKBONE`; shapes are written to `folder`."""
    shape = SHAPES.get(name)
    if shape is None:
        return name
    target = folder / name
    if not target.exists():
        write_shape(shape, target)
    return str(target)


def place_of(source: str) -> str:
    """Hub name or folder, for `from_pretrained`."""
    return source if source != DEFAULT_BACKBONE else locate_default()


def described(name: str) -> str:
    """The backbone as tables describe it."""
    if name in SHAPES:
        return f"{name}: random weights in the true shape, made-up words"
    return f"{name}: its own weights" if name == DEFAULT_BACKBONE else name


def write_shape(shape: Shape, folder: Path) -> None:
    """Save a RoBERTa of this shape and its tokenizer; always the same."""
    tokenizer = make_tokenizer(shape.words, shape.vocabulary)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        cls_token="<s>",
        pad_token="<pad>",
        eos_token="</s>",
        sep_token="</s>",
        unk_token="<unk>",
        mask_token="<mask>",
    ).save_pretrained(folder)
    config = RobertaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden_size,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        intermediate_size=shape.intermediate_size,
        max_position_embeddings=514,
        type_vocab_size=1,
        layer_norm_eps=1e-5,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        RobertaModel(config).save_pretrained(folder)


def make_tokenizer(words: int, vocabulary: int) -> Tokenizer:
    """A byte-level BPE like RoBERTa's, trained on made-up words: each becomes one token.

    Takes two seconds for 8,000 words.
    """
    tokenizer = Tokenizer(BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    trainer = BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(_SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(_words(words))], trainer)
    tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> </s> $B </s>",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in ("<s>", "</s>")],
    )
    return tokenizer


def _words(count: int) -> list[str]:
    rng = random.Random(0)
    words: dict[str, None] = {}
    while len(words) < count:
        syllables = rng.choice((1, 2, 2, 3))
        pieces = (
            rng.choice(choices) for _ in range(syllables) for choices in (_ONSETS, _VOWELS, _CODAS)
        )
        words["".join(pieces)] = None
    return list(words)
