"""From trained weights to what is stored: temperature, type of the tensors, provenance.

Knows no data and no path.
"""

from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

import torch
from pydantic import ValidationError
from torch import Tensor
from torch.nn import functional

from adapters import __version__
from adapters.format.files import Adapter
from adapters.format.spec import Provenance
from adapters.packed.head import scores
from train.config.settings import FitSettings, StorageType
from train.data.dataset import Dataset
from train.errors import SettingsError
from train.fit.training import Training
from train.methods.idspam import Idspam
from train.metrics import Metrics

# float16 on disk is taken where no probability moves further than this and no label changes.
STORAGE_BOUND = 2e-3


def temperature_of(logits: Mapping[str, Tensor], classes: Mapping[str, Tensor]) -> float:
    """What minimises cross-entropy on the validation rows (Guo et al. 2017), from 1/8 to 8."""
    if "validation" not in logits:
        return 1.0

    def loss(temperature: float) -> float:
        scaled = logits["validation"] / temperature
        return float(functional.cross_entropy(scaled, classes["validation"]))

    return float(min(torch.logspace(-3, 3, 121, base=2).tolist(), key=loss))


def stored(
    training: Training, logits: dict[str, Tensor], storage: StorageType, temperature: float
) -> tuple[Adapter, dict[str, Tensor]]:
    """The adapter in the type that it is stored in, and the logits of exactly those weights."""
    method = training.method
    assert isinstance(method, Idspam)
    wide = method.adapter(method.spec)
    if storage is StorageType.FLOAT32:
        return wide, logits
    narrow = method.adapter(method.spec, dtype=torch.float16)
    method.restore({name: tensor.float() for name, tensor in narrow.tensors.items()})
    rounded = training.logits()
    if storage is StorageType.FLOAT16 or _is_same(logits, rounded, temperature):
        return narrow, rounded
    method.restore(wide.tensors)
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


def provenance_of(
    settings: FitSettings, train: Dataset, measured: Mapping[str, Metrics]
) -> Provenance:
    """Where an adapter comes from, as of now.

    Raises:
        SettingsError: a name or command that no adapter file can hold.
    """
    metrics = {
        f"{split}_{name}": round(value, 6)
        for split, found in measured.items()
        for name, value in asdict(found).items()
    }
    try:
        return Provenance(
            data=settings.data_name or Path(train.source).name,
            data_sha256=train.sha256,
            data_licence=settings.data_licence,
            command=settings.command,
            code_version=__version__,
            created=datetime.now(UTC).replace(microsecond=0).isoformat(),
            metrics=metrics,
        )
    except ValidationError as error:
        faults = [f"provenance, {item['loc'][0]}: {item['msg']}" for item in error.errors()]
        raise SettingsError(faults) from None
