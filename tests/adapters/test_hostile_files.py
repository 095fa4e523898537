"""Hostile files are refused with their faults, and nothing in them ever runs."""

import io
import json
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from adapters.backbone.model import Backbone
from adapters.errors import InvalidAdapter
from adapters.format.files import (
    MAX_HEADER_BYTES,
    METADATA_KEY,
    Adapter,
    read_spec,
    serialize,
    validate,
)
from tests.support import hostile_files as attacks
from tests.support.hostile_files import (
    Header,
    fault_of,
    faults_of,
    join,
    parts,
    with_header,
    with_spec,
)
from tests.support.kinds import adapters_of_all_kinds

QUERY = "generator.query"

# Files of another kind


@pytest.mark.parametrize(
    "build", [attacks.raw_pickle, attacks.torch_pickle, attacks.old_torch_pickle]
)
def test_a_pickle_is_refused_by_name_and_not_run(
    build: Callable[[Path], bytes], tmp_path: Path
) -> None:
    trap = tmp_path / "executed"
    data = build(trap)
    assert "pickle" in fault_of(data)
    path = tmp_path / "a.safetensors"
    path.write_bytes(data)
    with pytest.raises(InvalidAdapter, match="pickle"):
        read_spec(path)
    assert not trap.exists()
    # The trap works: a reader that unpickles runs it.
    if build is attacks.raw_pickle:
        pickle.loads(data)
    else:
        torch.load(io.BytesIO(data), weights_only=False)
    assert trap.exists()


@pytest.mark.parametrize(
    ("data", "named"),
    [
        (attacks.zip_archive(), "zip"),
        (b"\x93NUMPY\x01\x00" + b"0" * 100, "NumPy"),
        (b'{"labels": ["a", "b"], "weights": []}', "JSON text"),
        (b"", "0 bytes"),
        (b"\x01\x00\x00", "3 bytes"),
        (b"<html><body>404</body></html>", "not safetensors"),
        (b"\x00" * 4096, "header"),
    ],
    ids=["zip", "numpy", "json", "empty", "three bytes", "html", "zeros"],
)
def test_another_kind_of_file_is_named(data: bytes, named: str) -> None:
    assert named in fault_of(data)


# The header


def test_a_file_cut_anywhere_is_refused(adapter: Adapter) -> None:
    data = serialize(adapter)
    for length in range(0, len(data), 64):
        assert faults_of(data[:length])
    assert faults_of(data[:-1])


@pytest.mark.parametrize("size", [MAX_HEADER_BYTES + 1, 2**63, 2**64 - 1])
def test_a_header_may_not_claim_more_than_is_allowed(adapter: Adapter, size: int) -> None:
    data = struct.pack("<Q", size) + serialize(adapter)[8:]
    assert f"claims {size} bytes" in fault_of(data)


def test_a_header_may_not_reach_beyond_the_file(adapter: Adapter) -> None:
    data = serialize(adapter)
    assert "truncated inside its header" in fault_of(struct.pack("<Q", len(data)) + data[8:])


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("{", "header"),
        ("[]", "not a JSON object"),
        ("null", "not a JSON object"),
        ("\udcff", "header"),
        ('{"a": NaN}', "metadata"),
        ("[" * 100_000, "header"),
        ('{"a":' * 100_000, "header"),
        ('{"x": 1, "y": 2, "x": 3}', "repeated keys: x"),
        (r'{"\ud800": 1, "\ud800": 2}', r"repeated keys: \ud800"),
        ('{"__metadata__": {"idspam": "{}", "idspam": "{}"}}', "repeated keys: idspam"),
        ('{"generator.query": {"dtype": "F32", "dtype": "F16"}}', "repeated keys: dtype"),
    ],
    ids=[
        "unclosed",
        "list",
        "null",
        "not utf-8",
        "nan",
        "deep list",
        "deep object",
        "tensor twice",
        "lone surrogate twice",
        "spec twice",
        "field twice",
    ],
)
def test_a_header_that_is_not_a_plain_object_is_refused(text: str, named: str) -> None:
    encoded = text.encode("utf-8", "surrogateescape")
    data = struct.pack("<Q", len(encoded)) + encoded
    assert any(named in fault for fault in faults_of(data))


