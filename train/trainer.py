"""`fit`: from data sets to an adapter file and its figures.

    data -> encodings -> TrunkCache -> Loop -> temperature -> storage type -> file -> FitReport

Knows no command line.
"""

import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from adapters import __version__
from adapters.adapter import Adapter
from adapters.backbone import Backbone
from adapters.files import save_adapter
from adapters.head import scores
from adapters.loading import DEFAULT_BACKBONE, load_backbone
from adapters.spec import AdapterSpec, Calibration, Provenance
from adapters.tokenizer import Encoding
from train.baselines import head_only, majority
from train.cache import TrunkCache
from train.data import Dataset, check_same_task, check_trainable, split_validation
from train.defaults import recipe_of, spec_of
from train.loop import Loop, Recipe, Split
from train.metrics import measure
from train.module import AdapterModule
from train.progress import Progress
from train.report import DataReport, FitReport, Metrics
from train.settings import FitSettings, StorageType
from train.state import state_path

# float16 on disk is taken where no probability moves further than this and no label changes.
STORAGE_BOUND = 2e-3


def fit(
    train: Dataset,
    validation: Dataset | None,
    test: Dataset | None,
    settings: FitSettings,
    output: Path,
    progress: Progress,
) -> FitReport:
    """Train one adapter and write it to `output`.

    Without `validation`, a stratified share of `train` is held out. The file is written once, at
    the end; until then the run's state lies beside it, for `settings.resume`.

    Raises:
        TrainingError: unusable data or settings, a loss that is not finite, no state to resume.
        AdapterError: the backbone cannot be loaded or run.
    """
    started = time.perf_counter()
    check_trainable(train)
    if validation is None and settings.validation_fraction > 0:
        train, validation = split_validation(
            train, fraction=settings.validation_fraction, seed=settings.seed
        )
    sets = {"train": train} | {
        name: found
        for name, found in (("validation", validation), ("test", test))
        if found is not None
    }
    for found in (validation, test):
        if found is not None:
            check_same_task(train, found)
    backbone = load_backbone(
        settings.backbone or DEFAULT_BACKBONE, device=settings.device, dtype=settings.dtype
    )
    spec = spec_of(settings, backbone, train.labels)
    recipe = recipe_of(settings, rows=len(train))
    splits, cache_seconds = _cached(sets, backbone, spec, settings, progress)
    module = AdapterModule(spec, generator=torch.Generator().manual_seed(settings.seed))
    loop = Loop(
        backbone,
        module.to(backbone.device),
        recipe,
        train=splits["train"],
        validation=splits.get("validation"),
        state_file=state_path(output),
        run=_run_identity(sets, spec, recipe),
    )
    if settings.resume:
        loop.resume()
    loop.fit(progress)
    logits = {name: loop.logits(split) for name, split in splits.items() if name != "train"}
    classes = {name: split.classes for name, split in splits.items()}
    temperature = _temperature(logits, classes) if settings.calibration else 1.0
    adapter, logits = _stored(loop, module, splits, logits, settings.storage_dtype, temperature)
    measured = {name: _measure(logits[name], classes[name]) for name in logits}
    adapter = replace(adapter, spec=_finished(adapter.spec, sets, measured, temperature, settings))
    progress.note("training the head-only control")
    controls = head_only(
        backbone,
        {name: split.cache for name, split in splits.items()},
        classes,
        labels=len(spec.labels),
    )
    save_adapter(output, adapter)
    state_path(output).unlink(missing_ok=True)
    cache = splits["train"].cache
    for split in splits.values():
        split.cache.close()
    history = loop.state.history
    return FitReport(
        output=str(output),
        validation=measured.get("validation"),
        test=measured.get("test"),
        majority=majority(
            classes["train"], {name: classes[name] for name in logits}, labels=len(spec.labels)
        ),
        head_only=controls,
        trainable_parameters=sum(tensor.numel() for tensor in module.parameters()),
        seconds=time.perf_counter() - started,
        seconds_per_epoch=sum(epoch.seconds for epoch in history) / len(history),
        epochs=tuple(history),
        best_epoch=loop.state.best_epoch,
        temperature=temperature,
        settings=_resolved(settings, backbone, spec, recipe, adapter),
        data={name: DataReport.of(found) for name, found in sets.items()},
        cache={"mode": cache.place, "bytes": cache.nbytes, "seconds": round(cache_seconds, 3)},
        command=settings.command,
    )


