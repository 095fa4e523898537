"""The engine's rivals on one device, as measures: each is given the same texts and adapters."""

from collections.abc import Callable, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from time import perf_counter
from typing import TypeAlias

import numpy as np
import torch

from adapters.backbone.tokenizer import Encoding
from adapters.format.files import load_adapter
from benchmarks.ceilings import synchronize
from benchmarks.lora import MixedLora, installed
from benchmarks.padded import PaddedAdapters, PaddedPlain, plain_model
from benchmarks.subject import Subject
from benchmarks.turns import Measure
from service.engine.engine import LocalEngine
from service.engine.interface import AdapterKey, Entry

Texts: TypeAlias = Sequence[tuple[int, Encoding]]

PADDED = "padded transformers, one batch per adapter"
PADDED_PLAIN = "the same without prompts and heads"
LORA = "PEFT LoRA, adapter_names"

# By how much two orders of the same sums may move a score, or the share of a state's length.
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 0.1}
_CHECKED = 8


class Rivals:
    """Padded `transformers` and PEFT LoRA beside an engine.

    Args:
        store: where the keys' files are; a text's adapter is an index into `keys`.
        at_once: texts that a rival is given at a time: as many as are in flight in the engine.
        max_tokens: of a batch of PEFT's.
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
        self._keys, self._texts, self._at_once = keys, texts, at_once
        adapters = [load_adapter(store / key.name / f"{key.revision}.safetensors") for key in keys]
        plain = plain_model(subject.source, device=device, dtype=dtype)
        self._padded = PaddedAdapters(plain, adapters)
        self._padded_plain = PaddedPlain(plain)
        self._lora: MixedLora | None = None
        if installed():
            # A model of its own: PEFT puts its layers into it.
            model = plain_model(subject.source, device=device, dtype=dtype)
            self._lora = MixedLora(model, len(keys), max_tokens=max_tokens)

    def measures(self, seconds: float, checked: Mapping[str, float]) -> dict[str, Measure]:
        """Texts/s by name; each takes about `seconds`, or one turn of `at_once` texts if longer.

        Whoever failed the check is left out: timing them would say nothing.
        """
        found = {PADDED_PLAIN: self._measure(self._padded_plain.classify, seconds)}
        if checked[PADDED] <= self._tolerance:
            found = {PADDED: self._measure(self._padded.classify, seconds), **found}
        if self._lora is not None and checked[LORA] <= self._tolerance:
            found[LORA] = self._measure(self._lora.classify, seconds)
        return found

    def warm_up(self, seconds: float) -> None:
        """Give every rival all that it will be timed on, for so long at most: new shapes cost more
        than known ones."""
        rivals = [self._padded.classify, self._padded_plain.classify]
        if self._lora is not None:
            rivals.append(self._lora.classify)
        for classify in rivals:
            until = perf_counter() + seconds / len(rivals)
            for texts in self._all_turns():
                if perf_counter() < until:
                    classify(texts)
        synchronize(self._device)

    def left_out(self, checked: Mapping[str, float]) -> dict[str, str]:
        """Why a rival has no row, by its name."""
        found = {
            name: f"left out: differs by {difference:.2g} from what it must be"
            for name, difference in checked.items()
            if not difference <= self._tolerance
        }
        return found if self._lora is not None else found | {LORA: "left out: not installed"}

    async def check(self, engine: LocalEngine, costs: Sequence[int]) -> dict[str, float]:
        """How far rivals are from what they must compute, at most, by name.

        The padded one: from the engine's scores. A mixed LoRA batch: from what each row does alone,
        as a share of its state's length.
        """
        texts = self._texts[:_CHECKED]
        entries = [
            Entry(self._keys[adapter], encoding, cost)
            for (adapter, encoding), cost in zip(texts, costs, strict=False)
        ]
        completion = await engine.predict(entries)
        found = {
            PADDED: max(
                float(np.abs(row.scores - scores).max())
                for row, scores in zip(completion.rows, self._padded.classify(texts), strict=True)
            )
        }
        if self._lora is not None:
            mixed, alone = self._lora.classify(texts), map(self._lora.alone, texts)
            found[LORA] = max(
                float((some - other).norm() / other.norm())
                for some, other in zip(mixed, alone, strict=True)
            )
        return found

    def _measure(self, classify: Callable[[Texts], object], seconds: float) -> Measure:
        turns = cycle(self._all_turns())

        async def measure() -> float:
            done, begun = 0, perf_counter()
            while done == 0 or perf_counter() - begun < seconds:
                texts = next(turns)
                classify(texts)
                done += len(texts)
            synchronize(self._device)
            return done / (perf_counter() - begun)

        return measure

    def _all_turns(self) -> list[Texts]:
        size = min(self._at_once, len(self._texts))
        last = len(self._texts) - size
        return [self._texts[start : start + size] for start in range(0, last + 1, size)]