@pytest.mark.parametrize(
    "header",
    [
        r'{"\ud800": 1}',
        r'{"\ud800": {"dtype": "\udfff", "\ud800": 1}}',
        r'{"__metadata__": {"\ud800": "x"}}',
        r'{"__metadata__": {"idspam": "\ud800"}}',
        r'{"__metadata__": {"idspam": "{\"\\ud800\": 1, \"\\ud800\": 2}"}}',
        r'{"__metadata__": {"idspam": "{\"\\ud800\": \"\\ud800\"}"}}',
    ],
)
def test_what_is_wrong_with_a_file_can_be_told_in_utf8(header: str) -> None:
    for fault in faults_of(join(header, b"")):
        assert fault.encode()


@pytest.mark.parametrize(
    ("metadata", "named"),
    [
        (None, "no 'idspam' entry"),
        ({}, "no 'idspam' entry"),
        ("idspam", "no 'idspam' entry"),
        ({"format": "pt"}, "no 'idspam' entry"),
        ({METADATA_KEY: 3}, "no 'idspam' entry"),
    ],
    ids=["none", "empty", "string", "another library's", "number"],
)
def test_a_file_without_a_spec_is_not_an_adapter(
    adapter: Adapter, metadata: Any, named: str
) -> None:
    def change(header: Header) -> None:
        header["__metadata__"] = metadata

    assert any(named in fault for fault in faults_of(with_header(adapter, change)))


def test_unknown_metadata_is_refused_by_name(adapter: Adapter) -> None:
    def change(header: Header) -> None:
        header["__metadata__"] |= {"author": "x", "format": "pt"}

    assert fault_of(with_header(adapter, change)) == "metadata: unknown keys author, format"


# The tensors


def test_a_missing_an_extra_and_a_misshapen_tensor_are_all_named(adapter: Adapter) -> None:
    def change(header: Header) -> None:
        header["head.out.weights"] = header.pop("head.out.weight")
        header[QUERY]["shape"].reverse()
        header["generator.value"]["shape"] = [8, 128]

    faults = faults_of(with_header(adapter, change))
    assert faults == (
        "tensor head.out.weight: missing, expected shape [32, 2]",
        "tensor head.out.weights: not part of this format",
        "tensor generator.value: shape [8, 128], expected [32, 32]",
    )


def test_tensors_of_another_kind_than_the_spec_declares_are_all_named(backbone: Backbone) -> None:
    """For every kind: each of its tensors missing, misshapen, and present without its part."""
    for sound in adapters_of_all_kinds(backbone).values():
        validate(serialize(sound))
        own = [name for name in sound.tensors if not name.startswith("head.")]
        for name in own:

            def misshape(header: Header, name: str = name) -> None:
                header[name]["shape"].append(1)

            (fault,) = faults_of(with_header(sound, misshape))
            assert fault.startswith(f"tensor {name}: shape ")

            def drop(header: Header, name: str = name) -> None:
                header["head.other"] = header.pop(name)

            missing, extra = faults_of(with_header(sound, drop))
            assert missing.startswith(f"tensor {name}: missing, expected shape ")
            assert extra == "tensor head.other: not part of this format"

        def take_parts_away(header: Header) -> None:
            spec = json.loads(header["__metadata__"]["idspam"])
            spec.pop("prompt", None)
            spec.pop("tuning", None)
            header["__metadata__"]["idspam"] = json.dumps(spec)

        if own:
            faults = faults_of(with_header(sound, take_parts_away))
            assert sorted(faults) == sorted(
                f"tensor {name}: not part of this format" for name in own
            )


@pytest.mark.parametrize(
    ("dtype", "width"),
    [("I64", 8), ("I32", 4), ("F64", 8), ("U8", 1), ("BOOL", 1), ("F8_E4M3", 1), ("C64", 8)],
)
def test_a_tensor_of_another_type_is_refused(adapter: Adapter, dtype: str, width: int) -> None:
    data = attacks.with_dtype(adapter, QUERY, dtype, width)
    expected = f"tensor {QUERY}: dtype {dtype}, expected one of F32, F16, BF16"
    assert fault_of(data) == expected


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_value_that_is_not_finite_is_refused(adapter: Adapter, value: float) -> None:
    assert fault_of(attacks.with_values(adapter, QUERY, value)) == (
        f"tensor {QUERY}: 1 of 1024 values are not finite"
    )


def test_a_value_too_large_for_float16_is_found_once_cast(adapter: Adapter) -> None:
    tensors = {name: (tensor * 1e5).half() for name, tensor in adapter.tensors.items()}
    with pytest.raises(InvalidAdapter, match="not finite"):
        serialize(Adapter(adapter.spec, tensors))


def _overlap(header: Header) -> None:
    header["generator.key"]["data_offsets"] = header[QUERY]["data_offsets"]


def _gap(header: Header) -> None:
    for name, entry in header.items():
        if name != "__metadata__":
            entry["data_offsets"] = [offset + 8 for offset in entry["data_offsets"]]


