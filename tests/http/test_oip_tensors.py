"""Tensors of the Open Inference Protocol: what is encoded decodes to itself, junk is refused."""

import asyncio
import struct
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from service.errors import InvalidRequest
from service.http.protocols.oip.tensors import (
    InferRequest,
    InputTensor,
    OutputTensor,
    SelectedOutput,
    encode_answer,
    pack_strings,
    read_texts,
    selected_outputs,
    top_classes,
    unpack_strings,
)

# Strings as they are in JSON: without lone surrogates.
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
BATCHES = st.lists(TEXTS, min_size=1, max_size=9)
PAIRS = st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=9)
JUNK = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 2**63) | st.floats(allow_nan=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=12,
)
LIMIT = 16


def tensor(name: str = "text", **fields: Any) -> InputTensor:
    return InputTensor.model_validate({"name": name, "datatype": "BYTES", "shape": [1]} | fields)


def sized(name: str, shape: list[int], data: bytes) -> InputTensor:
    return tensor(name, shape=shape, parameters={"binary_data_size": len(data)})


def refused(*tensors: InputTensor, attached: bytes = b"") -> str:
    """The one fault of these tensors."""
    with pytest.raises(InvalidRequest) as caught:
        read_texts(tensors, attached, limit=LIMIT)
    (fault,) = caught.value.details
    return fault


@given(BATCHES)
def test_packed_strings_unpack_to_themselves(texts: list[str]) -> None:
    data = pack_strings(texts)
    assert list(unpack_strings(data, len(texts))) == texts
    assert data == b"".join(struct.pack("<I", len(t.encode())) + t.encode() for t in texts)


@given(BATCHES)
def test_texts_are_the_same_in_every_form_that_they_can_travel_in(texts: list[str]) -> None:
    count, data = len(texts), pack_strings(texts)
    expected = [(text, None) for text in texts]
    for tensors, attached in (
        ([tensor(shape=[count], data=texts)], b""),
        ([tensor(shape=[count, 1], data=texts)], b""),
        ([tensor(shape=[count, 1], data=[[text] for text in texts])], b""),
        ([sized("text", [count], data)], data),
        ([sized("text", [count, 1], data)], data),
    ):
        assert read_texts(tensors, attached, limit=LIMIT) == expected


@given(PAIRS)
def test_pairs_are_the_same_in_one_tensor_and_in_two(pairs: list[tuple[str, str]]) -> None:
    count = len(pairs)
    one, two = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    flat = [text for pair in pairs for text in pair]
    first, second, both = pack_strings(one), pack_strings(two), pack_strings(flat)
    for tensors, attached in (
        ([tensor(shape=[count], data=one), tensor("text_pair", shape=[count], data=two)], b""),
        # In the order of the tensors, and not of their names.
        ([sized("text_pair", [count, 1], second), sized("text", [count], first)], second + first),
        ([tensor(shape=[count], data=one), sized("text_pair", [count], second)], second),
        ([tensor(shape=[count, 2], data=flat)], b""),
        ([tensor(shape=[count, 2], data=[list(pair) for pair in pairs])], b""),
        ([sized("text", [count, 2], both)], both),
    ):
        assert read_texts(tensors, attached, limit=LIMIT) == pairs


@given(st.binary(max_size=60), st.integers(0, 6))
def test_junk_bytes_are_refused_or_are_what_they_would_pack_to(data: bytes, count: int) -> None:
    try:
        texts = list(unpack_strings(data, count))
    except InvalidRequest:
        return
    assert (pack_strings(texts), len(texts)) == (data, count)


@given(st.dictionaries(st.sampled_from(list(InferRequest.model_fields)), JUNK), st.binary())
def test_junk_requests_raise_nothing_but_refusals(content: dict[str, Any], data: bytes) -> None:
    try:
        asked = InferRequest.model_validate(orjson.loads(orjson.dumps(content)))
        selected_outputs(asked)
        read_texts(asked.inputs, data, limit=LIMIT)
    except (ValidationError, InvalidRequest):
        pass