def _cached(
    sets: Mapping[str, Dataset],
    backbone: Backbone,
    spec: AdapterSpec,
    settings: FitSettings,
    progress: Progress,
) -> tuple[dict[str, Split], float]:
    started = time.perf_counter()
    splits = {
        name: Split(
            TrunkCache(
                backbone,
                encode(backbone, found, spec.max_length),
                spec,
                place=settings.cache.value,
            ),
            classes_of(found, spec.labels),
        )
        for name, found in sets.items()
    }
    progress.begin("layers below the prompt", texts=sum(len(found) for found in sets.values()))
    for split in splits.values():
        for done in split.cache.fill():
            progress.advance(done)
    return splits, time.perf_counter() - started


def encode(backbone: Backbone, data: Dataset, max_length: int) -> list[Encoding]:
    """Token ids of every example, cut to `max_length`."""
    texts = [(example.text, example.text_pair) for example in data.examples]
    return backbone.encoder.encode_batch(texts, max_length=max_length)


def classes_of(data: Dataset, labels: tuple[str, ...]) -> Tensor:
    """int64 [examples]: where each label stands among `labels`."""
    index = {label: position for position, label in enumerate(labels)}
    return torch.tensor([index[example.label] for example in data.examples])


def _measure(logits: Tensor, classes: Tensor) -> Metrics:
    return measure(logits.argmax(dim=-1), classes, labels=logits.shape[1])


def _temperature(logits: Mapping[str, Tensor], classes: Mapping[str, Tensor]) -> float:
    """What minimises cross-entropy on the validation rows (Guo et al. 2017), from 1/8 to 8."""
    if "validation" not in logits:
        return 1.0

    def loss(temperature: float) -> float:
        scaled = logits["validation"] / temperature
        return float(functional.cross_entropy(scaled, classes["validation"]))

    return float(min(torch.logspace(-3, 3, 121, base=2).tolist(), key=loss))


def _stored(
    loop: Loop,
    module: AdapterModule,
    splits: Mapping[str, Split],
    logits: dict[str, Tensor],
    storage: StorageType,
    temperature: float,
) -> tuple[Adapter, dict[str, Tensor]]:
    """The adapter in the type that it is stored in, and the logits of exactly those weights."""
    wide = module.adapter(module.spec)
    if storage is StorageType.FLOAT32:
        return wide, logits
    narrow = module.adapter(module.spec, dtype=torch.float16)
    module.restore({name: tensor.float() for name, tensor in narrow.tensors.items()})
    rounded = {name: loop.logits(splits[name]) for name in logits}
    if storage is StorageType.FLOAT16 or _is_same(logits, rounded, temperature):
        return narrow, rounded
    module.restore(wide.tensors)
    return wide, logits


def _is_same(
    exact: Mapping[str, Tensor], rounded: Mapping[str, Tensor], temperature: float
) -> bool:
    if not exact:
        return False
    pairs = [(exact[name], rounded[name]) for name in exact]
    moved = max(
        float((scores(a, "softmax", temperature) - scores(b, "softmax", temperature)).abs().max())
        for a, b in pairs
    )
    return moved <= STORAGE_BOUND and all(torch.equal(a.argmax(-1), b.argmax(-1)) for a, b in pairs)


def _finished(
    spec: AdapterSpec,
    sets: Mapping[str, Dataset],
    measured: Mapping[str, Metrics],
    temperature: float,
    settings: FitSettings,
) -> AdapterSpec:
    """The spec with what only the finished run knows."""
    metrics = {
        f"{split}_{name}": round(value, 6)
        for split, found in measured.items()
        for name, value in asdict(found).items()
    }
    provenance = Provenance(
        data=settings.data_name or Path(sets["train"].source).name,
        data_sha256=sets["train"].sha256,
        data_licence=settings.data_licence,
        command=settings.command,
        code_version=__version__,
        created=datetime.now(UTC).replace(microsecond=0).isoformat(),
        metrics=metrics,
    )
    return spec.model_copy(
        update={"calibration": Calibration(temperature=temperature), "provenance": provenance}
    )


def _run_identity(sets: Mapping[str, Dataset], spec: AdapterSpec, recipe: Recipe) -> str:
    parts = {
        "data": {name: [found.sha256, len(found)] for name, found in sets.items()},
        "spec": spec.model_dump(mode="json"),
        "recipe": asdict(recipe),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _resolved(
    settings: FitSettings, backbone: Backbone, spec: AdapterSpec, recipe: Recipe, adapter: Adapter
) -> dict[str, Any]:
    """The settings with everything filled in that was left open."""
    values = asdict(settings)
    chosen = asdict(recipe) | spec.model_dump(mode="json", exclude={"calibration", "backbone"})
    values |= {name: value for name, value in chosen.items() if name in values}
    stored = next(iter(adapter.tensors.values())).dtype
    return values | {
        "backbone": backbone.identity.name,
        "device": str(backbone.device),
        "dtype": str(backbone.dtype).removeprefix("torch."),
        "storage_dtype": str(stored).removeprefix("torch."),
    }
