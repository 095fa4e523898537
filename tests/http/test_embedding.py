"""Vectors of texts in the shapes of TEI and OpenAI: the backbone's mean, as transformers has it."""

import base64
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from adapters.backbone.loading import load_backbone
from tests.support.http_service import RunningService, error_of, serve
from tests.support.key_files import bearer, write_keys
from tests.support.pooling import mean_pooled
from tests.support.tiny_models import make_adapter, save_backbone

TEXTS = ["free win now", "", "the card is bad, call you", "WIN!", "you " * 30]
SIZE = 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_backbone(tmp_path_factory.mktemp("backbone"), hidden_size=SIZE)


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> Iterator[RunningService]:
    def load() -> Any:
        return load_backbone(str(folder), device="cpu", dtype="float32")

    with serve(tmp_path_factory.mktemp("adapters"), load=load, MAX_INPUTS="8") as running:
        running.put("a", make_adapter(load(), seed=1))
        yield running


def tei(live: RunningService, **body: Any) -> httpx.Response:
    return live.client.post("/embed", json={"inputs": TEXTS} | body)


def openai(live: RunningService, **body: Any) -> httpx.Response:
    return live.client.post("/v1/embeddings", json={"input": TEXTS} | body)


def test_vectors_are_those_of_transformers_mean_pooling(live: RunningService, folder: Path) -> None:
    expected = mean_pooled(folder, TEXTS)
    answer = tei(live)
    vectors = np.array(answer.json())
    assert vectors.shape == (len(TEXTS), SIZE)
    np.testing.assert_allclose(vectors, expected, atol=1e-5)
    assert int(answer.headers["x-compute-tokens"]) > 0
    alone = [tei(live, inputs=text).json()[0] for text in TEXTS]
    np.testing.assert_allclose(alone, expected, atol=1e-5)


def test_vectors_do_not_depend_on_the_adapters_beside_them(
    live: RunningService, folder: Path
) -> None:
    """Many requests of both kinds at a time share batches."""
    expected = mean_pooled(folder, TEXTS)
    plain = live.predict(adapter="a", inputs=TEXTS)["results"]
    with ThreadPoolExecutor(8) as pool:
        embedded = [pool.submit(tei, live) for _ in range(16)]
        body = {"adapter": "a", "inputs": TEXTS}
        predicted = [pool.submit(live.predict, **body) for _ in range(16)]
    for answer in embedded:
        np.testing.assert_allclose(answer.result().json(), expected, atol=1e-5)
    for other in predicted:
        scores = [result["score"] for result in other.result()["results"]]
        assert scores == pytest.approx([result["score"] for result in plain], abs=1e-5)


def test_vectors_may_keep_their_length_or_lose_dimensions(
    live: RunningService, folder: Path
) -> None:
    expected = mean_pooled(folder, TEXTS)
    raw = np.array(tei(live, normalize=False).json())
    lengths = np.linalg.norm(raw, axis=1, keepdims=True)
    assert not np.allclose(lengths, 1, atol=1e-2)
    np.testing.assert_allclose(raw / lengths, expected, atol=1e-5)
    few = np.array(tei(live, dimensions=5).json())
    assert few.shape == (len(TEXTS), 5)
    first = expected[:, :5]
    np.testing.assert_allclose(few, first / np.linalg.norm(first, axis=1, keepdims=True), atol=1e-5)


def test_openais_shape_in_numbers_and_in_base64(live: RunningService, folder: Path) -> None:
    name = live.service.engine.info.identity.name
    expected = mean_pooled(folder, TEXTS)
    content = openai(live, model=name.rsplit("/", 1)[-1], user="somebody").json()
    assert list(content) == ["object", "data", "model", "usage"]
    assert (content["object"], content["model"]) == ("list", name)
    assert [list(item) for item in content["data"]] == [["object", "index", "embedding"]] * 5
    assert [item["index"] for item in content["data"]] == list(range(5))
    vectors = [item["embedding"] for item in content["data"]]
    np.testing.assert_allclose(vectors, expected, atol=1e-5)
    assert content["usage"]["prompt_tokens"] == content["usage"]["total_tokens"] > 0
    packed = openai(live, encoding_format="base64").json()["data"]
    vectors = [np.frombuffer(base64.b64decode(item["embedding"]), "<f4") for item in packed]
    np.testing.assert_allclose(vectors, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("body", "status", "kind"),
    [
        ({"inputs": []}, 400, "Empty"),
        ({"inputs": [1, 2]}, 422, "Validation"),
        ({"inputs": ["a"] * 9}, 413, "Validation"),
        ({"inputs": "card " * 200, "truncate": False}, 422, "Validation"),
        ({"prompt_name": "query"}, 422, "Validation"),
        ({"dimensions": SIZE + 1}, 422, "Validation"),
        ({"dimensions": 0}, 422, "Validation"),
    ],
)
def test_mistakes_have_teis_errors(
    live: RunningService, body: dict[str, Any], status: int, kind: str
) -> None:
    answer = tei(live, **body)
    assert (answer.status_code, answer.json()["error_type"]) == (status, kind), answer.text


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"model": "a"}, 404),
        ({"input": []}, 400),
        ({"input": [[1, 2]]}, 400),
        ({"input": "card " * 200}, 400),
        ({"encoding_format": "int8"}, 400),
        ({"dimensions": SIZE + 1}, 400),
        ({"truncate_prompt_tokens": 5}, 400),
    ],
)
def test_mistakes_have_openais_errors(
    live: RunningService, body: dict[str, Any], status: int
) -> None:
    answer = openai(live, **body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, status), answer.text


def test_a_long_text_is_cut_and_counted_or_refused_with_its_tokens(live: RunningService) -> None:
    assert tei(live, inputs=["card " * 200, "card"]).headers["x-truncated-inputs"] == "1"
    most = live.service.engine.info.max_tokens
    for limit in (-1, most, most + 1):
        cut = openai(live, input="card " * 200, truncate_prompt_tokens=limit).json()
        assert cut["usage"]["prompt_tokens"] == most
    message = openai(live, input="card " * 200).json()["error"]["message"]
    assert "input.0: 202 tokens, the backbone reads" in message


def test_vectors_are_bounded_and_charged_like_answers(
    tmp_path_factory: pytest.TempPathFactory, folder: Path
) -> None:
    place = tmp_path_factory.mktemp("bounds")
    keys = write_keys(place / "keys.jsonl", few={"tokens_per_minute": 8})

    def load() -> Any:
        return load_backbone(str(folder), device="cpu", dtype="float32")

    keys_file = str(place / "keys.jsonl")
    with serve(
        place / "adapters", load=load, KEYS_FILE=keys_file, MAX_ANSWER_BYTES="1024"
    ) as running:
        key = bearer(keys["few"])
        large = running.client.post("/embed", json={"inputs": ["a"] * 3}, headers=key)
        assert large.status_code == 413
        assert running.client.post("/embed", json={"inputs": "a"}).status_code == 401
        body = {"input": ["free win now", "free win now"], "dimensions": 2}
        assert running.client.post("/v1/embeddings", json=body, headers=key).status_code == 200
        assert running.client.post("/v1/embeddings", json=body, headers=key).status_code == 429


def test_no_adapter_is_named_like_the_rows_of_vectors(live: RunningService) -> None:
    wrong = live.client.post("/v1/predict", json={"adapter": "(embedding)", "inputs": "x"})
    assert wrong.status_code == 404
    assert error_of(wrong)["type"] == "adapter_not_found"
