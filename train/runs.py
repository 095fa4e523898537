"""One method on one task for a comparison: weights are a means, the figures are what counts.

The best epoch is chosen on rows held out of the training data (`selection`); every other split is
measured once, at the end.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from adapters.backbone import Backbone
from adapters.durable import write_atomically
from train.baselines import majority
from train.data import Dataset
from train.defaults import settings_for
from train.errors import DataError
from train.memory import peak_memory, reset_peak
from train.methods import METHODS
from train.metrics import Metric
from train.progress import Progress
from train.report import EpochReport, Metrics
from train.settings import FitSettings
from train.training import Training, backbone_of, measured, set_up


@dataclass(frozen=True, slots=True)
class RunReport:
    """One run. metrics, majority: by split. peak_memory: bytes (`train.memory`). best_epoch: from
    1."""

    method: str
    seed: int
    metrics: Mapping[str, Metrics]
    majority: Mapping[str, Metrics]
    trainable_parameters: int
    seconds: float
    seconds_per_epoch: float
    peak_memory: int
    epochs: tuple[EpochReport, ...]
    best_epoch: int
    learning_rate: float

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """
        Raises:
            ValueError, KeyError, TypeError: not what `to_json` writes.
        """
        content: dict[str, Any] = json.loads(text)
        content["epochs"] = tuple(EpochReport(**epoch) for epoch in content["epochs"])
        for name in ("metrics", "majority"):
            content[name] = {key: Metrics(**found) for key, found in content[name].items()}
        return cls(**content)


class Backbones:
    """Loads a backbone once for all runs of a process that leave it as it is."""

    def __init__(self) -> None:
        self._kept: dict[tuple[object, ...], Backbone] = {}

    def take(self, settings: FitSettings, *, changed: bool) -> Backbone:
        """The settings' backbone. changed: whether it will not be the same afterwards."""
        key = (settings.backbone, settings.device, settings.dtype)
        backbone = self._kept.pop(key, None) or backbone_of(settings)
        if not changed:
            self._kept[key] = backbone
        return backbone


def run(
    method: str,
    sets: Mapping[str, Dataset],
    settings: FitSettings,
    *,
    metric: Metric,
    state: Path,
    progress: Progress,
    backbones: Backbones,
    initial: Path | None = None,
    weights: Path | None = None,
) -> RunReport:
    """Train and measure.

    Args:
        sets: `train`, `selection`, and whatever else is to be measured.
        state: where an interrupted run leaves what the next call goes on from.
        initial: trained tensors to start from, as `weights` has them.
        weights: where the trained tensors go, safetensors.

    Raises:
        TrainingError: unusable data or settings, a loss that is not finite.
        AdapterError: the backbone cannot be loaded or run.
    """
    kind = METHODS[method]
    settings = settings_for(method, settings)
    backbone = backbones.take(settings, changed=kind.changes_backbone)
    reset_peak(backbone.device)
    training = set_up(
        method,
        sets,
        replace(settings, resume=state.exists()),
        backbone,
        judge="selection",
        metric=metric,
        state_file=state,
        progress=progress,
    )
    try:
        if initial is not None and not state.exists():
            _start_from(training, initial)
        training.loop.fit(progress)
        report = _report(method, training)
        if weights is not None:
            write_atomically(weights, save(training.method.snapshot()))
    finally:
        training.close()
    state.unlink(missing_ok=True)
    return report


def _report(method: str, training: Training) -> RunReport:
    state, classes = training.loop.state, training.classes
    logits = training.logits()
    train = classes["train"]
    return RunReport(
        method=method,
        seed=training.recipe.seed,
        metrics=measured(logits, classes),
        majority=majority(
            train, {name: classes[name] for name in logits}, labels=len(training.labels)
        ),
        trainable_parameters=training.method.size,
        seconds=state.seconds,
        seconds_per_epoch=state.seconds / len(state.history),
        peak_memory=peak_memory(training.backbone.device),
        epochs=tuple(state.history),
        best_epoch=state.best_epoch,
        learning_rate=training.recipe.learning_rate,
    )


def _start_from(training: Training, path: Path) -> None:
    tensors: dict[str, Tensor] = load_file(path)
    wanted = {name: tuple(value.shape) for name, value in training.method.tensors.items()}
    if {name: tuple(value.shape) for name, value in tensors.items()} != wanted:
        raise DataError("tensors of another method, design or label count", source=path)
    with torch.no_grad():
        training.method.restore(tensors)
