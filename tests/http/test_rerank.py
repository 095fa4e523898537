"""Reranking in the shapes of TEI and of vLLM (Jina, Cohere): texts sorted by a label's score."""

from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest

from adapters.adapter import classify, prepare, rows_of
from adapters.format.files import Adapter, serialize
from adapters.format.spec import AdapterSpec
from service.errors import InvalidRequest
from service.http.protocols.reranking import index_of_label
from tests.support.http_service import RunningService, serve
from tests.support.tiny_models import make_adapter, make_backbone, make_spec

QUERY = "is my card good"
TEXTS = ["free win now", "the card is bad", "", "call you", "a good card", "not my card"]
PAIRS = ("not_fitting", "fitting")


def pairs(**fields: Any) -> Adapter:
    chosen: dict[str, Any] = {"seed": 7, "labels": PAIRS, "max_length": 32} | fields
    return make_adapter(make_backbone(), **chosen)


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    folder = tmp_path_factory.mktemp("adapters")
    with serve(folder, MAX_INPUTS="6", DEFAULT_ADAPTER="pairs") as running:
        running.put("pairs", pairs())
        running.put("topics", pairs(labels=("sport", "money", "food")))
        running.put("one", pairs(labels=("fits",), activation="sigmoid"))
        yield running


def expected(adapter: Adapter, label: str) -> list[float]:
    """Each pair alone, without a service."""
    backbone = make_backbone()
    prepared = [prepare(adapter, backbone)]
    scores = []
    for text in TEXTS:
        encoding = backbone.encoder.encode(QUERY, text, max_length=adapter.spec.max_length)
        (answer,) = classify(backbone, backbone.pack(rows_of(prepared, [(0, encoding)])), prepared)
        scores.append(float(answer.scores[adapter.spec.labels.index(label)]))
    return scores


def tei(live: RunningService, path: str = "/rerank", **body: Any) -> httpx.Response:
    return live.client.post(path, json={"query": QUERY, "texts": TEXTS} | body)


def vllm(live: RunningService, path: str = "/v1/rerank", **body: Any) -> httpx.Response:
    return live.client.post(path, json={"query": QUERY, "documents": TEXTS} | body)


@pytest.mark.parametrize("path", ["/rerank", "/adapters/pairs/rerank"])
def test_texts_come_sorted_by_their_score_with_the_query(live: RunningService, path: str) -> None:
    answer = tei(live, path, return_text=True)
    ranks = answer.json()
    scores = expected(pairs(), "fitting")
    order = np.argsort(-np.array(scores), kind="stable").tolist()
    assert [list(rank) for rank in ranks] == [["index", "text", "score"]] * len(TEXTS)
    assert [rank["index"] for rank in ranks] == order
    assert [rank["text"] for rank in ranks] == [TEXTS[index] for index in order]
    assert [rank["score"] for rank in ranks] == pytest.approx(
        [scores[index] for index in order], abs=1e-5
    )
    assert int(answer.headers["x-compute-tokens"]) > 0
    assert answer.headers["x-adapter-revision"]
    assert [list(rank) for rank in tei(live, path).json()] == [["index", "score"]] * len(TEXTS)


def test_raw_scores_have_the_same_order_and_are_logits(live: RunningService) -> None:
    raw, plain = tei(live, raw_scores=True).json(), tei(live).json()
    assert [rank["index"] for rank in raw] == [rank["index"] for rank in plain]
    assert np.exp([rank["score"] for rank in raw]) == pytest.approx(
        [rank["score"] for rank in plain], abs=1e-5
    )


def test_a_label_is_named_where_the_labels_do_not_tell(live: RunningService) -> None:
    path = "/adapters/topics/rerank"
    missing = tei(live, path)
    assert missing.status_code == 422
    assert missing.json() == {
        "error": "label: missing: by which label are texts sorted, of sport, money, food?",
        "error_type": "Validation",
    }
    unknown = tei(live, path, label="art")
    assert unknown.json()["error"].endswith("no such label, but sport, money, food")
    ranks = tei(live, path, label="money").json()
    scores = expected(pairs(labels=("sport", "money", "food")), "money")
    assert [rank["index"] for rank in ranks] == np.argsort(-np.array(scores)).tolist()
    other = tei(live, "/adapters/pairs/rerank", label="not_fitting").json()
    assert [rank["index"] for rank in other] == [rank["index"] for rank in tei(live).json()][::-1]
    assert tei(live, "/adapters/one/rerank").status_code == 200


@pytest.mark.parametrize(
    ("labels", "yes"),
    [
        (("not_equivalent", "equivalent"), "equivalent"),
        (("entailment", "not_entailment"), "entailment"),
        (("relevant", "irrelevant"), "relevant"),
        (("valid", "invalid"), "valid"),
        (("related", "unrelated"), "related"),
        (("no", "yes"), None),
        (("ham", "spam"), None),
        (("in", "out"), None),
    ],
)
def test_of_two_labels_one_may_be_the_no_of_the_other(
    labels: tuple[str, str], yes: str | None
) -> None:
    spec: AdapterSpec = make_spec(make_backbone(), labels=labels)
    if yes is None:
        with pytest.raises(InvalidRequest):
            index_of_label(spec, None)
    else:
        assert labels[index_of_label(spec, None)] == yes
    assert index_of_label(spec, labels[1]) == 1


