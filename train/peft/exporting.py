"""From a LoRA adapter to a folder that PEFT loads."""

import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import save_file
from torch import Tensor

from adapters.backbone.loading import (
    DEFAULT_BACKBONE,
    DEFAULT_HUB_NAME,
    DEFAULT_HUB_REVISION,
    load_backbone,
    locate,
)
from adapters.backbone.model import Backbone, check_fits
from adapters.format.files import load_adapter
from adapters.format.spec import AdapterSpec, LoraTuning, Pooling, Site
from train.errors import OutputError, PeftError
from train.peft.check import check_scores
from train.peft.folder import WEIGHTS_FILE, read_folder
from train.peft.head_layers import head_layers
from train.peft.names import NAMES, Names
from train.peft.readme import readme
from train.peft.saved import load

_PREFIX = "base_model.model"


@dataclass(frozen=True, slots=True)
class Exported:
    """The spec of an adapter, and the largest difference of PEFT's scores from the service's."""

    spec: AdapterSpec
    difference: float


def export_peft(path: Path, folder: Path, *, backbone: str | None = None) -> Exported:
    """Write a LoRA adapter as PEFT's `save_pretrained` would.

    The folder is written whole or not at all.

    Args:
        folder: must not exist, or be empty.
        backbone: default: the name that the adapter was trained with.

    Raises:
        PeftError: PEFT cannot express the adapter.
        OutputError: the folder is not empty, or cannot be made.
        InvalidAdapter, IncompatibleAdapter, UnusableBackbone: as for serving.
    """
    _check_empty(folder)
    adapter = load_adapter(path)
    tuning = _expressible(adapter.spec, path)
    host = load_backbone(backbone or adapter.spec.backbone.name, device="cpu")
    check_fits(adapter.spec, host)
    _check_pooling(adapter.spec, host, path)
    names = NAMES[host.model_type]
    tensors = {name: tensor.float() for name, tensor in adapter.tensors.items()}
    weights, ranks = _lora_weights(tensors, tuning, names)
    weights |= head_layers(adapter.spec, tensors, names, host, path)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as scratch:
        made = Path(scratch) / folder.name
        made.mkdir()
        save_file(
            {f"{_PREFIX}.{name}": tensor.contiguous() for name, tensor in weights.items()},
            made / WEIGHTS_FILE,
            metadata={"format": "pt"},
        )
        config = _config(tuning, names, ranks, host)
        config.save_pretrained(str(made))
        (made / "README.md").write_text(readme(adapter.spec, config, host), "utf-8")
        difference = check_scores(adapter, host, load(read_folder(made), host))
        if folder.exists():
            folder.rmdir()
        os.replace(made, folder)
    return Exported(adapter.spec, difference)


