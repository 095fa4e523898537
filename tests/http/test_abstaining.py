"""A best score that is too low is no answer: in every protocol, client, log and metric."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from service.client import Client
from tests.support.http_service import RunningService, error_of, serve, until
from tests.support.oip_requests import infer, outputs_of, refusal_of, text_tensor
from tests.support.tiny_models import make_adapter, make_backbone
from tests.support.typed_commands import refused, typed

TEXTS = ["free win now", "my card is not good", "", "call", "you are bad", "the good card is free"]
LABELS = ("ham", "spam", "other")
LOG = "decisions.jsonl"


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    """`plain` never abstains; `a` is the same adapter, and does from half of the texts."""
    folder, backbone = tmp_path_factory.mktemp("service"), make_backbone()
    with serve(folder / "adapters", DEFAULT_ADAPTER="a", DECISION_LOG=str(folder / LOG)) as running:
        running.put("plain", make_adapter(backbone, seed=1, labels=LABELS))
        scores = sorted(scores_of(running))
        middle = (scores[2] + scores[3]) / 2
        decision = {"abstain_below": middle, "precision": 0.9}
        running.put("a", make_adapter(backbone, seed=1, labels=LABELS, decision=decision))
        running.put("sets", make_adapter(backbone, seed=2, activation="sigmoid", labels=("x", "y")))
        yield running


def scores_of(live: RunningService) -> list[float]:
    """The best score of each of `TEXTS`."""
    results = live.predict(adapter="plain", inputs=TEXTS)["results"]
    return [result["score"] for result in results]


@pytest.fixture
def expected(live: RunningService) -> list[bool]:
    """Whether the adapter abstains from each of `TEXTS`."""
    scores = scores_of(live)
    return [score in sorted(scores)[:3] for score in scores]


def test_an_adapter_abstains_below_its_threshold_and_still_names_the_label(
    live: RunningService, expected: list[bool]
) -> None:
    results = live.predict(adapter="a", inputs=TEXTS)["results"]
    plain = live.predict(adapter="plain", inputs=TEXTS)["results"]
    assert [result.pop("abstained") for result in results] == expected
    for result, other in zip(results, plain, strict=True):
        assert "abstained" not in other
        same = ("label", "score", "scores", "tokens")
        assert [result[name] for name in same] == [other[name] for name in same]


def test_a_request_may_say_when_to_abstain(live: RunningService) -> None:
    scores = scores_of(live)
    for name in ("a", "plain"):
        for below in (0, 0.5, scores[0], 1.0):
            results = live.predict(adapter=name, inputs=TEXTS, abstain_below=below)["results"]
            # A score that is the threshold is an answer.
            assert [result["abstained"] for result in results] == [
                result["score"] < below for result in results
            ]
    without = live.predict(adapter="plain", inputs=TEXTS, abstain_below=None)["results"]
    assert not any("abstained" in result for result in without)


@pytest.mark.parametrize("value", [-0.1, 1.1, "0.5", True, [0.5]])
def test_what_is_no_share_is_refused(live: RunningService, value: Any) -> None:
    body = {"adapter": "a", "inputs": "x", "abstain_below": value}
    answer = live.client.post("/v1/predict", json=body)
    assert answer.status_code == 422
    assert error_of(answer)["message"].startswith("abstain_below: ")
    tensors = infer(live, text_tensor("x"), parameters={"abstain_below": value})
    assert "abstain_below" in refusal_of(tensors)


def test_adapters_for_several_labels_never_abstain(live: RunningService) -> None:
    (result,) = live.predict(adapter="sets", inputs="x")["results"]
    assert "abstained" not in result
    inputs = ["x", {"text": "y", "adapter": "a"}]
    body = {"adapter": "sets", "inputs": inputs, "abstain_below": 0.5}
    answer = live.client.post("/v1/predict", json=body)
    assert answer.status_code == 422
    assert error_of(answer)["details"] == [
        "inputs.0: adapter 'sets' gives several labels a text, abstain_below is for one"
    ]
    path, parameters = "/v2/models/sets/infer", {"abstain_below": 0.5}
    said = refusal_of(infer(live, text_tensor("x"), path=path, parameters=parameters))
    assert "gives several labels a text" in said
    answer = infer(live, text_tensor("x"), path=path, outputs=[{"name": "abstained"}])
    assert outputs_of(answer) == {"abstained": [False]}
    texts = {"model": "sets", "input": "x"}
    assert "x-abstained-inputs" not in live.client.post("/classify", json=texts).headers


def test_other_protocols_say_it_as_far_as_they_can(
    live: RunningService, expected: list[bool]
) -> None:
    (count,) = {str(sum(expected))}
    shown = [text for text in TEXTS if text]
    some = str(sum(no for text, no in zip(TEXTS, expected, strict=True) if text))
    tei = live.client.post("/predict", json={"inputs": [[text] for text in shown]})
    assert tei.headers["x-abstained-inputs"] == some
    assert len(tei.json()) == len(shown)
    vllm = live.client.post("/classify", json={"model": "a", "input": TEXTS})
    assert vllm.headers["x-abstained-inputs"] == count
    for body in ({"model": "plain", "input": TEXTS},):
        assert "x-abstained-inputs" not in live.client.post("/classify", json=body).headers

    oip = infer(live, text_tensor(*TEXTS))
    assert oip.json()["parameters"] == {"abstained": int(count)}
    requested = [{"name": "abstained"}]
    assert outputs_of(infer(live, text_tensor(*TEXTS), outputs=requested)) == {
        "abstained": expected
    }
    never = infer(live, text_tensor(*TEXTS), outputs=requested, parameters={"abstain_below": 0})
    assert outputs_of(never) == {"abstained": [False] * len(TEXTS)}
    assert "parameters" not in never.json()
    binary = infer(
        live, text_tensor(*TEXTS), outputs=requested, parameters={"binary_data_output": True}
    )
    assert list(binary.content[-len(TEXTS) :]) == expected


@pytest.mark.slow
def test_the_client_and_the_commands_have_it(
    live: RunningService, expected: list[bool], tmp_path: Path
) -> None:
    with Client(live.url) as client:
        assert [result.abstained for result in client.predict(TEXTS, "a")] == expected
        assert [result.abstained for result in client.predict(TEXTS, "plain")] == [None] * 6
        always = client.classify(iter(TEXTS), "plain", abstain_below=1.0)
        assert [result.abstained for result in always] == [True] * 6
        decision = (client.adapter("a").spec or {})["decision"]
    file = tmp_path / "texts.txt"
    file.write_text("".join(f"{text}\n" for text in TEXTS))
    lines = typed("predict", str(file), "--adapter", "a", "--url", live.url).stdout.splitlines()
    assert [json.loads(line)["abstained"] for line in lines] == expected
    words = ("predict", str(file), "--adapter", "plain", "--url", live.url, "--abstain-below")
    lines = typed(*words, "1").stdout.splitlines()
    assert [json.loads(line)["abstained"] for line in lines] == [True] * 6
    for value in ("1.5", "nan", "half"):
        assert f"--abstain-below: '{value}': expected a number from 0 to 1" in refused(
            *words, value
        )
    shown = typed("adapters", "show", "a", "--url", live.url).stdout
    assert f"one label a text, abstains below a score of {decision['abstain_below']:g}" in shown


def test_it_is_counted_and_recorded(live: RunningService, expected: list[bool]) -> None:
    def counted() -> float:
        key = ("idspam_abstentions_total", frozenset({("adapter", "a")}))
        return live.series().get(key, 0.0)

    before = counted()
    answered = live.metric("idspam_predictions_total", adapter="a", label="ham")
    live.client.headers["X-Request-ID"] = "abstaining"
    results = live.predict(adapter="a", inputs=TEXTS)["results"]
    live.predict(adapter="plain", inputs=TEXTS)
    del live.client.headers["X-Request-ID"]
    assert counted() == before + sum(expected)
    ham = sum(result["label"] == "ham" for result in results)
    assert live.metric("idspam_predictions_total", adapter="a", label="ham") == answered + ham

    def records() -> list[dict[str, Any]]:
        # The last line may be half written.
        lines = (live.adapter_dir.parent / LOG).read_text().split("\n")[:-1]
        of_requests = (json.loads(line) for line in lines)
        return [record for record in of_requests if record["request_id"] == "abstaining"]

    until(lambda: len(records()) == 2 * len(TEXTS))
    by_adapter = {
        name: [record.get("abstained") for record in records() if record["adapter"] == name]
        for name in ("a", "plain")
    }
    assert by_adapter == {"a": expected, "plain": [None] * len(TEXTS)}
    assert live.client.delete("/v1/adapters/a").status_code == 204
    assert 'idspam_abstentions_total{adapter="a"}' not in live.client.get("/metrics").text
