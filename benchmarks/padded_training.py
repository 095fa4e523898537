"""An epoch of PEFT's prompt tuning and of PEFT's LoRA, as their users run them.

`AutoModelForSequenceClassification` with PyTorch's attention and its own dropout, and batches
padded to their longest text. The loop is plain PyTorch: `transformers.Trainer` would only add
to it.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from importlib import import_module
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging

from adapters.tokenizer import TextEncoder
from benchmarks.ceilings import synchronize
from benchmarks.padded import pad
from benchmarks.shapes import place_of
from benchmarks.work import LABELS, MAX_TOKENS, PROMPT_LENGTH, SEED, Epoch, Work
from train.config.settings import ComputeType

# Small enough for RoBERTa's class head, which has a hidden layer. It does not change the speed.
_LEARNING_RATE = 1e-4
_CLIP_NORM = 1.0
_CHECKED_ROWS, _CHECKED_STEPS = 8, 16


class Kind(StrEnum):
    """The methods of PEFT."""

    PROMPT_TUNING = "PEFT prompt tuning"
    LORA = "PEFT LoRA"


class Precision(StrEnum):
    """The types of weights and computation. There are two ways to train in bfloat16: frozen weights
    in bfloat16 and PEFT's own in float32; or all weights in float32 under autocast, which is
    `bf16=True` of the Trainer."""

    FLOAT32 = "float32"
    WEIGHTS = "bfloat16 weights"
    AUTOCAST = "autocast"


@dataclass(frozen=True, slots=True)
class Padded:
    """One of PEFT's methods in one precision."""

    kind: Kind
    precision: Precision

    @property
    def name(self) -> str:
        if self.precision is Precision.FLOAT32:
            return self.kind.value
        return f"{self.kind}, {self.precision}"


class PaddedTrainee:
    """One of PEFT's methods around a model of `load_classifier`."""

    def __init__(self, work: Work, system: Padded, model: nn.Module) -> None:
        self._work = work
        self._device = torch.device(work.device)
        self._autocast = system.precision is Precision.AUTOCAST
        self._encodings = _encoder(work.source).encode_batch(
            [(text, None) for text in work.texts], max_length=MAX_TOKENS
        )
        self._classes = torch.tensor([LABELS.index(label) for label in work.labels])
        with _seeded():
            peft: Any = import_module("peft")
            self.model = peft.get_peft_model(model, _config(peft, system.kind)).to(self._device)
        self._trained = [weight for weight in self.model.parameters() if weight.requires_grad]
        self._optimizer = torch.optim.AdamW(self._trained, lr=_LEARNING_RATE, fused=True)
        self._epochs = 0

    def epoch(self) -> Epoch:
        """One epoch more, with the weights and the optimizer of the previous one."""
        self.model.train()
        synchronize(self._device)
        started = perf_counter()
        total = torch.zeros((), device=self._device)
        for rows in self._work.batches(self._epochs):
            # Not read before the end: reading would wait for every step.
            total += self._step(rows) * len(rows)
        synchronize(self._device)
        seconds = perf_counter() - started
        self._epochs += 1
        return Epoch(seconds, float(total) / len(self._encodings))

    def learned(self) -> tuple[float, float]:
        """The loss of a few rows before some steps on them, and the lowest loss during these steps,
        both without dropout. Not the last loss: the first steps may overshoot."""
        rows = next(self._work.batches())[:_CHECKED_ROWS]
        before = self._loss_without_dropout(rows)
        losses = []
        for _ in range(_CHECKED_STEPS):
            self.model.train()
            self._step(rows)
            losses.append(self._loss_without_dropout(rows))
        return before, min(losses)

    def set_learning_rate(self, rate: float) -> None:
        """For all further steps."""
        for group in self._optimizer.param_groups:
            group["lr"] = rate

    def close(self) -> None:
        pass

    def _step(self, rows: Sequence[int]) -> Tensor:
        loss: Tensor = self._forward(rows).loss
        loss.backward()
        nn.utils.clip_grad_norm_(self._trained, _CLIP_NORM)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return loss.detach()

    def _forward(self, rows: Sequence[int]) -> Any:
        padded = pad([self._encodings[row] for row in rows], self.model)
        real = torch.ones_like(padded.input_ids) if padded.real is None else padded.real.long()
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._autocast):
            return self.model(
                input_ids=padded.input_ids, attention_mask=real, labels=self._targets(rows)
            )

    def _targets(self, rows: Sequence[int]) -> Tensor:
        return self._classes[rows].to(self._device, non_blocking=True)

    @torch.no_grad()
    def _loss_without_dropout(self, rows: Sequence[int]) -> float:
        self.model.eval()
        # Not the model's own loss, which has only two digits in bfloat16.
        logits = self._forward(rows).logits.float()
        return float(functional.cross_entropy(logits, self._targets(rows)))


def precisions(dtype: ComputeType) -> tuple[Precision, ...]:
    """The ways to train in this type."""
    if dtype is ComputeType.FLOAT32:
        return (Precision.FLOAT32,)
    return (Precision.WEIGHTS, Precision.AUTOCAST)


def load_classifier(work: Work, system: Padded) -> nn.Module:
    """The model as `transformers` loads it, on its device, with a new random class head."""
    # As in `benchmarks.padded`: cuDNN's attention plans every new shape.
    torch.backends.cuda.enable_cudnn_sdp(False)
    place = place_of(work.source)
    with _seeded(), _without_warnings():
        model: nn.Module = AutoModelForSequenceClassification.from_pretrained(
            place,
            num_labels=len(LABELS),
            dtype=torch.bfloat16 if system.precision is Precision.WEIGHTS else torch.float32,
            attn_implementation="sdpa",
        )
    # The file is memory-mapped. Read it now, so that its memory does not count as training's.
    for parameter in model.parameters():
        parameter.sum()
    return model.to(torch.device(work.device))


def _config(peft: Any, kind: Kind) -> Any:
    if kind is Kind.PROMPT_TUNING:
        return peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=PROMPT_LENGTH)
    return peft.LoraConfig(
        task_type="SEQ_CLS", r=8, lora_alpha=16, lora_dropout=0.1, target_modules=["query", "value"]
    )


def _encoder(source: str) -> TextEncoder:
    place = place_of(source)
    tokenizer = AutoTokenizer.from_pretrained(place)
    return TextEncoder(tokenizer.backend_tokenizer, read_token=None)


@contextmanager
def _seeded() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        yield


@contextmanager
def _without_warnings() -> Iterator[None]:
    """`transformers` warns that the class head is new."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
