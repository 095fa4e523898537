"""`fit --init-from`: start from another task's adapter: its prompt and tuning, and its head if it
fits."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from adapters.backbone.model import Backbone, check_fits
from adapters.errors import IncompatibleAdapter, InvalidAdapter
from adapters.format.files import Adapter, validate
from adapters.format.spec import (
    AdapterSpec,
    AttentionPrompt,
    GeneratorPooling,
    HeadKind,
    HiddenActivation,
    LoraTuning,
    StaticPrompt,
    VectorTuning,
)
from train.config.defaults import foreign_settings, method_of
from train.config.settings import FitSettings, MethodName, entries, parse_sites
from train.errors import SettingsError
from train.methods.method import AdapterMethod

# Settings that an adapter has. The first ones decide the tensors' shapes.
SHAPE_SETTINGS = (
    "prompt_length",
    "bottleneck",
    "attention_size",
    "generator_pooling",
    "tuned_layers",
    "rank",
    "sites",
    "head",
)


@dataclass(frozen=True, slots=True)
class InitialAdapter:
    """An adapter file to start from. sha256: of its bytes."""

    path: str
    adapter: Adapter
    sha256: str

    @classmethod
    def read(cls, path: str) -> Self:
        """
        Raises:
            SettingsError: there is no valid adapter file at `path`.
        """
        try:
            data = Path(path).read_bytes()
            return cls(path, validate(data), hashlib.sha256(data).hexdigest())
        except OSError as error:
            raise SettingsError([f"--init-from {path}: {error.strerror}"]) from None
        except InvalidAdapter as error:
            raise SettingsError([f"--init-from {path}: {error}"]) from None

    def fill_in(self, settings: FitSettings) -> FitSettings:
        """The settings, with this adapter's backbone, method and switches where they are left open.

        Raises:
            SettingsError: it has a part that the method does not train, or that no method does.
        """
        spec = self.adapter.spec
        own = _method_of(spec)
        if own is None:
            raise SettingsError([f"--init-from {self.path}: no method trains {_described(spec)}"])
        if settings.is_open("method") and settings.is_open("preset"):
            settings = replace(settings, method=own)
        method = method_of(settings)
        parts, trained = _PARTS[own], _PARTS.get(method, _PARTS[own])
        if any(part not in (None, other) for part, other in zip(parts, trained, strict=True)):
            raise SettingsError([f"--init-from {self.path}: --method {method}: its is {own}"])
        foreign = foreign_settings(method)
        values = _settings_of(spec) | {"backbone": spec.backbone.name}
        open_values = {
            name: value
            for name, value in values.items()
            if name not in foreign and settings.is_open(name)
        }
        return replace(settings, **open_values)

    def check(self, settings: FitSettings, backbone: Backbone) -> None:
        """
        Args:
            settings: as returned by `fill_in`.

        Raises:
            SettingsError: lists every difference because of which the tensors cannot be used.
        """
        spec = self.adapter.spec
        faults: list[str] = []
        try:
            check_fits(spec, backbone)
        except IncompatibleAdapter as error:
            faults += error.faults
        flags = {entry.name: entry.flag for entry in entries()}
        values, foreign = _settings_of(spec), foreign_settings(method_of(settings))
        for name in SHAPE_SETTINGS:
            if name not in values or name in foreign:
                continue
            own, requested = values[name], getattr(settings, name)
            if name == "sites":
                requested = ",".join(parse_sites(requested))
            if own != requested:
                faults.append(f"{flags[name]} {requested}: its is {own}")
        if faults:
            raise SettingsError([f"--init-from {self.path}: {'; '.join(faults)}"])

    def copy_into(self, method: AdapterMethod) -> str:
        """Replace the initial weights; returns a line that says which ones.

        Raises:
            SettingsError: a tensor has another shape than the method's.
        """
        labels, own_labels = method.spec.labels, self.adapter.spec.labels
        same_kind = method.spec.activation == self.adapter.spec.activation
        same = same_kind and set(labels) == set(own_labels)
        tensors = {
            name: tensor.float()
            for name, tensor in self.adapter.tensors.items()
            if same or not name.startswith("head.")
        }
        if same:
            tensors |= _reorder_head(tensors, [own_labels.index(label) for label in labels])
        faults = [
            f"{name} {list(tensor.shape)}: the method's is {list(method.tensors[name].shape)}"
            for name, tensor in tensors.items()
            if tensor.shape != method.tensors[name].shape
        ]
        if faults:
            raise SettingsError([f"--init-from {self.path}: {'; '.join(faults)}"])
        method.restore(method.snapshot() | tensors)
        difference = "the labels differ" if same_kind else "it has another kind of answer"
        *others, last = [*_parts_in_words(self.adapter.spec), *(["head"] if same else [])] or [""]
        copied = f"{', '.join(others)} and {last}" if others else last
        if not same:
            copied = (
                f"{copied}; {difference}: a new head" if copied else f"{difference}: a new head"
            )
        return f"starting from {self.path}: its {copied}" if copied else ""


# The kinds of prompt and tuning that a method trains.
_PARTS: Mapping[MethodName, tuple[str | None, str | None]] = {
    MethodName.IDSPAM: ("attention", None),
    MethodName.IDSPAM_VECTORS: ("attention", "vectors"),
    MethodName.VECTORS: (None, "vectors"),
    MethodName.LORA: (None, "lora"),
    MethodName.HEAD_ONLY: (None, None),
    MethodName.PROMPT_TUNING: ("static", None),
    # Of its network an adapter holds only the result.
    MethodName.P_TUNING: ("network", None),
    MethodName.SMOP: ("routed", None),
    MethodName.LPT: ("first-token", None),
    MethodName.DEPT: ("table", None),
}


def _method_of(spec: AdapterSpec) -> MethodName | None:
    """The method that trains such adapters, if one does."""
    prompt, tuning, head = spec.prompt, spec.tuning, spec.head
    kind: str | None = None if prompt is None else prompt.kind
    if isinstance(prompt, StaticPrompt):
        if prompt.shifts_text or prompt.layer:
            return None
        kind = "static" if prompt.table is None else "table"
    if isinstance(tuning, VectorTuning) and tuning.activated:
        return None
    if head.kind is HeadKind.MLP and head.hidden is not HiddenActivation.TANH:
        return None
    parts = (kind, None if tuning is None else tuning.kind)
    return next((method for method, own in _PARTS.items() if own == parts), None)


def _described(spec: AdapterSpec) -> str:
    parts = [part.kind for part in (spec.prompt, spec.tuning) if part is not None]
    return f"this kind of adapter ({' and '.join([*parts, spec.head.kind])} head)"


def _parts_in_words(spec: AdapterSpec) -> list[str]:
    words = {"static": "prompt", "vectors": "vectors", "lora": "matrices"}
    return [
        words.get(part.kind, "generator") for part in (spec.prompt, spec.tuning) if part is not None
    ]


def _settings_of(spec: AdapterSpec) -> dict[str, Any]:
    """The settings that an adapter was made with, by their names."""
    prompt, tuning = spec.prompt, spec.tuning
    values: dict[str, Any] = {
        "head": spec.head.kind,
        "pooling": spec.head.pooling,
        "max_length": spec.max_length,
    }
    if prompt is not None:
        values |= {"prompt_length": prompt.length, "insertion_layer": prompt.layer}
    if isinstance(prompt, AttentionPrompt):
        values |= {
            "bottleneck": prompt.bottleneck,
            "generator_pooling": prompt.pooling,
            "generator_input": prompt.source,
            "final_activation": prompt.final_activation,
        }
        if prompt.pooling is GeneratorPooling.ATTENTION:
            values["attention_size"] = prompt.attention_size
    if tuning is not None:
        first, end = tuning.layers
        values["tuned_layers"] = f"{first}-{end - 1}"
    if isinstance(tuning, LoraTuning):
        values |= {
            "rank": tuning.rank,
            "alpha": tuning.rank * tuning.scaling,
            "sites": ",".join(tuning.sites),
        }
    return values


def _reorder_head(tensors: dict[str, Tensor], order: Sequence[int]) -> dict[str, Tensor]:
    """The head's last layer, with the labels in another order."""
    index = torch.tensor(order)
    names = ("head.out.weight", "head.out.bias")
    return {name: tensors[name].index_select(-1, index) for name in names}
