"""Adapter files: written whole, read strictly. docs/adapter-format.md describes them.

An adapter file is a safetensors file whose `__metadata__` holds one key, `idspam`, with the spec as
JSON. Nothing is ever unpickled, and nothing is repaired: a file either is exactly what its spec
declares or is refused with every fault that it has.
"""

import json
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from adapters.errors import InvalidAdapter, listing
from adapters.format.durable import write_atomically
from adapters.format.spec import AdapterSpec, without_repeats


@dataclass(frozen=True, slots=True)
class Adapter:
    """A spec and exactly the tensors that it declares."""

    spec: AdapterSpec
    tensors: Mapping[str, Tensor]


# --- merged from adapters.finite


def all_finite(*tensors: Tensor) -> bool:
    """Whether every value is a finite number, as float32 too; one look back at a device."""
    # A sum is finite only if all its terms are, and takes a tenth of looking at each of them; one
    # that is not may still have overflown.
    sums = torch.stack([tensor.sum(dtype=torch.float32) for tensor in tensors])
    if bool(sums.isfinite().all()):
        return True
    return all(bool(tensor.float().isfinite().all()) for tensor in tensors)


# --- merged from adapters.files

METADATA_KEY = "idspam"
MAX_HEADER_BYTES = 4 * 2**20
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

Declared: TypeAlias = tuple[str, tuple[int, ...]]  # dtype and shape

_FOREIGN = {
    b"\x80": "a pickle, which can run code",
    b"PK": "a zip archive, as torch.save writes: it holds pickles, which can run code",
    b"\x93NUMPY": "a NumPy file",
    b"{": "JSON text",
}


