"""`fit --init-from`: start from another task's adapter: its generator, and its head if it fits."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from adapters.backbone.model import Backbone, check_fits
from adapters.errors import IncompatibleAdapter, InvalidAdapter
from adapters.format.files import Adapter, validate
from adapters.format.spec import AdapterSpec, AttentionPrompt
from train.config.settings import FitSettings, entries
from train.errors import SettingsError
from train.methods.idspam import Idspam

# Settings that an adapter has. The first ones decide the tensors' shapes.
SHAPE_SETTINGS = ("prompt_length", "bottleneck", "attention_size", "generator_pooling", "head")


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
        """The settings, with this adapter's backbone and switches where they are left open."""
        spec = self.adapter.spec
        values = _settings_of(spec) | {"backbone": spec.backbone.name}
        open_values = {name: value for name, value in values.items() if settings.is_open(name)}
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
        for name in SHAPE_SETTINGS:
            own, requested = _settings_of(spec)[name], getattr(settings, name)
            if own != requested:
                faults.append(f"{flags[name]} {requested}: its is {own}")
        if faults:
            raise SettingsError([f"--init-from {self.path}: {'; '.join(faults)}"])

    def copy_into(self, method: Idspam) -> str:
        """Replace the initial weights; returns a line that says which ones."""
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
        method.restore(method.snapshot() | tensors)
        difference = "the labels differ" if same_kind else "it has another kind of answer"
        copied = "generator and head" if same else f"generator; {difference}: a new head"
        return f"starting from {self.path}: its {copied}"


def _settings_of(spec: AdapterSpec) -> dict[str, Any]:
    """The settings that an adapter was made with, by their names."""
    prompt = spec.prompt
    assert isinstance(prompt, AttentionPrompt)
    return {
        "prompt_length": prompt.length,
        "bottleneck": prompt.bottleneck,
        "attention_size": prompt.attention_size,
        "generator_pooling": prompt.pooling,
        "head": spec.head.kind,
        "insertion_layer": prompt.layer,
        "generator_input": prompt.source,
        "final_activation": prompt.final_activation,
        "pooling": spec.head.pooling,
        "max_length": spec.max_length,
    }


def _reorder_head(tensors: dict[str, Tensor], order: Sequence[int]) -> dict[str, Tensor]:
    """The head's last layer, with the labels in another order."""
    index = torch.tensor(order)
    names = ("head.out.weight", "head.out.bias")
    return {name: tensors[name].index_select(-1, index) for name in names}
