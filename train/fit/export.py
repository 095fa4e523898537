"""What an adapter file needs besides the trained weights: storage type, provenance."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

import torch
from pydantic import ValidationError
from torch import Tensor

from adapters import __version__
from adapters.errors import with_escapes
from adapters.format.files import Adapter
from adapters.format.profile import Profile, Source
from adapters.format.spec import AdapterSpec, Provenance
from adapters.packed.head import scores
from adapters.profiles import profile_of
from train.config.settings import FitSettings, StorageType
from train.data.dataset import Dataset
from train.errors import SettingsError
from train.loop.encoded_splits import Split
from train.methods.method import AdapterMethod
from train.metrics import AnyMetrics

# The validation rows first: the test rows may be of another kind on purpose.
_HELD_OUT: tuple[Source, ...] = ("validation", "test")

# `auto` stores float16 if no probability moves further than this and no predicted label changes.
STORAGE_BOUND = 2e-3


def convert_for_storage(
    method: AdapterMethod,
    logits: dict[str, Tensor],
    storage: StorageType,
    temperature: float,
    thresholds: Sequence[float] | None,
    *,
    compute_logits: Callable[[], dict[str, Tensor]],
) -> tuple[Adapter, dict[str, Tensor]]:
    """The adapter in its storage type, and the logits of exactly those weights.

    Args:
        logits: of the float32 weights, by split.
        compute_logits: computes the logits of the method's current weights.
    """
    float32 = method.adapter(method.spec)
    if storage is StorageType.FLOAT32:
        return float32, logits
    float16 = method.adapter(method.spec, dtype=torch.float16)
    method.restore({name: tensor.float() for name, tensor in float16.tensors.items()})
    rounded = compute_logits()
    if storage is StorageType.FLOAT16 or _answers_alike(
        method, logits, rounded, temperature, thresholds
    ):
        return float16, rounded
    method.restore(float32.tensors)
    return float32, logits


def _answers_alike(
    method: AdapterMethod,
    exact: Mapping[str, Tensor],
    rounded: Mapping[str, Tensor],
    temperature: float,
    thresholds: Sequence[float] | None,
) -> bool:
    activation, objective = method.spec.activation, method.objective

    def alike(a: Tensor, b: Tensor) -> bool:
        moved = scores(a, activation, temperature) - scores(b, activation, temperature)
        answers = (
            objective.predict(each, thresholds=thresholds, temperature=temperature)
            for each in (a, b)
        )
        return float(moved.abs().max()) <= STORAGE_BOUND and torch.equal(*answers)

    return bool(exact) and all(alike(exact[name], rounded[name]) for name in exact)


def held_out_profile(
    spec: AdapterSpec,
    splits: Mapping[str, Split],
    logits: Mapping[str, Tensor],
    *,
    unknown_id: int | None,
) -> Profile | None:
    """What the adapter answers to rows that it was not trained on; None if there are none.

    Args:
        spec: with the temperature and the thresholds of the file.
        logits: by split, of the weights as they are stored.
    """
    name = next((name for name in _HELD_OUT if name in logits), None)
    if name is None:
        return None
    answers = scores(logits[name], spec.activation, spec.calibration.temperature).numpy()
    encodings = splits[name].cache.encodings
    return profile_of(
        spec,
        zip(answers, (encoding.input_ids for encoding in encodings), strict=True),
        unknown_id=unknown_id,
        source=name,
    )


def provenance_of(
    settings: FitSettings, train: Dataset, metrics: Mapping[str, AnyMetrics]
) -> Provenance:
    """Where an adapter made now comes from. metrics: by split.

    Raises:
        SettingsError: a name or command that an adapter file cannot hold.
    """
    try:
        return Provenance(
            data=settings.data_name or Path(train.source).name,
            data_sha256=train.sha256,
            data_licence=settings.data_licence,
            # A tab may be among its arguments: `--label-separator`.
            command=None if settings.command is None else with_escapes(settings.command),
            code_version=__version__,
            created=datetime.now(UTC).replace(microsecond=0).isoformat(),
            metrics={
                f"{split}_{name}": round(value, 6)
                for split, figures in metrics.items()
                for name, value in asdict(figures).items()
            },
        )
    except ValidationError as error:
        faults = [f"provenance, {fault['loc'][0]}: {fault['msg']}" for fault in error.errors()]
        raise SettingsError(faults) from None
