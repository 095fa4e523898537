"""POST /v1/predict: shapes, adapters, options, deadlines and clients that go away."""

import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch

from adapters.adapter import classify, prepare
from adapters.backbone.model import Backbone
from adapters.format.files import Adapter
from adapters.packed.packing import Row, RowShape
from service.http.classify import INLINE_CHARACTERS
from service.http.openapi.schemas import PredictResponse
from tests.support.http_service import Brake, RunningService, error_of, serve, until
from tests.support.tiny_models import make_adapter, make_backbone

TOPICS = ("sport", "money", "food")
# No score of a random head reaches the second one.
STRICT = (0.01, 0.9999, 0.01)


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    with serve(tmp_path_factory.mktemp("adapters")) as running:
        backbone = make_backbone()
        running.put("sms-spam", spam(backbone))
        running.put("topics", topics(backbone))
        running.put("tags", topics(backbone, seed=3, activation="sigmoid"))
        running.put("strict", topics(backbone, seed=3, activation="sigmoid", thresholds=STRICT))
        running.put("short", make_adapter(backbone, seed=4, max_length=8))
        yield running


def spam(backbone: Backbone) -> Adapter:
    return make_adapter(backbone, seed=1, labels=("ham", "spam"))


def topics(
    backbone: Backbone,
    *,
    seed: int = 2,
    activation: str = "softmax",
    thresholds: tuple[float, ...] | None = None,
) -> Adapter:
    """Differs from `spam` in all that a batch is made of."""
    return make_adapter(
        backbone,
        seed=seed,
        labels=TOPICS,
        prompt_length=5,
        insertion_layer=2,
        activation=activation,
        thresholds=thresholds,
    )


def alone(backbone: Backbone, adapter: Adapter, text: str, pair: str | None = None) -> list[float]:
    """The scores of one text without a service, in the order of its labels."""
    prepared = prepare(adapter, backbone)
    encoding = backbone.encoder.encode(text, pair, max_length=adapter.spec.max_length)
    batch = backbone.pack([Row(encoding, RowShape.of(adapter.spec), 0)])
    scores: list[float] = classify(backbone, batch, [prepared])[0].scores.tolist()
    return scores


def current(live: RunningService, name: str) -> str:
    return live.service.catalog.entry(name).require_current()


def test_one_text_gets_the_whole_answer_in_the_documented_shape(live: RunningService) -> None:
    response = live.client.post("/v1/predict", json={"adapter": "sms-spam", "inputs": "hello you"})
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/json"
    answer = PredictResponse.model_validate(response.json())
    assert set(response.json()["results"][0]) == {
        "id", "adapter", "revision", "label", "score", "scores", "tokens", "truncated",
    }  # fmt: skip
    result = answer.results[0]
    assert (result.id, result.adapter, result.tokens, result.truncated) == (
        None,
        "sms-spam",
        4,
        False,
    )
    assert result.revision == current(live, "sms-spam")
    assert (result.label, result.score) == (result.scores[0].label, result.scores[0].score)
    assert sum(item.score for item in result.scores) == pytest.approx(1.0, abs=1e-6)
    assert all(value >= 0 for value in answer.timings_ms.model_dump(exclude_none=True).values())
    assert answer.timings_ms.inference > 0


def test_mixed_inputs_answer_in_order_as_each_would_alone(
    live: RunningService, backbone: Backbone
) -> None:
    inputs = [
        "free win now",
        {"text": "my card is not good", "adapter": "topics", "id": "a"},
        {"text": "call", "text_pair": "hello", "id": "b"},
        {
            "text": "the bad card",
            "adapter": f"sms-spam@{current(live, 'sms-spam')[:6]}",
        },
    ]
    results = live.predict(adapter="sms-spam", inputs=inputs)["results"]
    assert [item["id"] for item in results] == [None, "a", "b", None]
    assert [item["adapter"] for item in results] == ["sms-spam", "topics", "sms-spam", "sms-spam"]
    one, other = spam(backbone), topics(backbone)
    expected = [
        (one, alone(backbone, one, "free win now")),
        (other, alone(backbone, other, "my card is not good")),
        (one, alone(backbone, one, "call", "hello")),
        (one, alone(backbone, one, "the bad card")),
    ]
    for item, (adapter, scores) in zip(results, expected, strict=True):
        by_label = {score["label"]: score["score"] for score in item["scores"]}
        # float32 and another order of additions in a packed batch
        assert [by_label[label] for label in adapter.spec.labels] == pytest.approx(scores, abs=1e-5)


def test_text_and_object_and_list_of_one_are_the_same_request(live: RunningService) -> None:
    shapes = ("win", {"text": "win"}, ["win"], [{"text": "win"}])
    answers = [live.predict(adapter="topics", inputs=shape)["results"] for shape in shapes]
    assert all(len(answer) == 1 for answer in answers)
    scores = [[item["score"] for item in answer[0]["scores"]] for answer in answers]
    assert np.allclose(scores, scores[0], atol=1e-6)


