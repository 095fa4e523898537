"""Whatever is sent to /v1/predict: one error of one shape, every fault named, never a 500."""

import json
import socket
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.http_service import RunningService, error_of, serve
from tests.support.tiny_models import make_adapter, make_backbone


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    folder = tmp_path_factory.mktemp("adapters")
    with serve(folder, MAX_INPUTS="8", MAX_BODY_BYTES="2000000") as running:
        running.put("a", make_adapter(make_backbone()))
        yield running


def post(live: RunningService, content: bytes, **headers: str) -> httpx.Response:
    return live.client.post(
        "/v1/predict", content=content, headers={"Content-Type": "application/json"} | headers
    )


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"{", id="cut off"),
        pytest.param(b"{'inputs': 'x'}", id="single quotes"),
        pytest.param(b'{"inputs": "x"} trailing', id="trailing"),
        pytest.param(b'{"adapter":"a","inputs":"\\ud800"}', id="lone surrogate"),
        pytest.param(b'{"adapter":"a","inputs":"\xed\xa0\x80"}', id="surrogate as bytes"),
        pytest.param(b'{"adapter":"a","inputs":"\xff"}', id="not UTF-8"),
        pytest.param(b'{"adapter":"a","inputs":"x","top_k":NaN}', id="NaN"),
        pytest.param(b'{"adapter":"a","inputs":"x","top_k":Infinity}', id="Infinity"),
        pytest.param(b"[" * 100_000 + b"]" * 100_000, id="deep lists"),
        pytest.param(b'{"inputs":' * 50_000 + b"1" + b"}" * 50_000, id="deep objects"),
    ],
)
def test_what_is_no_json_is_400(live: RunningService, content: bytes) -> None:
    response = post(live, content)
    assert response.status_code == 400
    assert error_of(response)["type"] == "malformed_request"


@pytest.mark.parametrize(
    ("body", "faults"),
    [
        ({}, ["inputs: Field required"]),
        ([], ["body: "]),
        ("text", ["body: "]),
        (None, ["body: "]),
        ({"adapter": "a", "inputs": []}, ["inputs: List should have at least 1 item"]),
        ({"adapter": "a", "inputs": None}, ["inputs: Input should be a string, an object"]),
        ({"adapter": "a", "inputs": 5}, ["inputs: Input should be a string, an object"]),
        ({"adapter": "a", "inputs": [["a", "b"]]}, ["inputs.0: Input should be a string or an"]),
        ({"adapter": "a", "inputs": {"id": "x"}}, ["inputs.text: Field required"]),
        ({"adapter": "", "inputs": "x"}, ["adapter: String should have at least 1"]),
        ({"adapter": "a" * 200, "inputs": "x"}, ["adapter: String should have at most"]),
        (
            {"inputs": ["x", {"text": "y"}]},
            ["inputs.0.adapter: missing", "inputs.1.adapter: missing"],
        ),
        ({"adapter": "a", "inputs": "x", "top_k": 0}, ["top_k: "]),
        ({"adapter": "a", "inputs": "x", "top_k": True}, ["top_k: "]),
        ({"adapter": "a", "inputs": "x", "top_k": 1.5}, ["top_k: "]),
        ({"adapter": "a", "inputs": "x", "timeout_ms": 0}, ["timeout_ms: "]),
        ({"adapter": "a", "inputs": "x", "timeout_ms": 10**30}, ["timeout_ms: "]),
        ({"adapter": "a", "inputs": {"text": "x", "id": "i" * 257}}, ["inputs.id: "]),
        (
            {"adapter": 1, "inputs": ["x", 2, {"text": 3, "tex": "y"}], "explain": "yes", "k": 1},
            [
                "adapter: Input should be a valid string",
                "inputs.1: Input should be a string or an object with `text`",
                "inputs.2.text: Input should be a valid string",
                "inputs.2.tex: Extra inputs are not permitted",
                'explain: Input should be true, false, "attention" or "occlusion"',
                "k: Extra inputs are not permitted",
            ],
        ),
    ],
)
def test_every_fault_is_named_with_its_place(
    live: RunningService, body: Any, faults: list[str]
) -> None:
    response = post(live, json.dumps(body).encode())
    assert response.status_code == 422
    error = error_of(response)
    assert error["type"] == "invalid_request"
    assert len(error["details"]) == len(faults)
    for detail, fault in zip(error["details"], faults, strict=True):
        assert detail.startswith(fault)


