"""Adapter files: what is written can be read, whole or not at all."""

import errno
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from adapters.errors import InvalidAdapter
from adapters.format.durable import write_atomically
from adapters.format.files import (
    Adapter,
    load_adapter,
    read_spec,
    save_adapter,
    serialize,
    validate,
)

QUERY = "generator.query"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_written_adapter_is_read_back_unchanged(
    adapter: Adapter, tmp_path: Path, dtype: torch.dtype
) -> None:
    stored = Adapter(adapter.spec, {k: v.to(dtype) for k, v in adapter.tensors.items()})
    path = tmp_path / "a.safetensors"
    save_adapter(path, stored)
    loaded = load_adapter(path)
    assert loaded.spec == adapter.spec == read_spec(path)
    assert loaded.tensors.keys() == stored.tensors.keys()
    for name, tensor in stored.tensors.items():
        assert loaded.tensors[name].dtype is dtype
        assert torch.equal(loaded.tensors[name], tensor)


def test_the_same_adapter_is_the_same_bytes(adapter: Adapter) -> None:
    turned = dict(reversed(list(adapter.tensors.items())))
    strided = {k: v.t().contiguous().t() for k, v in adapter.tensors.items()}
    first = serialize(adapter)
    assert serialize(replace(adapter, tensors=turned)) == first
    assert serialize(replace(adapter, tensors=strided)) == first
    assert serialize(validate(first)) == first


def test_a_spec_with_every_field_survives_the_file(adapter: Adapter) -> None:
    fields: dict[str, Any] = {
        "labels": ["ham 🙂", 'sp"am\\'],
        "calibration": {"temperature": 1.7},
        "provenance": {"data": "d", "data_sha256": "1" * 64, "metrics": {"accuracy": 0.5}},
    }
    spec = adapter.spec.model_validate(
        adapter.spec.model_dump() | fields | {"labels": tuple(fields["labels"])}
    )
    assert validate(serialize(replace(adapter, spec=spec))).spec == spec


def test_an_adapter_that_could_not_be_read_is_not_written(adapter: Adapter, tmp_path: Path) -> None:
    tensors = dict(adapter.tensors)
    tensors["head.out.bias"] = torch.tensor([0.0, torch.nan])
    tensors["generator.up.bias"] = tensors["generator.up.bias"].double()
    tensors["extra"] = torch.zeros(1)
    del tensors[QUERY]
    with pytest.raises(InvalidAdapter) as caught:
        save_adapter(tmp_path / "a.safetensors", Adapter(adapter.spec, tensors))
    assert {fault.split(":")[0] for fault in caught.value.faults} == {
        "tensor head.out.bias",
        "tensor generator.up.bias",
        "tensor extra",
        f"tensor {QUERY}",
    }
    assert not list(tmp_path.iterdir())


def test_a_write_replaces_the_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "a"
    write_atomically(path, b"old")
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"
    assert [item.name for item in tmp_path.iterdir()] == ["a"]
    assert path.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("step", ["fsync", "replace", "fchmod"])
def test_a_write_that_fails_midway_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    path = tmp_path / "a"
    write_atomically(path, b"old")

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, step, full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert [item.name for item in tmp_path.iterdir()] == ["a"]


def test_a_write_into_a_folder_that_is_not_there_fails_plainly(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_atomically(tmp_path / "missing" / "a", b"new")
