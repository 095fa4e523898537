"""Tiny random models of every supported family with real tokenizers, built in memory.

The weights have a far larger spread than a new model's. With the usual 0.02 all texts get nearly
the same answer, and a comparison of two answers would prove nothing.
"""

import copy
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig, AutoModel, PreTrainedTokenizerFast

from adapters.backbone.loading import fingerprint
from adapters.backbone.model import Backbone
from adapters.format.spec import BackboneIdentity
from adapters.tokenizer import TextEncoder
from tests.support.tiny_models import make_tokenizer

LAYERS = 4
HIDDEN = 24
POSITIONS = 48
_CORPUS = (
    "a good film and a bad plot",
    "is the card in the account free to win",
    "the money was not good 12 times",
)
_SPREAD = 0.3
_SHARED = {"max_position_embeddings": POSITIONS, "initializer_range": _SPREAD}
_SIZES = {
    "num_hidden_layers": LAYERS,
    "hidden_size": HIDDEN,
    "num_attention_heads": 3,
    "intermediate_size": 40,
} | _SHARED
_PADDED_POSITIONS = {"max_position_embeddings": POSITIONS + 2, "type_vocab_size": 1}


def wordpiece() -> PreTrainedTokenizerFast:
    """Words and letters, lower-cased, `[CLS] a [SEP] b [SEP]`."""
    return PreTrainedTokenizerFast(
        tokenizer_object=make_tokenizer(),
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )


def _bytes(special: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    return tokenizer


def roberta_bytes() -> PreTrainedTokenizerFast:
    """Bytes, `<s> a </s></s> b </s>`; `<pad>` is token 1, and a text may spell it."""
    tokenizer = _bytes(["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> </s> $B </s>",
        special_tokens=[("<s>", 0), ("</s>", 2)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        cls_token="<s>",
        eos_token="</s>",
        sep_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        mask_token="<mask>",
    )


def gpt2_bytes() -> PreTrainedTokenizerFast:
    """Bytes, nothing added to a text."""
    end = "<|endoftext|>"
    return PreTrainedTokenizerFast(
        tokenizer_object=_bytes([end]), bos_token=end, eos_token=end, unk_token=end
    )


_FAMILIES: dict[str, tuple[Callable[[], PreTrainedTokenizerFast], dict[str, Any]]] = {
    "bert": (wordpiece, _SIZES),
    "roberta": (roberta_bytes, _SIZES | _PADDED_POSITIONS),
    "xlm-roberta": (roberta_bytes, _SIZES | _PADDED_POSITIONS),
    "electra": (wordpiece, _SIZES | {"embedding_size": 16}),
    "distilbert": (
        wordpiece,
        {"n_layers": LAYERS, "dim": HIDDEN, "n_heads": 3, "hidden_dim": 40} | _SHARED,
    ),
    "gpt2": (
        gpt2_bytes,
        {"n_layer": LAYERS, "n_embd": HIDDEN, "n_head": 3, "n_positions": POSITIONS}
        | {"initializer_range": _SPREAD, "bos_token_id": 0, "eos_token_id": 0},
    ),
}
FAMILY_NAMES = tuple(_FAMILIES)


@cache
def tokenizer_of(family: str) -> PreTrainedTokenizerFast:
    """The family's tokenizer."""
    return _FAMILIES[family][0]()


def config_of(family: str) -> Any:
    """A fresh config object of the family."""
    fields = _FAMILIES[family][1]
    return AutoConfig.for_model(family, vocab_size=len(tokenizer_of(family)), **fields)


def model_of(family: str, *, seed: int = 0) -> Any:
    """A random model with Hugging Face's own eager attention, in evaluation mode."""
    return model_from(config_of(family), seed=seed)


def model_from(config: Any, *, seed: int = 0) -> Any:
    """A random model of a config; the caller's random state stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModel.from_config(config, attn_implementation="eager")
        for name, weight in model.named_parameters():
            if name.endswith("bias"):  # zeros would hide a forgotten bias
                weight.data.normal_(std=0.1)
    if getattr(model, "pooler", None) is not None:
        model.pooler = None  # never run, and not part of a backbone's fingerprint
    return model.eval()


def backbone_from(model: Any, tokenizer: PreTrainedTokenizerFast) -> Backbone:
    """A backbone over a copy of `model`; the model itself stays as Hugging Face runs it."""
    own = copy.deepcopy(model)
    causal = model.config.model_type == "gpt2"
    encoder = TextEncoder(
        tokenizer.backend_tokenizer, read_token=tokenizer.eos_token if causal else None
    )
    identity = BackboneIdentity(
        name=f"tiny-{model.config.model_type}", fingerprint=fingerprint(own)
    )
    return Backbone(own, encoder, identity)


def backbone_of(family: str, *, seed: int = 0) -> Backbone:
    """A backbone of a random model of the family."""
    return backbone_from(model_of(family, seed=seed), tokenizer_of(family))


def save(family: str, folder: Path, *, seed: int = 0) -> None:
    """Write model and tokenizer with `save_pretrained`."""
    model_of(family, seed=seed).save_pretrained(folder)
    tokenizer_of(family).save_pretrained(folder)