@given(
    st.sampled_from(["text", "text_pair", "texts"]),
    st.sampled_from(["BYTES", "FP32"]),
    st.lists(st.integers(-2, 5) | st.integers(2**31, 2**63), max_size=3),
    st.none() | st.lists(TEXTS | st.integers() | st.lists(TEXTS, max_size=3), max_size=5),
    st.none() | st.integers(0, 30),
    st.binary(max_size=30),
)
def test_tensors_whose_parts_disagree_raise_nothing_but_refusals(
    name: str, datatype: str, shape: list[int], data: Any, size: int | None, attached: bytes
) -> None:
    parameters = {"binary_data_size": size}
    text_input = tensor(name, datatype=datatype, shape=shape, data=data, parameters=parameters)
    try:
        texts = read_texts([text_input], attached, limit=LIMIT)
    except InvalidRequest:
        return
    assert len(texts) == shape[0]
    assert all(isinstance(text, str) for text, _ in texts)


@pytest.mark.parametrize(
    ("fields", "fault"),
    [
        ({"datatype": "FP32"}, "datatype 'FP32', expected 'BYTES'"),
        ({"shape": []}, "shape [], expected [N] or [N, 1] or, for pairs, [N, 2]"),
        ({"shape": [1, 3]}, "shape [1, 3], expected [N] or [N, 1] or, for pairs, [N, 2]"),
        ({"shape": [1, 1, 1]}, "shape [1, 1, 1], expected"),
        ({"shape": [-1]}, "shape [-1], expected"),
        ({"shape": [1, -1]}, "shape [1, -1], expected"),
        ({"shape": [0], "data": []}, "shape [0], expected at least one text"),
        ({"shape": [17]}, "shape [17], at most 16 texts are allowed"),
        ({"shape": [2**62, 2]}, "at most 16 texts are allowed"),
        ({}, "no 'data', and no 'binary_data_size'"),
        ({"data": ["a", "b"]}, "2 elements, its shape says 1"),
        ({"data": []}, "0 elements, its shape says 1"),
        ({"data": [7]}, "element 0 is not a string"),
        ({"data": [None]}, "element 0 is not a string"),
        ({"data": [["a"]]}, "element 0 is not a string"),
        ({"shape": [2, 2], "data": [["a", "b"]]}, "1 rows, its shape says 2"),
        ({"shape": [2, 2], "data": [["a", "b"], ["c"]]}, "row 1 is not a list of 2"),
        ({"shape": [2, 2], "data": [["a", "b"], "c"]}, "row 1 is not a list of 2"),
        ({"shape": [1, 2], "data": [["a", ["b"]]]}, "element 1 is not a string"),
        ({"data": ["a"], "parameters": {"binary_data_size": 5}}, "exclude each other"),
        ({"parameters": {"binary_data_size": 5}}, "5, the body has 0 bytes left"),
        ({"parameters": {"shared_memory_region": "r"}}, "shared memory is not supported"),
    ],
)
def test_what_is_wrong_with_a_tensor_is_named(fields: dict[str, Any], fault: str) -> None:
    said = refused(tensor(**fields))
    assert said.startswith("input 'text': ")
    assert fault in said


@pytest.mark.parametrize(
    ("data", "count", "fault"),
    [
        (b"", 1, "ends before element 0 of 1"),
        (b"\1\0\0", 1, "ends before element 0 of 1"),
        (pack_strings(["a"]), 2, "ends before element 1 of 2"),
        (b"\2\0\0\0a", 1, "ends within element 0 of 1"),
        (b"\xff\xff\xff\xffa", 1, "ends within element 0 of 1"),
        (b"\1\0\0\0\xff", 1, "element 0 is not UTF-8"),
        # A surrogate, as some encoders write it.
        (b"\3\0\0\0\xed\xa0\x80", 1, "element 0 is not UTF-8"),
        (pack_strings(["a", "b"]), 1, "5 bytes are left after its 1 elements"),
    ],
)
def test_what_is_wrong_with_bytes_is_named(data: bytes, count: int, fault: str) -> None:
    assert fault in refused(sized("text", [count], data), attached=data)


