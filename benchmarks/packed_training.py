"""An epoch of this project's training: `train.loop.loop` over packed batches, as in `fit`."""

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional

from adapters.backbone.model import Backbone
from adapters.format.spec import GeneratorInput, Pooling
from benchmarks.padded import PaddedAdapters, plain_model
from benchmarks.work import MAX_TOKENS, PROMPT_LENGTH, SEED, Epoch, Work
from train.config.settings import CacheMode, FitSettings
from train.fit.fit import Training, set_up
from train.loop.encoded_splits import Split, encode
from train.loop.graphs import recorder_for
from train.loop.loop import Loop
from train.loop.progress import Progress
from train.methods.method import AdapterMethod
from train.metrics import Metric

_SHORT = {
    "idspam": "ID-SPAM",
    "idspam+vectors": "ID-SPAM + vectors",
    "vectors": "vectors",
    "prompt-tuning": "prompt tuning",
    "lora": "LoRA",
}
_KEPT = {CacheMode.MEMORY: "kept in memory", CacheMode.DISK: "kept on disk"}
# Enough that the logits are no longer all zero.
_CHECKED_EPOCHS, _CHECKED_BATCH, _CHECKED_RATE = 8, 4, 1e-2


@dataclass(frozen=True, slots=True)
class Packed:
    """A method of `train.methods`, and where it caches the frozen layers' output.

    graphs: whether steps may run as CUDA graphs.
    """

    method: str
    cache: CacheMode = CacheMode.OFF
    graphs: bool = True

    @property
    def name(self) -> str:
        short = _SHORT[self.method]
        kind = _KEPT.get(self.cache, "uncached") if self.method == "idspam" else "packed"
        return f"{short}, {kind}" if self.graphs else f"{short}, {kind}, without graphs"


class PackedTrainee:
    """A training set up as in `fit`. seconds: tokenising and filling the cache, once."""

    def __init__(self, work: Work, system: Packed, backbone: Backbone) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="idspam-training-")
        state = Path(self._folder.name) / "state"
        training = _set_up(work, _settings(work, system), system.method, backbone, state)
        self._training, self.seconds = training, training.encoding_seconds
        method, recipe = training.method, training.recipe
        self._loop = Loop(
            method,
            recipe,
            train=self.split,
            validation=None,
            checkpoint_file=state,
            run="benchmark",
            recorder=recorder_for(method, recipe, None) if system.graphs else None,
        )
        self._epochs = 0

    @property
    def split(self) -> Split:
        """The rows that the loop trains on."""
        return self._training.splits["train"]

    def epoch(self) -> Epoch:
        """One epoch more of the same run."""
        self._epochs += 1
        loop = self._loop
        loop.recipe = replace(loop.recipe, epochs=self._epochs)
        # It reads the losses at the end, and so waits for the device.
        loop.fit(Progress())
        report = loop.checkpoint.history[-1]
        return Epoch(report.seconds, report.loss)

    def close(self) -> None:
        self._training.close()
        self._folder.cleanup()


def _settings(work: Work, system: Packed) -> FitSettings:
    """The defaults of `fit`, except what all systems share."""
    return FitSettings(
        epochs=1,
        batch_size=work.batch_size,
        # Vectors have a shorter prompt beside them.
        prompt_length=None if system.method == "idspam+vectors" else PROMPT_LENGTH,
        max_length=MAX_TOKENS,
        seed=SEED,
        cache=system.cache,
        device=work.device,
        dtype=work.dtype,
        validation_fraction=0.0,
    )


def losses_beside_plain(work: Work, backbone: Backbone) -> tuple[float, float]:
    """The loss of these rows after some steps of ID-SPAM on them, computed twice with the trained
    weights: by this project's packed batches, and by the unmodified model on padded batches.

    The variant is the one that `benchmarks.padded` has: prompts from hidden states, and a head that
    reads [BOS].
    """
    settings = replace(
        _settings(work, Packed("idspam", CacheMode.MEMORY)),
        epochs=_CHECKED_EPOCHS,
        batch_size=_CHECKED_BATCH,
        learning_rate=_CHECKED_RATE,
        generator_input=GeneratorInput.HIDDEN,
        pooling=Pooling.ANSWER,
    )
    with tempfile.TemporaryDirectory(prefix="idspam-training-") as folder:
        training = _set_up(work, settings, "idspam", backbone, Path(folder) / "state")
        training.loop.fit(Progress())
        logits = training.loop.logits(training.splits["train"])
        training.close()
    method, classes = training.method, training.classes["train"]
    assert isinstance(method, AdapterMethod)
    plain = plain_model(work.source, device=backbone.device, dtype=backbone.dtype)
    padded = PaddedAdapters(plain, [method.adapter(method.spec)])
    encodings = encode(backbone, work.dataset(), MAX_TOKENS)
    scores = torch.from_numpy(np.stack(padded.classify([(0, encoding) for encoding in encodings])))
    return float(functional.cross_entropy(logits, classes)), float(
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
        selection="",
        metric=Metric.ACCURACY,
        checkpoint_file=state,
        progress=Progress(),
    )