def test_top_k_limits_the_scores_and_not_the_label(live: RunningService) -> None:
    full = live.predict(adapter="topics", inputs="win")["results"][0]
    assert [item["score"] for item in full["scores"]] == sorted(
        (item["score"] for item in full["scores"]), reverse=True
    )
    for k, expected in ((1, 1), (2, 2), (3, 3), (1000, 3)):
        cut = live.predict(adapter="topics", inputs="win", top_k=k)["results"][0]
        assert len(cut["scores"]) == expected
        assert cut["label"] == full["label"]


def test_sigmoid_scores_stand_alone_and_come_best_first(
    live: RunningService, backbone: Backbone
) -> None:
    adapter = topics(backbone, seed=3, activation="sigmoid")
    result = live.predict(adapter="tags", inputs="my card")["results"][0]
    scores = [item["score"] for item in result["scores"]]
    assert scores == pytest.approx(
        sorted(alone(backbone, adapter, "my card"), reverse=True), abs=1e-5
    )
    assert abs(sum(scores) - 1.0) > 1e-3


@pytest.mark.parametrize("name", ["tags", "strict"])
def test_a_label_is_given_if_its_score_reaches_its_threshold(
    live: RunningService, name: str
) -> None:
    thresholds = dict(zip(TOPICS, STRICT if name == "strict" else (0.5,) * 3, strict=True))
    texts = ["my card", "win now", "free", "call you hello", ""]
    for result in live.predict(adapter=name, inputs=texts)["results"]:
        reached = [
            item["label"] for item in result["scores"] if item["score"] >= thresholds[item["label"]]
        ]
        # In the order of the scores, which are best first.
        assert result["labels"] == reached
        assert result["label"] == result["scores"][0]["label"]


def test_a_set_of_labels_is_whole_whatever_top_k_is(live: RunningService) -> None:
    for text in ("my card", "win now", "free"):
        whole = live.predict(adapter="strict", inputs=text)["results"][0]
        cut = live.predict(adapter="strict", inputs=text, top_k=1)["results"][0]
        assert (cut["labels"], len(cut["scores"])) == (whole["labels"], 1)
        assert len(whole["labels"]) == 2


def test_an_empty_set_is_an_answer_and_is_counted(live: RunningService, backbone: Backbone) -> None:
    live.put("none", topics(backbone, seed=3, activation="sigmoid", thresholds=(0.9999,) * 3))
    answer = live.client.post("/v1/predict", json={"adapter": "none", "inputs": ["a", "b"]})
    assert [item.labels for item in PredictResponse.model_validate(answer.json()).results] == [
        [],
        [],
    ]
    given = "idspam_labels_given_total"
    assert live.metric(given, adapter="none", label="") == 2
    # Texts are counted by their best label as well.
    assert (
        sum(live.metric("idspam_predictions_total", adapter="none", label=each) for each in TOPICS)
        == 2
    )
    live.put("none", topics(backbone, seed=3, activation="sigmoid", thresholds=(0.0001,) * 3))
    live.predict(adapter="none", inputs="a")
    assert [live.metric(given, adapter="none", label=each) for each in TOPICS] == [1, 1, 1]
    assert live.client.delete("/v1/adapters/none").status_code == 204
    assert 'idspam_labels_given_total{adapter="none"' not in live.client.get("/metrics").text


def test_equal_scores_keep_the_order_of_the_labels(
    live: RunningService, backbone: Backbone
) -> None:
    adapter = topics(backbone)
    undecided = {
        name: torch.zeros_like(tensor) if name.startswith("head.") else tensor
        for name, tensor in adapter.tensors.items()
    }
    live.put("undecided", Adapter(adapter.spec, undecided))
    scores = live.predict(adapter="undecided", inputs="win")["results"][0]["scores"]
    assert [item["label"] for item in scores] == list(adapter.spec.labels)
    assert [item["score"] for item in scores] == pytest.approx([1 / 3] * 3)
    assert live.client.delete("/v1/adapters/undecided").status_code == 204


def test_empty_text_is_classified_from_its_special_tokens(
    live: RunningService, backbone: Backbone
) -> None:
    results = live.predict(adapter="sms-spam", inputs=["", {"text": ""}, "   "])["results"]
    assert [item["tokens"] for item in results] == [2, 2, 2]
    adapter = spam(backbone)
    assert results[0]["score"] == pytest.approx(max(alone(backbone, adapter, "")), abs=1e-5)


def test_long_text_is_truncated_and_says_so_on_both_tokenizing_roads(live: RunningService) -> None:
    for text in ("win " * 20, "win " * INLINE_CHARACTERS):
        result = live.predict(adapter="short", inputs=[text, "win"])["results"]
        assert [item["truncated"] for item in result] == [True, False]
        assert result[0]["tokens"] == 8


