"""The files of a folder that PEFT's `save_pretrained` has written. They are not trusted."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from adapters.errors import listing
from adapters.format.spec import without_repeats
from train.errors import PeftError

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_PICKLE_FILE = "adapter_model.bin"
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class PeftFolder:
    """config: of `adapter_config.json`. tensors: of `adapter_model.safetensors`, float32.

    model_config: of `config.json`, which some users save beside them; may be empty.
    """

    path: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    model_config: Mapping[str, Any]

    @property
    def base_model(self) -> str | None:
        """The folder or hub name of the base model."""
        name = self.config.get("base_model_name_or_path")
        return name if isinstance(name, str) and name else None

    def fault(self, message: str) -> PeftError:
        """An error about this folder."""
        return PeftError(f"{self.path}: {message}")


def read_folder(path: Path) -> PeftFolder:
    """Read the files; nothing is unpickled.

    Raises:
        PeftError: files are missing, or are not what `save_pretrained` writes.
    """
    if not path.is_dir():
        raise PeftError(f"{path}: not a folder")
    config_file, weights_file = path / CONFIG_FILE, path / WEIGHTS_FILE
    if not config_file.is_file():
        inner = sorted(each.parent.name for each in path.glob(f"*/{CONFIG_FILE}"))
        found = f", but these folders in it have one: {listing(inner)}" if inner else ""
        raise PeftError(f"{path}: has no {CONFIG_FILE}{found}; PEFT's save_pretrained writes it")
    config = _json(config_file)
    if not weights_file.is_file():
        if (path / _PICKLE_FILE).is_file():
            raise PeftError(
                f"{path}: has only {_PICKLE_FILE}, a pickle, which can run code; load it with PEFT "
                f"where you trust it and save it again: save_pretrained writes {WEIGHTS_FILE}"
            )
        raise PeftError(f"{path}: has no {WEIGHTS_FILE}")
    model_config = path / "config.json"
    return PeftFolder(
        path,
        config,
        _tensors(weights_file),
        _json(model_config) if model_config.is_file() else {},
    )


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text("utf-8"), object_pairs_hook=without_repeats)
    except (ValueError, RecursionError) as error:
        raise PeftError(f"{path}: not JSON: {error}") from None
    if not isinstance(content, dict):
        raise PeftError(f"{path}: not a JSON object")
    return content


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        tensors = load_file(path)
    except (SafetensorError, KeyError) as error:
        raise PeftError(f"{path}: not a safetensors file: {error}") from None
    for name, tensor in sorted(tensors.items()):
        if tensor.dtype not in _FLOATS:
            kind = str(tensor.dtype).removeprefix("torch.")
            raise PeftError(f"{path}: {name} is {kind}: quantised weights are not taken")
        if not bool(torch.isfinite(tensor).all()):
            raise PeftError(f"{path}: {name} has a value that is not finite")
    return {name: tensor.float() for name, tensor in tensors.items()}