def _beyond(header: Header) -> None:
    header[QUERY]["data_offsets"][1] += 10**9


def _reversed(header: Header) -> None:
    header[QUERY]["data_offsets"].reverse()


def _negative(header: Header) -> None:
    header[QUERY]["data_offsets"][0] = -4


def _huge(header: Header) -> None:
    header[QUERY]["shape"] = [2**62, 2**62]


def _negative_shape(header: Header) -> None:
    header[QUERY]["shape"] = [-32, -32]


def _text_shape(header: Header) -> None:
    header[QUERY]["shape"] = "32"


def _null_shape(header: Header) -> None:
    header[QUERY]["shape"] = None


def _number_shape(header: Header) -> None:
    header[QUERY]["shape"] = 32


def _no_entry(header: Header) -> None:
    header[QUERY] = [1, 2, 3]


def _listed_dtype(header: Header) -> None:
    header[QUERY]["dtype"] = ["F32"]


def _extra_field(header: Header) -> None:
    header[QUERY]["codec"] = "zstd"


@pytest.mark.parametrize(
    "change",
    [
        _overlap,
        _gap,
        _beyond,
        _reversed,
        _negative,
        _huge,
        _negative_shape,
        _text_shape,
        _null_shape,
        _number_shape,
        _no_entry,
        _listed_dtype,
        _extra_field,
    ],
)
def test_a_wrong_tensor_entry_is_refused(
    adapter: Adapter, change: Callable[[Header], None]
) -> None:
    assert any("tensor" in fault for fault in faults_of(with_header(adapter, change)))


def test_bytes_after_the_tensors_are_refused(adapter: Adapter) -> None:
    assert any("tensors:" in fault for fault in faults_of(serialize(adapter) + b"\x00"))
    assert any("tensors:" in fault for fault in faults_of(serialize(adapter) * 2))


def test_a_spec_that_claims_huge_shapes_costs_no_memory(adapter: Adapter) -> None:
    faults = faults_of(
        with_spec(
            adapter,
            hidden_size=16384,
            **{"prompt.attention_size": 16384, "prompt.bottleneck": 8192},
        )
    )
    assert f"tensor {QUERY}: shape [32, 32], expected [16384, 16384]" in faults


def test_faults_of_every_part_are_listed_together(adapter: Adapter) -> None:
    header, body = parts(adapter)
    spec = json.loads(header["__metadata__"][METADATA_KEY])
    header["__metadata__"][METADATA_KEY] = json.dumps(spec | {"max_length": 0, "colour": "red"})
    begin = header[QUERY]["data_offsets"][0]
    nan = struct.pack("<f", float("nan"))
    faults = faults_of(join(header, body[:begin] + nan + body[begin + 4 :]))
    assert [fault.split(":")[:2] for fault in faults] == [
        ["spec", " max_length"],
        ["spec", " colour"],
        [f"tensor {QUERY}", " 1 of 1024 values are not finite"],
    ]


# Padding


@pytest.mark.parametrize("spaces", [8, 100, 4 * 2**20 - 8192])
def test_a_padded_header_is_refused(adapter: Adapter, tmp_path: Path, spaces: int) -> None:
    header, body = parts(adapter)
    text = json.dumps(header)
    data = join(text + " " * spaces, body)
    assert f"ends with {spaces} spaces" in fault_of(data)
    path = tmp_path / "a.safetensors"
    path.write_bytes(data)
    with pytest.raises(InvalidAdapter, match="spaces"):
        read_spec(path)


@pytest.mark.parametrize("filler", [" ", "\n", "\t", "\r"])
def test_a_header_of_white_space_between_its_parts_is_refused(
    adapter: Adapter, filler: str
) -> None:
    header, body = parts(adapter)
    text = json.dumps(header)
    assert "padding" in fault_of(join("{" + filler * 100_000 + text[1:], body))


def test_a_spec_of_white_space_is_refused(adapter: Adapter) -> None:
    padded = attacks.with_spec_text(adapter, lambda text: "{" + " " * 100_000 + text[1:])
    assert "spec: " in fault_of(padded)
    assert "padding" in fault_of(padded)


@pytest.mark.parametrize("spaces", range(8))
def test_padding_to_eight_bytes_and_indented_json_are_accepted(
    adapter: Adapter, spaces: int
) -> None:
    header, body = parts(adapter)
    for text in (json.dumps(header), json.dumps(header, indent=4)):
        assert validate(join(text + " " * spaces, body)).spec == adapter.spec