def test_truncate_false_names_each_long_input_and_its_tokens(live: RunningService) -> None:
    body = {"adapter": "short", "inputs": ["win", "win " * 9, "win " * 4000], "truncate": False}
    response = live.client.post("/v1/predict", json=body)
    assert response.status_code == 422
    details = error_of(response)["details"]
    assert [item.split(",")[0] for item in details] == [
        "inputs.1: 11 tokens",
        "inputs.2: 4002 tokens",
    ]
    assert live.predict(adapter="short", inputs="win " * 6, truncate=False)["results"]


def test_many_texts_in_a_thread_answer_like_few_in_the_loop(live: RunningService) -> None:
    texts = ["free win", "my card is not good", "hello"] * 100
    assert sum(map(len, texts)) > INLINE_CHARACTERS
    inputs = [{"text": text, "adapter": name} for text in texts for name in ("topics", "short")]
    many = live.predict(inputs=inputs)["results"]
    few = live.predict(inputs=inputs[:6])["results"]
    assert len(many) == 600
    for index, result in enumerate(many):
        assert result["adapter"] == few[index % 6]["adapter"]
        assert result["score"] == pytest.approx(few[index % 6]["score"], abs=1e-5)


def test_unknown_adapter_is_never_another_one_and_names_what_exists(live: RunningService) -> None:
    for body in (
        {"adapter": "sms", "inputs": "x"},
        {"inputs": ["x", {"text": "y", "adapter": "sms"}], "adapter": "topics"},
    ):
        response = live.client.post("/v1/predict", json=body)
        assert response.status_code == 404
        assert error_of(response)["type"] == "adapter_not_found"
        assert error_of(response)["details"] == ["short", "sms-spam", "strict", "tags", "topics"]


def test_unknown_or_ambiguous_revision_is_404(live: RunningService) -> None:
    revision = current(live, "topics")
    absent = "0" if revision[0] != "0" else "1"
    for reference in (f"topics@{absent}", "topics@", "topics@../../x", f"topics@{revision}0"):
        response = live.client.post("/v1/predict", json={"adapter": reference, "inputs": "x"})
        assert response.status_code == 404, reference
        assert error_of(response)["type"] == "revision_not_found"


@pytest.mark.slow
def test_deadline_answers_504_while_the_device_is_busy(tmp_path: Path) -> None:
    brake = Brake()
    with serve(tmp_path, load=brake.load) as live:
        live.put("a", make_adapter(make_backbone()))
        brake.on()
        response = live.client.post(
            "/v1/predict", json={"adapter": "a", "inputs": "x", "timeout_ms": 50}
        )
        brake.off()
        assert response.status_code == 504
        assert error_of(response)["type"] == "deadline_exceeded"
        assert live.predict(adapter="a", inputs="x")["results"]


@pytest.mark.slow
def test_rows_of_a_client_that_hung_up_are_dropped(tmp_path: Path) -> None:
    brake = Brake()
    with serve(tmp_path, load=brake.load) as live:
        live.put("a", make_adapter(make_backbone()))
        brake.on()
        first = threading.Thread(target=live.predict, kwargs={"adapter": "a", "inputs": "stays"})
        first.start()
        until(lambda: brake.holds)
        body = json.dumps({"adapter": "a", "inputs": ["goes"] * 5}).encode()
        address = httpx.URL(live.url)
        with socket.create_connection((address.host, address.port or 0)) as connection:
            head = (
                "POST /v1/predict HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                f"Content-Length: {len(body)}\r\n\r\n"
            )
            connection.sendall(head.encode() + body)
            until(lambda: live.service.health().details["waiting_entries"] == 5)
        until(lambda: live.service.health().details["waiting_entries"] == 0)
        brake.off()
        first.join()
        name, labels = "idspam_requests_total", {"route": "/v1/predict", "outcome": "disconnected"}
        until(lambda: live.metric(name, **labels) == 1)
        assert live.metric(name, route="/v1/predict", outcome="success") == 1
        assert (
            live.metric("idspam_predictions_total", adapter="a", label="ham")
            + live.metric("idspam_predictions_total", adapter="a", label="spam")
            == 1
        )


def test_more_than_may_wait_is_refused_at_once_with_retry_after(tmp_path: Path) -> None:
    brake = Brake()
    with serve(tmp_path, load=brake.load, MAX_WAITING_TOKENS="64") as live:
        live.put("a", make_adapter(make_backbone()))
        brake.on()
        running = [
            threading.Thread(target=live.predict, kwargs={"adapter": "a", "inputs": text})
            for text in ("one", "win " * 30)
        ]
        for thread in running:
            thread.start()
            until(lambda: brake.holds)
        until(lambda: live.service.health().details["waiting_entries"] == 1)
        response = live.client.post("/v1/predict", json={"adapter": "a", "inputs": "win " * 40})
        never = live.client.post("/v1/predict", json={"adapter": "a", "inputs": ["win " * 40] * 2})
        brake.off()
        for thread in running:
            thread.join()
        assert response.status_code == 429
        assert error_of(response)["type"] == "overloaded"
        assert int(response.headers["retry-after"]) >= 1
        assert never.status_code == 413