def test_what_is_wrong_among_tensors_is_named() -> None:
    one = tensor(data=["a"])
    assert refused() == "input 'text': missing"
    assert refused(tensor("text_pair", data=["a"])) == "input 'text': missing"
    assert refused(one, one) == "input 'text': given twice"
    assert refused(tensor("x" * 5000, data=["a"])).startswith(f"input '{'x' * 64}': no such input;")
    assert refused(one, attached=b"abc") == "3 bytes after the JSON belong to no input"
    two = tensor("text_pair", shape=[2], data=["a", "b"])
    assert refused(one, two) == "input 'text_pair': 2 texts, but 'text' has 1"
    wide = tensor(shape=[1, 2], data=["a", "b"])
    assert "has the pairs already" in refused(wide, tensor("text_pair", data=["c"]))
    assert refused(tensor("text_pair", shape=[1, 2], data=["a", "b"])).endswith("[N] or [N, 1]")


def test_outputs_are_those_named_each_in_its_form() -> None:
    def wanted(outputs: Any = None, **parameters: Any) -> list[SelectedOutput]:
        content = {"inputs": [], "outputs": outputs, "parameters": parameters}
        return selected_outputs(InferRequest.model_validate(content))

    assert (
        wanted() == wanted([]) == [SelectedOutput("label", False), SelectedOutput("probs", False)]
    )
    every = wanted(binary_data_output=True)
    assert every == [SelectedOutput("label", True), SelectedOutput("probs", True)]
    named = [
        {"name": "tokens"},
        {"name": "probs", "parameters": {"binary_data": False, "classification": 2}},
    ]
    chosen = wanted(named, binary_data_output=True)
    assert chosen == [SelectedOutput("tokens", True), SelectedOutput("probs", False, 2)]
    for outputs, fault in (
        ([{"name": "logits"}], "output 'logits': no such output; there are label, probs, trunc"),
        ([{"name": "label"}] * 2, "output 'label': named twice"),
        ([{"name": "label", "parameters": {"classification": 1}}], "is for 'probs'"),
        ([{"name": "probs", "parameters": {"shared_memory_region": "r"}}], "shared memory"),
    ):
        with pytest.raises(InvalidRequest, match=fault):
            wanted(outputs)


@given(st.lists(TEXTS, min_size=1, max_size=5), st.lists(st.booleans(), min_size=4, max_size=4))
def test_answers_decode_to_the_arrays_that_they_were_made_of(
    texts: list[str], binary: list[bool]
) -> None:
    count = len(texts)
    strings = np.empty(count, dtype=object)
    strings[:] = texts
    arrays = {
        "label": strings,
        "probs": np.linspace(0, 1, 3 * count, dtype=np.float32).reshape(count, 3),
        "truncated": np.arange(count) % 2 == 0,
        "tokens": np.arange(count, dtype=np.int32),
    }
    outputs = [
        OutputTensor(name, array, flag)
        for (name, array), flag in zip(arrays.items(), binary, strict=True)
    ]
    body, length = asyncio.run(encode_answer({"model_name": "m"}, outputs))
    assert (length is None) == (not any(binary))
    head = orjson.loads(body[:length])
    assert list(head) == ["model_name", "outputs"]
    place = len(body) if length is None else length
    types = {"FP32": "<f4", "INT32": "<i4", "BOOL": "?"}
    for shown, (name, array), flag in zip(head["outputs"], arrays.items(), binary, strict=True):
        assert (shown["name"], shown["shape"]) == (name, list(array.shape))
        if not flag:
            assert list(shown) == ["name", "shape", "datatype", "data"]
            assert shown["data"] == array.ravel().tolist()
            continue
        size = shown["parameters"]["binary_data_size"]
        data, place = body[place : place + size], place + size
        if shown["datatype"] == "BYTES":
            assert list(unpack_strings(data, count)) == texts
        else:
            assert np.array_equal(np.frombuffer(data, types[shown["datatype"]]), array.ravel())
    assert place == len(body)


def test_classes_are_the_best_labels_the_earlier_one_first_of_equals() -> None:
    scores = np.array([[0.25, 0.5, 0.25], [0.1, 0.2, 0.7]], dtype=np.float32)
    best = list(top_classes(scores, ["a", "b:c", "d"], 2))
    assert best == [["0.500000:1:b:c", "0.250000:0:a"], ["0.700000:2:d", "0.200000:1:b:c"]]
    assert [len(row) for row in top_classes(scores, ["a", "b", "d"], 99)] == [3, 3]
