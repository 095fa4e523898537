"""Read and write adapter files. docs/adapter-format.md describes the format.

An adapter file is a safetensors file whose `__metadata__` has one key, `idspam`, with the spec as
JSON. Nothing is ever unpickled or repaired: a file is exactly what its spec declares, or it is
refused with all its faults.
"""

import json
import os
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import SafetensorError
from safetensors.torch import load, load_file, save
from torch import Tensor

from adapters.errors import InvalidAdapter, listing
from adapters.format.durable import write_atomically
from adapters.format.spec import AdapterSpec, without_repeats

METADATA_KEY = "idspam"
MAX_HEADER_BYTES = 4 * 2**20
# safetensors pads its header with spaces, so that the tensors begin at a multiple of this.
_ALIGNMENT = 8
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

Declared: TypeAlias = tuple[str, tuple[int, ...]]  # dtype and shape

_FOREIGN = {
    b"\x80": "a pickle, which can run code",
    b"PK": "a zip archive, as torch.save writes, of pickles, which can run code",
    b"\x93NUMPY": "a NumPy file",
    b"{": "JSON text",
}


@dataclass(frozen=True, slots=True)
class Adapter:
    """A trained adapter: a spec and exactly the tensors that it declares."""

    spec: AdapterSpec
    tensors: Mapping[str, Tensor]


def serialize(adapter: Adapter) -> bytes:
    """The bytes of an adapter file.

    Raises:
        InvalidAdapter: the tensors are not as the spec declares, or not finite.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in adapter.tensors.items()}
    declared = {
        name: (_dtype_name(tensor), tuple(tensor.shape)) for name, tensor in tensors.items()
    }
    if faults := _mismatches(adapter.spec, declared) + _not_finite(tensors):
        raise InvalidAdapter(faults)
    return save(dict(sorted(tensors.items())), metadata={METADATA_KEY: adapter.spec.to_json()})


def save_adapter(path: Path | str, adapter: Adapter) -> None:
    """Write an adapter file atomically.

    Raises:
        InvalidAdapter: as `serialize`.
    """
    write_atomically(Path(path), serialize(adapter))


def read_spec(path: Path | str) -> AdapterSpec:
    """The spec of a file, without reading its tensors.

    Raises:
        InvalidAdapter: the header or the spec is not valid.
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