def _check_empty(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise OutputError(f"{folder}: exists already; name a new or an empty folder")
    if not folder.absolute().parent.is_dir():
        raise OutputError(f"{folder}: there is no folder {folder.parent}")


def _expressible(spec: AdapterSpec, path: Path) -> LoraTuning:
    """
    Raises:
        PeftError: PEFT has no LoRA model that does the same.
    """
    faults = []
    if spec.prompt is not None:
        faults.append(f"it has a prompt ({spec.prompt.kind}), and PEFT has one beside no LoRA")
    if not isinstance(spec.tuning, LoraTuning):
        kind = "none" if spec.tuning is None else spec.tuning.kind
        faults.append(f"its tuning is {kind}; only LoRA can be exported")
    if faults:
        raise PeftError(f"{path}: PEFT cannot express this adapter: {'; '.join(faults)}")
    assert isinstance(spec.tuning, LoraTuning)
    return spec.tuning


def _check_pooling(spec: AdapterSpec, host: Backbone, path: Path) -> None:
    same = (
        (Pooling.ANSWER, Pooling.BEFORE_LAST)
        if host.family.causal
        else (Pooling.ANSWER, Pooling.FIRST)
    )
    if spec.head.pooling not in same:
        raise PeftError(
            f"{path}: PEFT cannot express this adapter: its head reads {spec.head.pooling}, that "
            f"of a {host.model_type} {'the last' if host.family.causal else 'the first'} token"
        )


def _lora_weights(
    tensors: Mapping[str, Tensor], tuning: LoraTuning, names: Names
) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Weights by name, and the rank of every changed module of a layer.

    Joined queries, keys and values have one A here: that of all three if it is the same, else
    theirs one below the other, which takes as many times the rank.
    """
    weights: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for module, sites in names.sites.items():
        tuned = [site for site in sites if site in tuning.sites]
        for depth in range(tuning.depth if tuned else 0):
            pairs = {
                site: (tensors[f"tuning.{site}.a"][depth], tensors[f"tuning.{site}.b"][depth])
                for site in tuned
            }
            a, b = _joined(pairs, sites)
            name = f"{names.layers}.{tuning.layers[0] + depth}.{module}"
            weights |= {f"{name}.lora_A.weight": a.T, f"{name}.lora_B.weight": b.T}
            ranks[module] = max(ranks.get(module, 0), a.shape[1])
    # One layer may share A where another does not.
    for name, tensor in weights.items():
        *_, last, _ = name.split(".")
        module = next(module for module in ranks if f".{module}.lora_" in name)
        short = ranks[module] - tensor.shape[0 if last == "lora_A" else 1]
        padding = (0, 0, 0, short) if last == "lora_A" else (0, short)
        weights[name] = torch.nn.functional.pad(tensor, padding)
    return weights, ranks


def _joined(
    pairs: Mapping[Site, tuple[Tensor, Tensor]], sites: tuple[Site, ...]
) -> tuple[Tensor, Tensor]:
    """A [inputs, rank] and B [rank, outputs of all sites]."""
    (first, b), *others = pairs.values()
    if len(sites) == 1:
        return first, b
    nothing = torch.zeros_like(b)
    if all(torch.equal(first, a) for a, _ in others):
        parts = [pairs[site][1] if site in pairs else nothing for site in sites]
        return first, torch.cat(parts, dim=1)
    rows = [
        torch.cat([own if each is site else nothing for each in sites], dim=1)
        for site, (_, own) in pairs.items()
    ]
    return torch.cat([a for a, _ in pairs.values()], dim=1), torch.cat(rows)


def _config(tuning: LoraTuning, names: Names, ranks: Mapping[str, int], host: Backbone) -> Any:
    first, end = tuning.layers
    rank = min(ranks.values())
    others = {module: each for module, each in ranks.items() if each != rank}
    # A short name means every module whose name ends with it.
    ambiguous = any(
        other not in ranks and other.endswith(f".{module}")
        for module in ranks
        for other in names.sites
    )
    layers: dict[str, Any] = {"target_modules": sorted(ranks)}
    if ambiguous:
        layers["target_modules"] = [
            f"{names.layers}.{layer}.{module}" for layer in range(first, end) for module in ranks
        ]
    elif end - first < host.layers:
        layers |= {
            "layers_to_transform": list(range(first, end)),
            "layers_pattern": names.layer_list,
        }
    name, revision = _published(host)
    return peft.LoraConfig(
        task_type=peft.TaskType.SEQ_CLS,
        base_model_name_or_path=name,
        revision=revision,
        inference_mode=True,
        r=rank,
        lora_alpha=_alpha(tuning.scaling, rank),
        rank_pattern=others,
        alpha_pattern={module: _alpha(tuning.scaling, each) for module, each in others.items()},
        fan_in_fan_out=any(len(sites) > 1 for sites in names.sites.values()),
        modules_to_save=["classifier", "score", *names.other_head_modules],
        **layers,
    )


def _alpha(scaling: float, rank: int) -> Any:
    """PEFT divides it by the rank; a whole number is written as one."""
    alpha = scaling * rank
    return int(alpha) if alpha.is_integer() else alpha


def _published(host: Backbone) -> tuple[str, str | None]:
    """Under which name others find the base model."""
    if host.identity.name == DEFAULT_BACKBONE:
        return DEFAULT_HUB_NAME, DEFAULT_HUB_REVISION
    return locate(host.identity.name)
