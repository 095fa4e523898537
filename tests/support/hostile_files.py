"""Hostile adapter files, built by hand because no library would write them."""

import io
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from adapters.errors import InvalidAdapter
from adapters.format.files import METADATA_KEY, Adapter, serialize, validate

Header = dict[str, Any]


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.path),)


def raw_pickle(path: Path) -> bytes:
    return pickle.dumps(Payload(path))


def torch_pickle(path: Path) -> bytes:
    """A zip archive with a pickle in it, as torch.save writes."""
    buffer = io.BytesIO()
    torch.save({"weights": torch.zeros(2), "payload": Payload(path)}, buffer)
    return buffer.getvalue()


def old_torch_pickle(path: Path) -> bytes:
    """A sequence of pickles, as torch.save wrote before its zip format."""
    buffer = io.BytesIO()
    torch.save(Payload(path), buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


def zip_archive() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("adapter.safetensors", b"0" * 100)
    return buffer.getvalue()


def parts(adapter: Adapter) -> tuple[Header, bytes]:
    """The header and the tensors' bytes of a valid file."""
    data = serialize(adapter)
    (size,) = struct.unpack("<Q", data[:8])
    header: Header = json.loads(data[8 : 8 + size])
    return header, data[8 + size :]


def join(header: Header | str, body: bytes) -> bytes:
    """A file of any header, consistent or not."""
    text = header if isinstance(header, str) else json.dumps(header)
    encoded = text.encode()
    return struct.pack("<Q", len(encoded)) + encoded + body


def with_header(adapter: Adapter, change: Callable[[Header], None]) -> bytes:
    """A valid file whose header was changed in place."""
    header, body = parts(adapter)
    change(header)
    return join(header, body)


def with_spec(adapter: Adapter, **fields: Any) -> bytes:
    """A valid file whose spec has some fields set (`prompt.length` is in a part of it).

    None removes a field.
    """

    def change(header: Header) -> None:
        spec = json.loads(header["__metadata__"][METADATA_KEY])
        for path, value in fields.items():
            *parts, name = path.split(".")
            part = spec
            for each in parts:
                part = part[each]
            part[name] = value
            if value is None:
                del part[name]
        header["__metadata__"][METADATA_KEY] = json.dumps(spec)

    return with_header(adapter, change)


def with_spec_text(adapter: Adapter, change: Callable[[str], str]) -> bytes:
    """A valid file whose spec is any text."""

    def rewrite(header: Header) -> None:
        header["__metadata__"][METADATA_KEY] = change(header["__metadata__"][METADATA_KEY])

    return with_header(adapter, rewrite)


def with_values(adapter: Adapter, name: str, value: float) -> bytes:
    """A valid float32 file one of whose tensors has another first value."""
    header, body = parts(adapter)
    begin = header[name]["data_offsets"][0]
    return join(header, body[:begin] + struct.pack("<f", value) + body[begin + 4 :])


def with_dtype(adapter: Adapter, name: str, dtype: str, width: int) -> bytes:
    """A valid file one of whose tensors claims another type, its bytes laid out to match."""
    header, body = parts(adapter)
    names = sorted(
        (key for key in header if key != "__metadata__"),
        key=lambda key: int(header[key]["data_offsets"][0]),
    )
    pieces, offset = [], 0
    for key in names:
        begin, end = header[key]["data_offsets"]
        piece = body[begin:end]
        if key == name:
            piece = b"\x00" * (len(piece) // 4 * width)
            header[key]["dtype"] = dtype
        pieces.append(piece)
        header[key]["data_offsets"] = [offset, offset + len(piece)]
        offset += len(piece)
    return join(header, b"".join(pieces))


def faults_of(data: bytes) -> tuple[str, ...]:
    """The faults that the reader finds in a file."""
    with pytest.raises(InvalidAdapter) as caught:
        validate(data)
    assert caught.value.faults
    return caught.value.faults


def fault_of(data: bytes) -> str:
    """The only fault that it finds."""
    (fault,) = faults_of(data)
    return fault
