"""Tiny base models, and what users of PEFT do with them: train, save, load, ask."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import peft
import torch
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

from adapters.adapter import classify, prepare, rows_of
from adapters.backbone.model import Backbone
from adapters.format.files import Adapter
from tests.support.families import config_of, tokenizer_of
from train.peft.saved import quietly

LABELS = ("sports", "money", "weather")
PAIR = ("win a free call", "is it not good")
TEXTS = (
    "the card is not good",
    "win a free call now",
    "hello",
    "my good card, you call: is it bad? 1 2 3",
)
TRAINED_CLASSES = [2, 0, 1, 0]
FLOAT32_BOUND = 1e-5
_BERT_LIKE = ("bert", "roberta", "xlm-roberta", "electra")
QUERY_AND_VALUE = {
    **{family: ["query", "value"] for family in _BERT_LIKE},
    "distilbert": ["q_lin", "v_lin"],
    "gpt2": ["c_attn"],
}
EVERY_LAYER = {
    **dict.fromkeys(_BERT_LIKE, r".*encoder\.layer\.\d+\..*(query|key|value|dense)"),
    "distilbert": r".*layer\.\d+\..*(q_lin|k_lin|v_lin|out_lin|lin1|lin2)",
    "gpt2": r".*h\.\d+\..*(c_attn|c_proj|c_fc)",
}


def lora(family: str, **fields: Any) -> Any:
    """A configuration of LoRA for queries and values, unless `fields` say otherwise."""
    config: Any = peft.LoraConfig
    return config(
        task_type=peft.TaskType.SEQ_CLS,
        fan_in_fan_out=family == "gpt2",
        **{"r": 4, "lora_alpha": 12, "target_modules": QUERY_AND_VALUE[family]} | fields,
    )


def prompt_sizes(family: str) -> dict[str, int]:
    """Fields of a prompt's configuration, which PEFT cannot find out for every family."""
    width = 16 if family == "electra" else 24
    return {"token_dim": width, "num_attention_heads": 3, "num_layers": 4}


def save_base(family: str, folder: Path, *, seed: int = 0) -> Path:
    """A base model with its tokenizer; a BERT has its pooler."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModel.from_config(config_of(family))
        for name, weight in model.named_parameters():
            if name.endswith("bias"):
                weight.data.normal_(std=0.1)
    model.save_pretrained(folder)
    tokenizer_of(family).save_pretrained(folder)
    return folder


def classifier(base: Path, *, labels: int = len(LABELS), seed: int = 1, **config: Any) -> Any:
    """The base model with a new head, as PEFT's users load it."""
    with torch.random.fork_rng(devices=[]), quietly():
        torch.manual_seed(seed)
        return AutoModelForSequenceClassification.from_pretrained(
            base, num_labels=labels, attn_implementation="eager", **config
        )


def save_tuned(
    base: Path, config: Any, folder: Path, *, labels: int = len(LABELS), seed: int = 2, **model: Any
) -> Path:
    """A model of PEFT with random weights in all that it trains, saved."""
    with torch.random.fork_rng(devices=[]), quietly():
        torch.manual_seed(seed)
        tuned: Any = peft.get_peft_model(classifier(base, labels=labels, **model), config)
        for name, parameter in tuned.named_parameters():
            if parameter.requires_grad:
                # Not so wide that every text gets the same label with certainty.
                spread = 0.3 if "modules_to_save" in name else 0.1
                parameter.data += spread * torch.randn_like(parameter)
        tuned.save_pretrained(folder)
    return folder


def train_with_peft(base: Path, config: Any, folder: Path, *, epochs: int = 30) -> Path:
    """The recipe of PEFT's example for sequence classification, on `TEXTS`: padded batches, AdamW.

    Source: peft/examples/sequence_classification, without its data set and its Trainer.
    """
    with torch.random.fork_rng(devices=[]), quietly():
        torch.manual_seed(4)
        model: Any = peft.get_peft_model(classifier(base), config)
        tokenizer: Any = AutoTokenizer.from_pretrained(base)
        inputs = tokenizer(list(TEXTS), padding=True, truncation=True, return_tensors="pt")
        labels = torch.tensor(TRAINED_CLASSES)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        model.train()
        for _ in range(epochs):
            loss = model(**inputs, labels=labels).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        model.save_pretrained(folder)
    return folder


@torch.inference_mode()
def peft_scores(
    base: Path,
    folder: Path,
    texts: Sequence[str | tuple[str, str]] = TEXTS,
    *,
    labels: int = len(LABELS),
) -> npt.NDArray[np.float32]:
    """Of the saved model, loaded again and asked for one text after the other: [texts, labels]."""
    with quietly():
        model = peft.PeftModel.from_pretrained(classifier(base, labels=labels, seed=9), folder)
        model = model.eval()
        tokenizer: Any = AutoTokenizer.from_pretrained(base)
        # The tokenizers of these families give them without being asked.
        types = model.config.model_type in ("bert", "electra")
        ask: Any = partial(tokenizer, return_tensors="pt", return_token_type_ids=types)
        logits = [model(**ask(*_both(text))).logits for text in texts]
    return torch.cat(logits).softmax(-1).numpy()


def served_scores(
    adapter: Adapter, backbone: Backbone, texts: Sequence[str | tuple[str, str]] = TEXTS
) -> npt.NDArray[np.float32]:
    """Of all texts in one batch: [texts, labels]."""
    prepared = [prepare(adapter, backbone)]
    encodings = [
        backbone.encoder.encode(*_both(text), max_length=adapter.spec.max_length) for text in texts
    ]
    batch = backbone.pack(rows_of(prepared, [(0, encoding) for encoding in encodings]))
    return np.stack([answer.scores for answer in classify(backbone, batch, prepared)])


def _both(text: str | tuple[str, str]) -> tuple[str, str | None]:
    return (text, None) if isinstance(text, str) else text