def test_only_json_is_read_as_json(live: RunningService) -> None:
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""):
        response = post(live, b'{"adapter":"a","inputs":"x"}', **{"Content-Type": kind})
        assert response.status_code == 415, kind
        assert error_of(response)["type"] == "unsupported_media_type"
    for kind in ("application/json", "application/json; charset=utf-8", "Application/problem+JSON"):
        response = post(live, b'{"adapter":"a","inputs":"x"}', **{"Content-Type": kind})
        assert response.status_code == 200, kind


def test_too_many_inputs_are_413_before_any_is_looked_at(live: RunningService) -> None:
    assert live.predict(adapter="a", inputs=["x"] * 8)["results"]
    for inputs in (["x"] * 9, [1] * 9):
        response = live.client.post("/v1/predict", json={"adapter": "a", "inputs": inputs})
        assert response.status_code == 413
        assert "at most 8" in error_of(response)["message"]


def test_odd_but_valid_text_is_answered(live: RunningService) -> None:
    texts = ["\x00", "a\x00b", "\ufeff", "🙂" * 1000, "\n\t\r", "win" * 300_000, "‮evil", '"}]']
    results = live.predict(adapter="a", inputs=texts)["results"]
    assert len(results) == len(texts)
    assert all(0.0 <= item["score"] <= 1.0 for item in results)


def test_repeated_keys_mean_the_last_one(live: RunningService) -> None:
    response = post(live, b'{"adapter":"zzz","adapter":"a","inputs":"x"}')
    assert response.status_code == 200


def test_junk_fields_without_end_are_one_fault_and_cheap(live: RunningService) -> None:
    content = json.dumps({f"k{index}": 1 for index in range(100_000)} | {"inputs": "x"}).encode()
    response = post(live, content)
    assert response.status_code == 422
    assert error_of(response)["details"] == ["body: 100001 fields, far more than there are"]
    assert response.elapsed.total_seconds() < 2


def test_a_long_announced_body_is_refused_before_it_is_sent(live: RunningService) -> None:
    address = httpx.URL(live.url)
    with socket.create_connection((address.host, address.port or 0), timeout=5) as connection:
        connection.sendall(
            b"POST /v1/predict HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Content-Length: 99999999999\r\n\r\n"
        )
        assert connection.recv(12) == b"HTTP/1.1 413"


def test_a_long_chunked_body_is_given_up_at_the_limit(live: RunningService) -> None:
    sent = 0

    def chunks() -> Iterator[bytes]:
        nonlocal sent
        for _ in range(40):
            sent += 100_000
            yield b" " * 100_000

    response = live.client.post(
        "/v1/predict", content=chunks(), headers={"Content-Type": "application/json"}
    )
    assert response.status_code == 413
    assert error_of(response)["type"] == "too_large"
    # and the connection, or a new one, goes on working
    assert live.predict(adapter="a", inputs="x")["results"]


def test_unknown_routes_and_methods_have_the_one_shape(live: RunningService) -> None:
    assert error_of(live.client.get("/v1/nothing"))["type"] == "not_found"
    assert error_of(live.client.get("/v1/predict/"))["type"] == "not_found"
    response = live.client.delete("/v1/predict")
    assert response.status_code == 405
    assert error_of(response)["type"] == "method_not_allowed"
    assert response.headers["allow"] == "POST"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=12,
)
FIELDS = st.sampled_from(
    ["adapter", "inputs", "top_k", "truncate", "explain", "timeout_ms", "text", "id"]
)


@pytest.mark.slow
@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(body=JSON | st.dictionaries(FIELDS, JSON | st.just("a"), max_size=6))
def test_no_json_whatsoever_makes_a_500(live: RunningService, body: Any) -> None:
    try:
        content = json.dumps(body).encode()
    except UnicodeEncodeError:
        return
    response = post(live, content)
    assert response.status_code in (200, 400, 404, 413, 422, 504), response.text
    json.loads(response.content, parse_constant=lambda name: pytest.fail(f"{name} in an answer"))


@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(content=st.binary(max_size=60))
def test_no_bytes_whatsoever_make_a_500(live: RunningService, content: bytes) -> None:
    response = post(live, content)
    assert response.status_code in (400, 422), response.text
    error_of(response)
