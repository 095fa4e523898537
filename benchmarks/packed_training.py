"""An epoch of this project's own training: `train.loop.loop` over packed batches, as `fit` runs it."""

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional

from adapters.backbone.model import Backbone
from adapters.format.spec import GeneratorInput, Pooling
from benchmarks.epochs import MAX_TOKENS, PROMPT_LENGTH, SEED, Epoch, Work
from benchmarks.padded import PaddedAdapters, plain_model
from train.config.settings import CacheMode, FitSettings
from train.fit.training import Training, set_up
from train.loop.encoded_splits import Split, encode
from train.loop.loop import Loop
from train.loop.progress import Progress
from train.methods import METHODS
from train.methods.idspam import Idspam
from train.metrics import Metric

_SHORT = {"idspam": "ID-SPAM", "prompt-tuning": "prompt tuning", "lora": "LoRA"}
_KEPT = {CacheMode.MEMORY: "kept in memory", CacheMode.DISK: "kept on disk"}
# Enough for logits that are not all zero any more.
_CHECKED_EPOCHS, _CHECKED_BATCH, _CHECKED_RATE = 8, 4, 1e-2


@dataclass(frozen=True, slots=True)
class Packed:
    """A method of `train.methods`, and where it keeps the layers that no parameter reaches."""

    method: str
    cache: CacheMode = CacheMode.OFF

    @property
    def name(self) -> str:
        short = _SHORT[self.method]
        if self.method == "idspam":
            return f"{short}, {_KEPT.get(self.cache, 'uncached')}"
        return f"{short}, packed"

    @property
    def needs_its_own_backbone(self) -> bool:
        return METHODS[self.method].changes_backbone


class PackedTrainee:
    """Set up as `fit` does it; `seconds` is what tokenising and filling its cache took, once."""

    def __init__(self, work: Work, system: Packed, backbone: Backbone) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="idspam-training-")
        self._state = Path(self._folder.name) / "state"
        self._training = _set_up(
            work, _settings(work, system.cache), system.method, backbone, self._state
        )
        self.seconds = self._training.seconds

    @property
    def split(self) -> Split:
        """The rows as the loop takes them."""
        return self._training.splits["train"]

    def epoch(self) -> Epoch:
        """A run of one epoch that goes on with the weights of the last."""
        training = self._training
        loop = Loop(
            training.method,
            training.recipe,
            train=self.split,
            validation=None,
            state_file=self._state,
            run="benchmark",
        )
        # Before its first step it saves, which waits for the device as reading the losses does.
        loop.fit(Progress())
        (report,) = loop.state.history
        return Epoch(report.seconds, report.loss)

    def close(self) -> None:
        self._training.close()
        self._folder.cleanup()


def _settings(work: Work, cache: CacheMode) -> FitSettings:
    """The defaults of `fit`, but for what is the same for everybody."""
    return FitSettings(
        epochs=1,
        batch_size=work.batch_size,
        prompt_length=PROMPT_LENGTH,
        max_length=MAX_TOKENS,
        seed=SEED,
        cache=cache,
        device=work.device,
        dtype=work.dtype,
        validation_fraction=0.0,
    )


def losses_beside_plain(work: Work, backbone: Backbone) -> tuple[float, float]:
    """What these rows' loss is after some steps of ID-SPAM on them: by this project's packed
    batches, and by the unmodified model on padded ones, given the trained weights.

    Of the variant whose prompts come from hidden states and whose head reads [BOS]: the one that
    `benchmarks.padded` knows.
    """
    settings = replace(
        _settings(work, CacheMode.MEMORY),
        epochs=_CHECKED_EPOCHS,
        batch_size=_CHECKED_BATCH,
        learning_rate=_CHECKED_RATE,
        generator_input=GeneratorInput.HIDDEN,
        pooling=Pooling.ANSWER,
    )
    with tempfile.TemporaryDirectory(prefix="idspam-training-") as folder:
        training = _set_up(work, settings, "idspam", backbone, Path(folder) / "state")
        training.loop.fit(Progress())
        made = training.loop.logits(training.splits["train"])
        training.close()
    method, classes = training.method, training.classes["train"]
    assert isinstance(method, Idspam)
    plain = plain_model(work.source, device=backbone.device, dtype=backbone.dtype)
    padded = PaddedAdapters(plain, [method.adapter(method.spec)])
    encodings = encode(backbone, work.dataset(), MAX_TOKENS)
    scores = torch.from_numpy(np.stack(padded.classify([(0, item) for item in encodings])))
    return float(functional.cross_entropy(made, classes)), float(
        functional.nll_loss(scores.log(), classes)
    )


def _set_up(
    work: Work, settings: FitSettings, method: str, backbone: Backbone, state: Path
) -> Training:
    return set_up(
        method,
        {"train": work.dataset()},
        settings,
        backbone,
        judge="",
        metric=Metric.ACCURACY,
        state_file=state,
        progress=Progress(),
    )
