"""The engine's rivals on the same texts and adapters: padded `transformers`, and PEFT's LoRA.

PEFT runs many adapters in one batch with `adapter_names`: r = 8 on query and value, as LoRA's
authors use it on RoBERTa. Its adapters have no class heads here; PEFT would have to run those one
by one as well.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from itertools import cycle
from pathlib import Path
from time import perf_counter
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from adapters.format.files import load_adapter
from adapters.tokenizer import Encoding
from benchmarks.ceilings import synchronize
from benchmarks.padded import PaddedAdapters, PaddedPlain, first_states, pad, plain_model
from benchmarks.subject import Subject
from benchmarks.turns import Measure
from service.engine.engine import LocalEngine
from service.engine.interface import AdapterKey, Entry

# (index of the adapter, encoding)
Texts: TypeAlias = Sequence[tuple[int, Encoding]]

PADDED = "padded transformers, one batch per adapter"
PADDED_PLAIN = "the same without prompts and heads"
LORA = "PEFT LoRA, adapter_names"

# How far another order of the same sums may move a score, or a state as a share of its length.
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 0.1}
_CHECKED = 8


class MixedLora:
    """A plain model under several random LoRA adapters.

    Args:
        max_tokens: padded tokens of a batch. In every layer PEFT runs the adapters of a batch one
            after the other, so it is at its best in large batches.
    """

    def __init__(self, model: nn.Module, adapters: int, *, max_tokens: int) -> None:
        peft: Any = import_module("peft")
        # Not initialised to zero, and in the model's own type: PEFT's float32 would be slower.
        config = peft.LoraConfig(
            r=8, lora_alpha=16, target_modules=["query", "value"], init_lora_weights=False
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
    def classify(self, texts: Texts) -> list[Tensor]:
        """The state of each text's first token, on the host."""
        batches = []
        for rows in self._batches([encoding for _, encoding in texts]):
            padded = pad([texts[row][1] for row in rows], self._model)
            names = [_name(texts[row][0]) for row in rows]
            batches.append((rows, first_states(self._model, padded, adapter_names=names)))
        states = [torch.empty(0)] * len(texts)
        for rows, batch in batches:
            for row, state in zip(rows, batch.cpu(), strict=True):
                states[row] = state
        return states

    @torch.inference_mode()
    def alone(self, text: tuple[int, Encoding]) -> Tensor:
        """The state for one text with only its adapter active: a mixed batch must agree with it."""
        self._model.set_adapter(_name(text[0]))
        return first_states(self._model, pad([text[1]], self._model))[0].cpu()

    def _batches(self, encodings: Sequence[Encoding]) -> list[list[int]]:
        batches: list[list[int]] = [[]]
        for row in sorted(range(len(encodings)), key=lambda index: len(encodings[index])):
            # Sorted by length: the new row is the longest.
            if (len(batches[-1]) + 1) * len(encodings[row]) > self._max_tokens and batches[-1]:
                batches.append([])
            batches[-1].append(row)
        return batches


class Rivals:
    """Padded `transformers` and PEFT LoRA as measures beside an engine.

    Args:
        store: the folder of the keys' files. The adapter of a text is an index into `keys`.
        at_once: texts that a rival gets at a time: as many as are in flight in the engine.
        max_tokens: padded tokens of a batch of PEFT's.
    """

    def __init__(
        self,
        subject: Subject,
        store: Path,
        keys: Sequence[AdapterKey],
        texts: Texts,
        *,
        at_once: int,
        max_tokens: int,
    ) -> None:
        device, dtype = subject.backbone.device, subject.backbone.dtype
        self._device, self._tolerance = device, TOLERANCES[dtype]
        self._keys, self._texts = keys, texts
        size = min(at_once, len(texts))
        self._turns = [texts[n : n + size] for n in range(0, len(texts) - size + 1, size)]
        adapters = [load_adapter(store / key.name / f"{key.revision}.safetensors") for key in keys]
        plain = plain_model(subject.source, device=device, dtype=dtype)
        self._padded = PaddedAdapters(plain, adapters)
        self._classify: dict[str, Callable[[Texts], object]] = {
            PADDED: self._padded.classify,
            PADDED_PLAIN: PaddedPlain(plain).classify,
        }
        self._lora: MixedLora | None = None
        if find_spec("peft") is not None:
            # PEFT puts its layers into the model, so it gets one of its own.
            model = plain_model(subject.source, device=device, dtype=dtype)
            self._lora = MixedLora(model, len(keys), max_tokens=max_tokens)
            self._classify[LORA] = self._lora.classify

    def measures(self, seconds: float, differences: Mapping[str, float]) -> dict[str, Measure]:
        """Texts/s by name; each takes about `seconds`, or one turn of `at_once` texts if longer.

        A rival that differs by too much is left out: its time would mean nothing.
        """
        return {
            name: partial(self._texts_per_second, classify, cycle(self._turns), seconds)
            for name, classify in self._classify.items()
            if differences.get(name, 0.0) <= self._tolerance
        }

    def warm_up(self, seconds: float) -> None:
        """Run everything that will be timed, for this long at most: new shapes cost extra."""
        for classify in self._classify.values():
            until = perf_counter() + seconds / len(self._classify)
            for texts in self._turns:
                if perf_counter() < until:
                    classify(texts)
        synchronize(self._device)

    def left_out(self, differences: Mapping[str, float]) -> dict[str, str]:
        """Why a rival has no row, by its name."""
        reasons = {
            name: f"left out: differs by {difference:.2g} from the correct result"
            for name, difference in differences.items()
            if not difference <= self._tolerance
        }
        return reasons if self._lora is not None else reasons | {LORA: "left out: not installed"}

    async def check(self, engine: LocalEngine, costs: Sequence[int]) -> dict[str, float]:
        """The largest difference of each rival from the correct result.

        Padded batches are compared with the engine's scores; a mixed LoRA batch with each of its
        rows alone, as a share of the state's length.
        """
        texts = self._texts[:_CHECKED]
        entries = [
            Entry(self._keys[adapter], encoding, cost)
            for (adapter, encoding), cost in zip(texts, costs, strict=False)
        ]
        answers = (await engine.predict(entries)).rows
        differences = {
            PADDED: max(
                float(np.abs(answer.scores - scores).max())
                for answer, scores in zip(answers, self._padded.classify(texts), strict=True)
            )
        }
        if self._lora is not None:
            mixed, alone = self._lora.classify(texts), map(self._lora.alone, texts)
            differences[LORA] = max(
                float((state - other).norm() / other.norm())
                for state, other in zip(mixed, alone, strict=True)
            )
        return differences

    async def _texts_per_second(
        self, classify: Callable[[Texts], object], turns: Iterator[Texts], seconds: float
    ) -> float:
        done, began = 0, perf_counter()
        while done == 0 or perf_counter() - began < seconds:
            texts = next(turns)
            classify(texts)
            done += len(texts)
        synchronize(self._device)
        return done / (perf_counter() - began)


def _name(index: int) -> str:
    return f"task-{index}"
