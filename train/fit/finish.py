"""The end of a `fit`: what is stored is measured and written, beside what needs no prompt.

    trained weights -> train.fit.export -> adapter file -> FitReport -> model card

Knows no backbone's name and no search.
"""

import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from adapters.format.files import Adapter, save_adapter
from adapters.format.spec import Calibration
from train.config.settings import FitSettings
from train.data.dataset import Dataset
from train.errors import TrainingError
from train.fit.export import provenance_of, stored, temperature_of
from train.fit.search import remove_search
from train.fit.training import Training, measured
from train.loop.checkpoint import state_path
from train.loop.progress import Progress
from train.metrics import Metrics, assess
from train.report.baselines import head_only, majority
from train.report.model_card import card_path, write_card
from train.report.report import Baseline, DataReport, FitReport, TrialReport


def finish(
    training: Training,
    settings: FitSettings,
    trials: tuple[TrialReport, ...],
    *,
    sets: Mapping[str, Dataset],
    output: Path,
    progress: Progress,
    started: float,
) -> FitReport:
    """Write a trained adapter and its card; what an interruption would have needed goes.

    Args:
        trials: of the search that chose the settings, if there was one.
        started: when the run began, on the clock of `time.perf_counter`.

    Raises:
        TrainingError: the weights answer with what is no number.
        OSError: a file cannot be written.
    """
    logits, classes = training.logits(), training.classes
    temperature = temperature_of(logits, classes) if settings.calibration else 1.0
    adapter, logits = stored(training, logits, settings.storage_dtype, temperature)
    _check_finite(logits)
    progress.note("training the head-only control")
    controls = _controls(training)
    found = measured(logits, classes)
    provenance = provenance_of(settings, sets["train"], found)
    calibration = Calibration(temperature=temperature)
    spec = adapter.spec.model_copy(update={"calibration": calibration, "provenance": provenance})
    if training.team.rank == 0:
        save_adapter(output, replace(adapter, spec=spec))
    state, cache = training.loop.state, training.splits["train"].cache
    report = FitReport(
        output=str(output),
        card=str(card_path(output)),
        validation=found.get("validation"),
        test=found.get("test"),
        majority=controls["majority"],
        head_only=controls["head_only"],
        trainable_parameters=training.method.size,
        seconds=time.perf_counter() - started,
        seconds_per_epoch=sum(epoch.seconds for epoch in state.history) / len(state.history),
        epochs=tuple(state.history),
        best_epoch=state.best_epoch,
        temperature=temperature,
        settings=_resolved(settings, training, adapter),
        data={name: DataReport.of(some) for name, some in sets.items()},
        cache={"mode": cache.place, "bytes": cache.nbytes, "seconds": round(training.seconds, 3)},
        assessments={
            name: assess(made, classes[name], training.labels, temperature=temperature)
            for name, made in logits.items()
        },
        trials=trials,
        command=settings.command,
    )
    if training.team.rank == 0:
        device, paired = training.backbone.device, sets["train"].paired
        write_card(output, report, spec, device=device, paired=paired)
        state_path(output).unlink(missing_ok=True)
        remove_search(output)
    return report


def _check_finite(logits: Mapping[str, Tensor]) -> None:
    for name, made in logits.items():
        if not bool(made.isfinite().all()):
            raise TrainingError(
                f"the trained weights answer some rows of {name} with what is no number; "
                "a lower --lr usually helps"
            )


def _controls(training: Training) -> dict[str, Baseline]:
    """What needs no prompt."""
    classes, labels = training.classes, len(training.labels)
    caches = {name: split.cache for name, split in training.splits.items()}
    others = {name: true for name, true in classes.items() if name != "train"}
    return {
        "majority": _baseline(majority(classes["train"], others, labels=labels)),
        "head_only": _baseline(head_only(training.backbone, caches, classes, labels=labels)),
    }


def _baseline(found: Mapping[str, Metrics]) -> Baseline:
    return Baseline(validation=found.get("validation"), test=found.get("test"))


def _resolved(settings: FitSettings, training: Training, adapter: Adapter) -> dict[str, Any]:
    """The settings with everything filled in that was left open."""
    values = asdict(settings)
    del values["given"]
    chosen = asdict(training.recipe) | asdict(training.design)
    values |= {name: value for name, value in chosen.items() if name in values}
    stored_as = next(iter(adapter.tensors.values())).dtype
    backbone = training.backbone
    return values | {
        "backbone": backbone.identity.name,
        "device": str(backbone.device),
        "processes": training.team.size,
        "dtype": str(backbone.dtype).removeprefix("torch."),
        "storage_dtype": str(stored_as).removeprefix("torch."),
    }