@pytest.mark.parametrize("path", ["/v1/rerank", "/v2/rerank"])
def test_documents_are_answered_in_vllms_shape(live: RunningService, path: str) -> None:
    answer = vllm(live, path, model="pairs", priority=1)
    content = answer.json()
    assert list(content) == ["id", "model", "usage", "results"]
    assert content["id"] == f"rerank-{answer.headers['x-request-id']}"
    assert content["model"] == "pairs"
    assert content["usage"]["prompt_tokens"] == content["usage"]["total_tokens"] > 0
    ranks = tei(live).json()
    assert [result["index"] for result in content["results"]] == [rank["index"] for rank in ranks]
    for result, rank in zip(content["results"], ranks, strict=True):
        assert list(result) == ["index", "document", "relevance_score"]
        assert result["document"] == {"text": TEXTS[result["index"]], "multi_modal": None}
        assert result["relevance_score"] == pytest.approx(rank["score"], abs=1e-5)


def test_as_many_documents_as_asked_for_and_only_if_asked_for(live: RunningService) -> None:
    everything = vllm(live).json()["results"]
    for top_n, count in ((0, 6), (2, 2), (6, 6), (99, 6)):
        results = vllm(live, top_n=top_n, return_documents=False).json()["results"]
        assert [result["index"] for result in results] == [
            result["index"] for result in everything[:count]
        ]
        assert all(list(result) == ["index", "relevance_score"] for result in results)
    objects = [{"text": text, "title": "ignored"} for text in TEXTS]
    assert [result["index"] for result in vllm(live, documents=objects).json()["results"]] == [
        result["index"] for result in everything
    ]
    alone = vllm(live, documents="a good card").json()["results"]
    assert [result["index"] for result in alone] == [0]


@pytest.mark.parametrize(
    ("body", "status", "kind"),
    [
        ({"model": "nobody"}, 404, "NotFoundError"),
        ({"documents": []}, 400, "BadRequestError"),
        ({"documents": [1]}, 400, "BadRequestError"),
        ({"documents": ["a"] * 7}, 413, "BadRequestError"),
        ({"query": None}, 400, "BadRequestError"),
        ({"top_n": -1}, 400, "BadRequestError"),
        ({"label": "nothing"}, 400, "BadRequestError"),
        ({"documents": ["card " * 40]}, 400, "BadRequestError"),
        ({"truncate_prompt_tokens": 4}, 400, "BadRequestError"),
        ({"use_activation": False}, 400, "BadRequestError"),
    ],
)
def test_mistakes_have_vllms_errors(
    live: RunningService, body: dict[str, Any], status: int, kind: str
) -> None:
    answer = vllm(live, **body)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["type"]) == (status, status, kind)


@pytest.mark.parametrize(
    ("body", "status", "kind"),
    [
        ({"texts": []}, 400, "Empty"),
        ({"texts": "one"}, 422, "Validation"),
        ({"texts": ["a"] * 7}, 413, "Validation"),
        ({"query": 1}, 422, "Validation"),
        ({"texts": ["card " * 40], "truncate": False}, 422, "Validation"),
        ({"truncation_direction": "middle"}, 422, "Validation"),
    ],
)
def test_mistakes_have_teis_errors(
    live: RunningService, body: dict[str, Any], status: int, kind: str
) -> None:
    answer = tei(live, **body)
    assert (answer.status_code, answer.json()["error_type"]) == (status, kind)


def test_long_pairs_are_cut_at_the_end_that_is_named(live: RunningService) -> None:
    texts = ["card " * 40 + "win"]
    for direction in ("left", "Right"):
        answer = tei(live, texts=texts, truncation_direction=direction)
        assert answer.headers["x-truncated-inputs"] == "1"
        assert int(answer.headers["x-compute-tokens"]) == 32
    cut = vllm(live, documents=texts, truncate_prompt_tokens=-1)
    assert cut.json()["usage"]["prompt_tokens"] == 32


def test_one_query_is_answered_by_one_revision(live: RunningService) -> None:
    live.put("tried", pairs())
    staged = live.client.put(
        "/v1/adapters/tried?stage=true", content=serialize(pairs(seed=8))
    ).json()["revision"]
    body = {"revision": staged, "percent": 50.0}
    assert live.client.put("/v1/adapters/tried/traffic", json=body).status_code == 200
    seen = set()
    for number in range(16):
        answer = tei(live, "/adapters/tried/rerank", query=f"{QUERY} {number}")
        assert answer.status_code == 200, answer.text
        revision = answer.headers["x-adapter-revision"]
        assert "," not in revision
        seen.add(revision)
    assert len(seen) == 2
    assert live.client.delete("/v1/adapters/tried").status_code == 204