def serialize(adapter: Adapter) -> bytes:
    """The bytes of an adapter file.

    Raises:
        InvalidAdapter: the tensors are not what the spec declares, or not finite.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in adapter.tensors.items()}
    declared = {
        name: (_dtype_name(tensor), tuple(tensor.shape)) for name, tensor in tensors.items()
    }
    _refuse(_mismatches(adapter.spec, declared) + _not_finite(tensors))
    return save(dict(sorted(tensors.items())), metadata={METADATA_KEY: adapter.spec.to_json()})


def save_adapter(path: Path | str, adapter: Adapter) -> None:
    """Write an adapter file: to a temporary name in the same folder, synced, then renamed.

    Raises:
        InvalidAdapter: as `serialize`.
    """
    write_atomically(Path(path), serialize(adapter))


def read_spec(path: Path | str) -> AdapterSpec:
    """The spec of a file, without reading its tensors.

    Raises:
        InvalidAdapter: header or spec are not valid.
    """
    with Path(path).open("rb") as file:
        header = _header(file.read(8 + MAX_HEADER_BYTES), os.fstat(file.fileno()).st_size)
    return _spec(header)


def load_adapter(path: Path | str) -> Adapter:
    """Read and validate an adapter file.

    Raises:
        InvalidAdapter: with every fault.
        OSError: the file cannot be read.
    """
    return validate(Path(path).read_bytes())


def validate(data: bytes) -> Adapter:
    """Parse the bytes of an adapter file that comes from anywhere.

    Checked, each fault named: all that `parse` checks, and that every value is finite, as stored
    and as float32.

    Raises:
        InvalidAdapter: with every fault.
    """
    spec, tensors, faults = _parsed(data)
    _refuse(faults + _not_finite(tensors))
    assert spec is not None
    return Adapter(spec, tensors)


def parse(data: bytes) -> Adapter:
    """Parse the bytes of an adapter file, whose values are known to be finite.

    Checked, each fault named: header size and syntax, metadata keys, every field of the spec, the
    exact set of tensors, their shapes and types, no gaps or overlaps between them.

    Raises:
        InvalidAdapter: with every fault.
    """
    spec, tensors, faults = _parsed(data)
    _refuse(faults)
    assert spec is not None
    return Adapter(spec, tensors)


def _parsed(data: bytes) -> tuple[AdapterSpec | None, dict[str, Tensor], list[str]]:
    """The spec (None: it is not valid), the tensors and the faults."""
    header = _header(data, len(data))
    faults: list[str] = []
    spec = None
    try:
        spec = _spec(header)
    except InvalidAdapter as error:
        faults += error.faults
    tensors: dict[str, Tensor] = {}
    try:
        tensors = load(data)
    except (SafetensorError, KeyError) as error:
        faults.append(f"tensors: {error}")
    if spec is not None:
        faults += _mismatches(spec, _declared(header))
    return spec, tensors, faults


def _header(data: bytes, total: int) -> dict[str, Any]:
    """The JSON header of a safetensors file of `total` bytes, of which `data` is the beginning."""
    for magic, what in _FOREIGN.items():
        if data.startswith(magic) and not _plausible(data, total):
            raise InvalidAdapter([f"file: looks like {what}; expected safetensors"])
    if len(data) < 8:
        raise InvalidAdapter([f"file: {total} bytes, shorter than a safetensors header"])
    (size,) = struct.unpack("<Q", data[:8])
    if size > MAX_HEADER_BYTES:
        raise InvalidAdapter(
            [f"header: claims {size} bytes, {MAX_HEADER_BYTES} are allowed; not safetensors?"]
        )
    if size > total - 8:
        raise InvalidAdapter(
            [f"file: truncated inside its header ({total} of at least {size + 8} bytes)"]
        )
    try:
        header = json.loads(data[8 : 8 + size], object_pairs_hook=without_repeats)
    except (ValueError, RecursionError) as error:
        raise InvalidAdapter([f"header: {error}"]) from None
    if not isinstance(header, dict):
        raise InvalidAdapter(["header: not a JSON object"])
    return header


def _plausible(data: bytes, total: int) -> bool:
    return len(data) > 8 and data[8:9] == b"{" and struct.unpack("<Q", data[:8])[0] <= total


def _spec(header: Mapping[str, Any]) -> AdapterSpec:
    metadata = header.get("__metadata__")
    if not isinstance(metadata, dict) or not isinstance(metadata.get(METADATA_KEY), str):
        raise InvalidAdapter(
            [f"metadata: no {METADATA_KEY!r} entry: this is not an ID-SPAM adapter"]
        )
    if unknown := sorted(set(metadata) - {METADATA_KEY}):
        raise InvalidAdapter([f"metadata: unknown keys {listing(unknown)}"])
    return AdapterSpec.from_json(metadata[METADATA_KEY])


def _declared(header: Mapping[str, Any]) -> dict[str, Declared | None]:
    """What the header says of every tensor; None where its entry is not of the format."""
    return {name: _entry(value) for name, value in header.items() if name != "__metadata__"}


def _entry(value: Any) -> Declared | None:
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        return None
    dtype, shape = value["dtype"], value["shape"]
    if not isinstance(dtype, str) or not isinstance(shape, list):
        return None
    return (dtype, tuple(shape)) if all(type(size) is int for size in shape) else None


def _mismatches(spec: AdapterSpec, declared: Mapping[str, Declared | None]) -> list[str]:
    expected = spec.shapes()
    faults = [
        f"tensor {name}: missing, expected shape {list(expected[name])}"
        for name in expected
        if name not in declared
    ]
    faults += [
        f"tensor {name}: not part of this format"
        for name in sorted(declared.keys() - expected.keys())
    ]
    for name in sorted(declared.keys() & expected.keys()):
        entry = declared[name]
        if entry is None:
            faults.append(f"tensor {name}: its entry is not {{dtype, shape, data_offsets}}")
            continue
        dtype, shape = entry
        if shape != expected[name]:
            faults.append(f"tensor {name}: shape {list(shape)}, expected {list(expected[name])}")
        if dtype not in DTYPES:
            faults.append(f"tensor {name}: dtype {dtype}, expected one of {', '.join(DTYPES)}")
    return faults


def _not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    faults = []
    numbers = {name: item for name, item in tensors.items() if item.is_floating_point()}
    if numbers and all_finite(*numbers.values()):
        return []
    for name, tensor in sorted(numbers.items()):
        bad = int((~tensor.float().isfinite()).sum())
        if bad:
            faults.append(f"tensor {name}: {bad} of {tensor.numel()} values are not finite")
    return faults


def _dtype_name(tensor: Tensor) -> str:
    names = {dtype: name for name, dtype in DTYPES.items()}
    return names.get(tensor.dtype, str(tensor.dtype))


def _refuse(faults: list[str]) -> None:
    if faults:
        raise InvalidAdapter(faults)
