"""An adapter that another one starts from: a related task's generator, and its head if it fits.

Knows no data.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from adapters.backbone.model import Backbone, check_fits
from adapters.errors import IncompatibleAdapter, InvalidAdapter
from adapters.format.files import Adapter, validate
from train.config.settings import FitSettings, entries
from train.errors import SettingsError
from train.methods.idspam import Idspam

# Switches of the spec that are settings as well. The first kind decides the tensors' shapes.
SHAPING = ("prompt_length", "bottleneck", "attention_size", "generator_pooling", "head")
OTHERS = ("insertion_layer", "generator_input", "final_activation", "pooling", "max_length")


@dataclass(frozen=True, slots=True)
class Initial:
    """An adapter file to start from. sha256: of its bytes."""

    path: str
    adapter: Adapter
    sha256: str

    @classmethod
    def read(cls, path: str) -> Self:
        """
        Raises:
            SettingsError: there is no adapter file at `path`; names every fault.
        """
        try:
            data = Path(path).read_bytes()
            return cls(path, validate(data), hashlib.sha256(data).hexdigest())
        except OSError as error:
            raise SettingsError([f"--init-from {path}: {error.strerror}"]) from None
        except InvalidAdapter as error:
            raise SettingsError([f"--init-from {path}: {error}"]) from None

    def completed(self, settings: FitSettings) -> FitSettings:
        """The settings with this adapter's backbone and switches where they are left open."""
        spec = self.adapter.spec
        wanted = {name: getattr(spec, name) for name in (*SHAPING, *OTHERS)}
        wanted["backbone"] = spec.backbone.name
        taken = {name: value for name, value in wanted.items() if settings.is_open(name)}
        return replace(settings, **taken)

    def check(self, settings: FitSettings, backbone: Backbone) -> None:
        """
        Args:
            settings: as `completed` gave them.

        Raises:
            SettingsError: with every difference that keeps the tensors from being used.
        """
        spec = self.adapter.spec
        faults: list[str] = []
        try:
            check_fits(spec, backbone)
        except IncompatibleAdapter as error:
            faults += error.faults
        flags = {entry.name: entry.flag for entry in entries()}
        for name in SHAPING:
            its, asked = getattr(spec, name), getattr(settings, name)
            if its != asked:
                faults.append(f"{flags[name]} {asked}: its is {its}")
        if faults:
            raise SettingsError([f"--init-from {self.path}: {'; '.join(faults)}"])

    def put_into(self, method: Idspam) -> str:
        """Replace the initial weights; returns what was taken over, for people."""
        labels, known = method.spec.labels, self.adapter.spec.labels
        same = set(labels) == set(known)
        tensors = {
            name: tensor.float()
            for name, tensor in self.adapter.tensors.items()
            if same or not name.startswith("head.")
        }
        if same:
            tensors |= _reordered(tensors, [known.index(label) for label in labels])
        method.restore(method.snapshot() | tensors)
        taken = "generator and head" if same else "generator; the labels differ, so the head is new"
        return f"starting from {self.path}: its {taken}"


def _reordered(tensors: dict[str, Tensor], order: Sequence[int]) -> dict[str, Tensor]:
    """The last layer of a head for its labels in another order."""
    index = torch.tensor(order)
    names = ("head.out.weight", "head.out.bias")
    return {name: tensors[name].index_select(-1, index) for name in names}
