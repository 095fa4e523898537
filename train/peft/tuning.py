"""What LoRA and IA3 change in the layers, as an adapter's tuning."""

from collections.abc import Iterable
from typing import Any, TypeAlias

import torch
from peft.tuners.ia3 import layer as ia3
from peft.tuners.lora import layer as lora
from torch import Tensor

from adapters.backbone.model import Backbone
from adapters.format.spec import MOST_RANK, LoraTuning, Site, VectorTuning
from train.peft.saved import ADAPTER, SavedModel

Tensors: TypeAlias = dict[str, Tensor]


def lora_tuning(saved: SavedModel, backbone: Backbone) -> tuple[LoraTuning, Tensors] | None:
    """Of a LoRA model: one rank and one scaling for all, smaller matrices filled up with zeros.

    None: it changes the head alone.

    Raises:
        PeftError: it changes other modules, or its rank is above `MOST_RANK`.
    """
    pairs: dict[tuple[int, Site], tuple[Tensor, Tensor]] = {}
    scalings: dict[tuple[int, Site], float] = {}
    for layer, name, module in _places(saved):
        if not saved.is_exactly(module, lora.Linear):
            raise saved.folder.fault(f"{name}: a {type(module).__name__} is not a linear layer")
        sites = saved.names.sites[name]
        # A is shared by joined queries, keys and values.
        a = module.lora_A[ADAPTER].weight.detach().T
        for site, b in zip(
            sites, module.lora_B[ADAPTER].weight.detach().chunk(len(sites)), strict=True
        ):
            pairs[layer, site] = a, b.T
            scalings[layer, site] = float(module.scaling[ADAPTER])
    if not pairs:
        return None
    first, end = _range(layer for layer, _ in pairs)
    rank = max(a.shape[1] for a, _ in pairs.values())
    if rank > MOST_RANK:
        raise saved.folder.fault(f"rank {rank}; at most {MOST_RANK} can be served")
    common = max(scalings.values())
    scaling = common if 0.0 < common <= 1e6 else 1.0
    tuning = LoraTuning(
        layers=(first, end),
        intermediate_size=backbone.intermediate_size,
        rank=rank,
        scaling=scaling,
        sites=tuple(site for site in Site if any(each == site for _, each in pairs)),
    )
    tensors = {
        name: torch.zeros(shape) for name, shape in tuning.shapes(backbone.hidden_size).items()
    }
    for (layer, site), (a, b) in pairs.items():
        own, at = a.shape[1], layer - first
        tensors[f"tuning.{site}.a"][at, :, :own] = a
        tensors[f"tuning.{site}.b"][at, :own] = b * (scalings[layer, site] / scaling)
    return tuning, tensors


def ia3_tuning(saved: SavedModel, backbone: Backbone) -> tuple[VectorTuning, Tensors] | None:
    """Of an IA3 model: y (1 + s) with 1 + s = PEFT's vector.

    None: it changes the head alone.

    Attention's output is a weighted sum of values, entry by entry. So a scale of what goes into
    `dense` is one of what comes out of `value`.

    Raises:
        PeftError: it changes other modules, or scales what vectors here cannot.
    """
    scales: dict[tuple[int, Site], Tensor] = {}
    for layer, name, module in _places(saved):
        if not saved.is_exactly(module, ia3.Linear):
            raise saved.folder.fault(f"{name}: a {type(module).__name__} is not a linear layer")
        vector = module.ia3_l[ADAPTER].detach().flatten()
        sites = saved.names.sites[name]
        for site, part in zip(
            sites, vector.chunk(1 if module.is_feedforward else len(sites)), strict=False
        ):
            if (target := _scaled(site, inputs=bool(module.is_feedforward))) is None:
                side = "input" if module.is_feedforward else "output"
                raise saved.folder.fault(f"IA3 scales the {side} of {name}, which vectors cannot")
            scales[layer, target] = scales.get((layer, target), torch.ones(())) * part
    if not scales:
        return None
    first, end = _range(layer for layer, _ in scales)
    tuning = VectorTuning(
        layers=(first, end),
        intermediate_size=backbone.intermediate_size,
        activated=any(site is Site.ACTIVATED for _, site in scales),
    )
    n, f = backbone.hidden_size, backbone.intermediate_size
    tensors = {name: torch.zeros(shape) for name, shape in tuning.shapes(n).items()}
    starts = {Site.QUERY: 0, Site.KEY: n, Site.VALUE: 2 * n, Site.UP: 3 * n}
    for (layer, site), scale in scales.items():
        if site is Site.ACTIVATED:
            tensors["tuning.activated"][layer - first] = scale - 1
        else:
            width = f if site is Site.UP else n
            at = starts[site]
            tensors["tuning.scale"][layer - first, at : at + width] = scale - 1
    return tuning, tensors


def _scaled(site: Site, *, inputs: bool) -> Site | None:
    """Where a vector has the effect of a scale of a linear map's inputs or outputs."""
    if inputs:
        return {Site.DENSE: Site.VALUE, Site.DOWN: Site.ACTIVATED}.get(site)
    return site if site in (Site.QUERY, Site.KEY, Site.VALUE, Site.UP) else None


def _places(saved: SavedModel) -> list[tuple[int, str, Any]]:
    """Layer, name and module of every change in the layers."""
    found: list[tuple[int, str, Any]] = []
    for name, module in saved.changed.items():
        if (place := saved.names.place(name)) is not None:
            found.append((*place, module))
        elif name not in saved.names.head:
            raise saved.folder.fault(
                f"changes {name}, which is neither in a layer nor part of the head: all adapters "
                "share it"
            )
    return found


def _range(layers: Iterable[int]) -> tuple[int, int]:
    tuned = set(layers)
    return min(tuned), max(tuned) + 1
