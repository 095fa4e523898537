"""What the common library offers for many adapters in one batch: PEFT's LoRA with `adapter_names`.

r = 8 on query and value, as LoRA's authors use it on RoBERTa. Adapters have no class heads here,
which PEFT would have to run one by one as well.
"""

from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from adapters.backbone.tokenizer import Encoding
from benchmarks.padded import by_length, pad

_TARGETS = ["query", "value"]


def installed() -> bool:
    """Whether PEFT is here."""
    return find_spec("peft") is not None


class MixedLora:
    """A plain model under so many random LoRA adapters.

    Args:
        max_tokens: padded tokens of one batch at most. All adapters of a batch are run one after
            the other in every layer, so larger batches are what this peer is best at.
    """

    def __init__(self, model: nn.Module, adapters: int, *, max_tokens: int) -> None:
        peft: Any = import_module("peft")
        # Not initialised to zero, and in the model's own type: PEFT's float32 would be slower.
        config = peft.LoraConfig(
            r=8, lora_alpha=16, target_modules=_TARGETS, init_lora_weights=False
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self._model = peft.get_peft_model(
                model, config, adapter_name=_name(0), autocast_adapter_dtype=False
            )
            for index in range(1, adapters):
                self._model.add_adapter(_name(index), config, autocast_adapter_dtype=False)
        self._model.eval().requires_grad_(False)
        self._max_tokens = max_tokens

    @torch.inference_mode()
    def classify(self, texts: Sequence[tuple[int, Encoding]]) -> list[Tensor]:
        """The first token's states of texts, each (index of its adapter, encoding), on the host."""
        made = []
        for chosen in self._batches([encoding for _, encoding in texts]):
            padded = pad([texts[row][1] for row in chosen], self._model)
            mask = None if padded.real is None else padded.real.long()
            states = self._model(
                input_ids=padded.input_ids,
                attention_mask=mask,
                adapter_names=[_name(texts[row][0]) for row in chosen],
            )
            made.append((chosen, states.last_hidden_state[:, 0]))
        found = [torch.empty(0)] * len(texts)
        for chosen, batch in made:
            for row, state in zip(chosen, batch.cpu(), strict=True):
                found[row] = state
        return found

    @torch.inference_mode()
    def alone(self, text: tuple[int, Encoding]) -> Tensor:
        """The same for one text, its adapter made the active one: what a batch must agree with."""
        self._model.set_adapter(_name(text[0]))
        padded = pad([text[1]], self._model)
        states = self._model(input_ids=padded.input_ids).last_hidden_state
        first: Tensor = states[0, 0].cpu()
        return first

    def _batches(self, encodings: Sequence[Encoding]) -> list[list[int]]:
        batches: list[list[int]] = [[]]
        for row in by_length(encodings):
            # Sorted: the new row is the longest.
            if (len(batches[-1]) + 1) * len(encodings[row]) > self._max_tokens and batches[-1]:
                batches.append([])
            batches[-1].append(row)
        return batches


def _name(index: int) -> str:
    return f"task-{index}"
