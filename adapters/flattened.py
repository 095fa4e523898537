"""A prepared adapter as one block of memory and a description of it, so that a file can keep it.

    PreparedAdapter --flatten--> layout (JSON values), memory (uint8) --restore--> PreparedAdapter

A restored adapter has the same values in the same order of memory, so it computes the same bits.
"""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Any, TypeAlias

import torch
from torch import Tensor

from adapters.adapter import PreparedAdapter
from adapters.format.spec import AdapterSpec, FinalActivation, HiddenActivation
from adapters.packed.head import HeadWeights
from adapters.packed.packing import RowShape
from adapters.packed.prompt import GeneratorWeights
from adapters.packed.tuning import LoraWeights, LowRank, VectorWeights

# A part of a prepared adapter as JSON values.
Layout: TypeAlias = Mapping[str, Any]

# Every tensor starts at a multiple of this many bytes, as torch's allocator places tensors.
_ALIGNMENT = 64
_CLASSES: Mapping[str, Any] = {
    cls.__name__: cls
    for cls in (GeneratorWeights, HeadWeights, LoraWeights, LowRank, VectorWeights)
}
_ENUMS: Mapping[str, Any] = {cls.__name__: cls for cls in (FinalActivation, HiddenActivation)}
_DTYPES = {str(dtype): dtype for dtype in (torch.float32, torch.float16, torch.bfloat16)}


def flatten(adapter: PreparedAdapter) -> tuple[Layout, Tensor]:
    """What `restore` needs beside the spec: the layout, and the memory, uint8 on the CPU."""
    writer = _Writer()
    layout = {
        name: writer.described(getattr(adapter, name)) for name in ("generator", "tuning", "head")
    }
    return layout, writer.memory()


def restore(
    spec: AdapterSpec, layout: Layout, memory: Tensor, *, device: torch.device
) -> PreparedAdapter:
    """The adapter that was flattened; on a CPU its tensors are views of `memory`.

    Raises:
        KeyError, RuntimeError, TypeError, ValueError: this is no layout of this memory.
    """
    on_device = memory.to(device)
    parts = {name: _restored(layout[name], on_device) for name in ("generator", "tuning", "head")}
    return PreparedAdapter(spec, **parts, shape=RowShape.of(spec))


class _Writer:
    """Describes the parts of an adapter and collects their tensors."""

    def __init__(self) -> None:
        self._pieces: list[tuple[int, Tensor]] = []
        self._size = 0

    def described(self, value: Any) -> Any:
        """A value as JSON values."""
        match value:
            case Tensor():
                return self._placed(value)
            case Enum():
                return {"enum": [type(value).__name__, value.value]}
            case None | bool() | int() | float():
                return value
            case range():
                return {"range": [value.start, value.stop]}
            case tuple():
                return [self.described(item) for item in value]
        assert is_dataclass(value), f"{type(value)} has no description"
        parts = {item.name: self.described(getattr(value, item.name)) for item in fields(value)}
        return {"class": type(value).__name__, "parts": parts}

    def _placed(self, tensor: Tensor) -> Any:
        # A transposed matrix stays transposed: sums in another order would have other bits.
        strides = tensor.stride()
        in_memory = tensor.permute(sorted(range(tensor.ndim), key=lambda dim: -strides[dim]))
        if not in_memory.is_contiguous():
            in_memory = tensor = tensor.contiguous()
        start = self._size
        flat = in_memory.reshape(-1).view(torch.uint8)
        self._pieces.append((start, flat))
        self._size += len(flat) + -len(flat) % _ALIGNMENT
        return {"tensor": [str(tensor.dtype), list(tensor.shape), list(tensor.stride()), start]}

    def memory(self) -> Tensor:
        memory = torch.zeros(self._size, dtype=torch.uint8)
        for start, flat in self._pieces:
            memory[start : start + len(flat)] = flat
        return memory


def _restored(value: Any, memory: Tensor) -> Any:
    if isinstance(value, list):
        return tuple(_restored(item, memory) for item in value)
    if not isinstance(value, dict):
        return value
    if "class" in value:
        parts = {name: _restored(part, memory) for name, part in value["parts"].items()}
        return _CLASSES[value["class"]](**parts)
    if "enum" in value:
        name, member = value["enum"]
        return _ENUMS[name](member)
    if "range" in value:
        return range(*value["range"])
    name, shape, strides, start = value["tensor"]
    dtype, size = _DTYPES[name], torch.Size(shape).numel()
    flat = memory[start : start + size * dtype.itemsize].view(dtype)
    if len(flat) != size:
        raise ValueError(f"the memory ends before a tensor of {size} values from {start} on")
    return flat.as_strided(shape, strides)
