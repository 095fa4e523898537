"""What is fuzzed: readers of what strangers send. A harness raises only if a reader is wrong.

Every input must end in a value or in one of the errors that the reader documents. A value must be
one that the rest of the project can use: it can be written, and what is written is read alike.
"""

import json
import struct
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import orjson

from adapters.errors import InvalidAdapter
from adapters.format.files import parse, serialize, validate
from adapters.format.spec import AdapterSpec
from service.errors import RequestError
from service.http.bodies import parse_json, validated
from service.http.errors import refusal_of
from service.http.predict import _validate as validate_predict
from service.http.protocols import tei, vllm
from service.http.protocols.oip.tensors import (
    InferRequest,
    pack_strings,
    read_texts,
    selected_outputs,
)

Harness = Callable[[bytes], bool]
_MAX_INPUTS = 64


def adapter_file(data: bytes) -> bool:
    """An adapter file. Returns whether it was valid, as all harnesses do."""
    try:
        adapter = validate(data)
    except InvalidAdapter as error:
        _check_faults(error.faults)
        return False
    written = serialize(adapter)
    again = parse(written)
    assert again.spec == adapter.spec
    assert all(bool((again.tensors[name] == adapter.tensors[name]).all()) for name in again.tensors)
    assert set(adapter.tensors) == set(adapter.spec.shapes())
    return True


def spec(data: bytes) -> bool:
    """The JSON of a spec."""
    try:
        found = AdapterSpec.from_json(data.decode("utf-8", "surrogatepass"))
    except UnicodeDecodeError:
        return False
    except InvalidAdapter as error:
        _check_faults(error.faults)
        return False
    assert AdapterSpec.from_json(found.to_json()) == found
    assert all(size > 0 for shape in found.shapes().values() for size in shape)
    found.label_set([0.5] * len(found.labels))
    return True


def request(data: bytes) -> bool:
    """A body of a request, after a byte that says for which protocol."""
    if not data:
        return False
    try:
        _BODIES[data[0] % len(_BODIES)](data[1:])
    except RequestError as error:
        refusal = refusal_of(error)
        assert 400 <= refusal.kind.status < 500
        answer = orjson.dumps({"message": refusal.message, "details": refusal.details})
        assert len(answer) < 100_000, "a refusal is no larger than what can be read"
        return False
    return True


def _predict(body: bytes) -> None:
    found = validate_predict(parse_json(body), max_inputs=_MAX_INPUTS)
    inputs = found.inputs if isinstance(found.inputs, list) else [found.inputs]
    assert 1 <= len(inputs) <= _MAX_INPUTS
    for item in inputs:
        (item if isinstance(item, str) else item.text).encode()


def _tei(body: bytes) -> None:
    found = validated(tei.TeiPredictRequest, parse_json(body))
    pairs, is_batch = tei._pairs(found.inputs, _MAX_INPUTS)
    assert is_batch or len(pairs) == 1
    for text, pair in pairs:
        (text + (pair or "")).encode()


def _vllm(body: bytes) -> None:
    found = validated(vllm.VllmClassifyRequest, parse_json(body))
    vllm._refuse_options(found)
    assert isinstance(found.input, str | list)


def _oip(body: bytes) -> None:
    """Two bytes say how long the JSON is; what follows it are tensors."""
    (length,) = struct.unpack("<H", body[:2].ljust(2, b"\x00"))
    text, attached = body[2 : 2 + length], body[2 + length :]
    found = validated(InferRequest, parse_json(text))
    outputs = selected_outputs(found)
    assert len({output.name for output in outputs}) == len(outputs)
    pairs = read_texts(found.inputs, attached, limit=_MAX_INPUTS)
    assert 1 <= len(pairs) <= _MAX_INPUTS
    pack_strings([text for text, _ in pairs])


_BODIES = (_predict, _tei, _vllm, _oip)


def _check_faults(faults: tuple[str, ...]) -> None:
    """Faults go into JSON answers and logs."""
    assert faults
    content: Any = {"details": [fault.encode("utf-8", "replace").decode() for fault in faults]}
    assert len(json.dumps(content)) < 20 * 2**20


HARNESSES: Mapping[str, Harness] = MappingProxyType(
    {"adapter_file": adapter_file, "spec": spec, "request": request}
)