def validate_file(path: Path) -> Adapter:
    """As `validate`, of a file that nothing changes: its tensors are mapped, not copied.

    Raises:
        InvalidAdapter: with every fault.
        OSError: the file cannot be read.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        header = _header(file.read(8 + MAX_HEADER_BYTES), size)
    spec, tensors, faults = _parsed(header, lambda: load_file(path))
    return _without_faults(spec, tensors, faults + _not_finite(tensors))


def validate(data: bytes) -> Adapter:
    """Parse the bytes of an untrusted adapter file.

    Checks what `parse` checks, and that every value is finite, as stored and as float32.

    Raises:
        InvalidAdapter: with every fault.
    """
    spec, tensors, faults = _parsed(_header(data, len(data)), lambda: load(data))
    return _without_faults(spec, tensors, faults + _not_finite(tensors))


def parse(data: bytes) -> Adapter:
    """Parse the bytes of an adapter file whose values are known to be finite.

    Checks the size and syntax of the header, the metadata keys, every field of the spec, and the
    tensors: exactly those of the spec, of the right shapes and types, without gaps or overlaps.

    Raises:
        InvalidAdapter: with every fault.
    """
    return _without_faults(*_parsed(_header(data, len(data)), lambda: load(data)))


def _parsed(
    header: Mapping[str, Any], read: Callable[[], dict[str, Tensor]]
) -> tuple[AdapterSpec | None, dict[str, Tensor], list[str]]:
    """The spec (None if it is not valid), the tensors and the faults."""
    faults: list[str] = []
    spec, tensors = None, {}
    try:
        spec = _spec(header)
    except InvalidAdapter as error:
        faults += error.faults
    try:
        tensors = read()
    except (SafetensorError, KeyError) as error:
        faults.append(f"tensors: {error}")
    if spec is not None:
        faults += _mismatches(spec, _declared(header))
    return spec, tensors, faults


def _without_faults(
    spec: AdapterSpec | None, tensors: dict[str, Tensor], faults: list[str]
) -> Adapter:
    if faults or spec is None:
        raise InvalidAdapter(faults)
    return Adapter(spec, tensors)


def _header(data: bytes, total: int) -> dict[str, Any]:
    """The JSON header of a safetensors file of `total` bytes that begins with `data`."""
    for magic, kind in _FOREIGN.items():
        if data.startswith(magic) and not _plausible(data, total):
            raise InvalidAdapter([f"file: looks like {kind}; expected safetensors"])
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
    text = data[8 : 8 + size]
    try:
        header = json.loads(text, object_pairs_hook=without_repeats)
    except (ValueError, RecursionError) as error:
        raise InvalidAdapter([f"header: {error}"]) from None
    if not isinstance(header, dict):
        raise InvalidAdapter(["header: not a JSON object"])
    if (padding := size - len(text.rstrip(b" "))) >= _ALIGNMENT:
        raise InvalidAdapter(
            [f"header: ends with {padding} spaces, only padding to {_ALIGNMENT} bytes is allowed"]
        )
    _refuse_padding("header", text, header)
    return header


def _refuse_padding(place: str, text: bytes | str, content: Any) -> None:
    """
    Raises:
        InvalidAdapter: most of the JSON text is white space or needless escapes.
    """
    # Generous, so that indented JSON is accepted.
    if len(text) > 4096 and len(text) > 4 * len(json.dumps(content)):
        raise InvalidAdapter([f"{place}: {len(text)} bytes of JSON, most of them padding"])


def _plausible(data: bytes, total: int) -> bool:
    """Whether a file that looks like another kind may be safetensors after all."""
    return len(data) > 8 and data[8:9] == b"{" and struct.unpack("<Q", data[:8])[0] <= total


def _spec(header: Mapping[str, Any]) -> AdapterSpec:
    metadata = header.get("__metadata__")
    if not isinstance(metadata, dict) or not isinstance(metadata.get(METADATA_KEY), str):
        raise InvalidAdapter(
            [f"metadata: no {METADATA_KEY!r} entry, so this is not an ID-SPAM adapter"]
        )
    if unknown := sorted(set(metadata) - {METADATA_KEY}):
        raise InvalidAdapter([f"metadata: unknown keys {listing(unknown)}"])
    spec = AdapterSpec.from_json(metadata[METADATA_KEY])
    _refuse_padding("spec", metadata[METADATA_KEY], spec.model_dump(mode="json"))
    return spec


def _declared(header: Mapping[str, Any]) -> dict[str, Declared | None]:
    """Type and shape of every tensor in the header; None if its entry breaks the format."""
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
    floats = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}
    if floats and all_finite(*floats.values()):
        return []
    for name, tensor in sorted(floats.items()):
        bad = int((~tensor.float().isfinite()).sum())
        if bad:
            faults.append(f"tensor {name}: {bad} of {tensor.numel()} values are not finite")
    return faults


def all_finite(*tensors: Tensor) -> bool:
    """Whether every value is finite, as float32 too; waits for a device once."""
    # A sum is finite only if all its terms are, and takes a tenth of the time of checking each
    # term. But a sum of finite terms may overflow.
    if not tensors:
        return True
    sums = torch.stack([tensor.sum(dtype=torch.float32) for tensor in tensors])
    if bool(sums.isfinite().all()):
        return True
    return all(bool(tensor.float().isfinite().all()) for tensor in tensors)


def _dtype_name(tensor: Tensor) -> str:
    names = {dtype: name for name, dtype in DTYPES.items()}
    return names.get(tensor.dtype, str(tensor.dtype))
