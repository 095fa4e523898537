"""An answer that would be too large is refused before anything is computed, in every protocol."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters.format.spec import AdapterSpec
from service.errors import TooLarge
from service.http.answer_size import AnswerShape, refuse_large_answer
from service.http.predict import SCORE_BYTES
from tests.support.http_service import RunningService, serve
from tests.support.tiny_models import make_adapter, make_backbone, make_spec

# As large as labels may be.
MANY = tuple(f"{index:04d}" + "\u00e9" * 252 for index in range(4096))
TEXTS = [""] * 256


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    with serve(tmp_path_factory.mktemp("adapters")) as running:
        running.put("many", make_adapter(make_backbone(), labels=MANY))
        running.put("few", make_adapter(make_backbone(), labels=("ham", "spam")))
        yield running


def tensor(texts: list[str]) -> dict[str, Any]:
    return {"name": "text", "datatype": "BYTES", "shape": [len(texts)], "data": texts}


REQUESTS: dict[str, tuple[str, dict[str, Any]]] = {
    "predict": ("/v1/predict", {"adapter": "many", "inputs": TEXTS}),
    "tei": ("/adapters/many/predict", {"inputs": [["a"]] * 256}),
    "vllm": ("/classify", {"model": "many", "input": ["a"] * 1000}),
    "oip": ("/v2/models/many/infer", {"inputs": [tensor(["a"] * 1000)]}),
    "oip classes": (
        "/v2/models/many/infer",
        {
            "inputs": [tensor(TEXTS)],
            "outputs": [{"name": "probs", "parameters": {"classification": 4096}}],
        },
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", REQUESTS)
def test_a_small_request_cannot_ask_for_a_huge_answer(live: RunningService, name: str) -> None:
    path, body = REQUESTS[name]
    response = live.client.post(path, json=body)
    assert response.status_code == 413, response.text[:300]
    assert "the answer would have about" in response.text
    assert "send fewer" in response.text
    assert live.client.get("/metrics").status_code == 200


@pytest.mark.slow
def test_what_the_refusal_asks_for_is_answered(live: RunningService) -> None:
    body: dict[str, Any] = {"adapter": "many", "inputs": TEXTS, "top_k": 3}
    results = live.predict(**body)["results"]
    assert [len(item["scores"]) for item in results] == [3] * 256
    body = {"inputs": [["a"]] * 256, "parameters": {"top_k": 2}}
    assert live.client.post("/adapters/many/predict", json=body).status_code == 200
    outputs = [{"name": "probs", "parameters": {"classification": 2}}]
    body = {"inputs": [tensor(TEXTS)], "outputs": outputs}
    assert live.client.post("/v2/models/many/infer", json=body).status_code == 200
    assert len(live.predict(adapter="many", inputs="a")["results"][0]["scores"]) == 4096
    assert live.client.post("/v1/predict", json={"adapter": "few", "inputs": TEXTS}).is_success


def test_explanations_are_bounded_too(tmp_path_factory: pytest.TempPathFactory) -> None:
    with serve(tmp_path_factory.mktemp("adapters"), MAX_ANSWER_BYTES="100000") as running:
        running.put("few", make_adapter(make_backbone(), labels=("ham", "spam")))
        body = {"adapter": "few", "inputs": ["good card " * 60] * 12, "explain": True}
        response = running.client.post("/v1/predict", json=body)
        assert response.status_code == 413
        assert response.json()["error"]["message"].endswith("explain fewer inputs at once")
        hidden = running.client.post("/v1/predict", json=body | {"explain": "occlusion"})
        assert hidden.status_code == 413
        response = running.client.post("/v1/predict", json=body | {"inputs": ["good card"] * 12})
        assert response.status_code == 200


@dataclass
class Asked:
    spec: AdapterSpec


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(
    labels=st.lists(
        st.text(
            st.characters(codec="utf-8", categories=("L", "S", "P", "Zs")), min_size=1, max_size=256
        ),
        min_size=2,
        max_size=30,
        unique=True,
    ),
    texts=st.integers(1, 20),
    top_k=st.one_of(st.none(), st.integers(1, 40)),
    limit=st.integers(1024, 200_000),
)
def test_no_answer_is_larger_than_its_bound(
    labels: list[str], texts: int, top_k: int | None, limit: int
) -> None:
    asked = [Asked(make_spec(make_backbone(), labels=tuple(labels)))] * texts
    scores = [{"label": label, "score": 0.12345678901234567} for label in labels]
    scores.sort(key=lambda item: -len(orjson.dumps(item)))
    result = {
        "id": None,
        "adapter": "a" * 64,
        "revision": "0" * 64,
        "label": max(labels, key=len),
        "score": 0.12345678901234567,
        "scores": scores[:top_k],
        "tokens": 8192,
        "truncated": False,
    }
    try:
        refuse_large_answer(asked, AnswerShape(SCORE_BYTES, labels=True, top_k=top_k), limit)
    except TooLarge:
        return
    assert len(json.dumps([result] * texts, ensure_ascii=False).encode()) <= limit * 1.1
