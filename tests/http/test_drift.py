"""Drift and uncertain texts over HTTP, in a single process: tests/ipc/test_drift.py has workers."""

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from adapters.format.files import Adapter, serialize
from service.client import Client, NotFound
from service.drift.interface import MOST_CHARACTERS
from service.drift.monitor import LEAST_TEXTS, NO_PROFILE, NOT_COUNTED, OFF
from service.http.openapi.schemas import DriftDetail, UncertainTexts
from tests.support.http_service import RunningService, error_of, serve
from tests.support.key_files import bearer
from tests.support.profiles import profiled, strange_texts, usual_texts
from tests.support.tiny_models import make_adapter, make_backbone

BACKBONE = make_backbone()
USUAL = usual_texts(400)
WINDOW = 400


def adapter(seed: int = 1, **fields: Any) -> Adapter:
    """With a profile of `USUAL`."""
    return profiled(make_adapter(BACKBONE, seed=seed, **fields), BACKBONE, USUAL)


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    with serve(
        tmp_path_factory.mktemp("adapters"), DRIFT_TEXTS=str(WINDOW), UNCERTAIN_TEXTS="5"
    ) as running:
        yield running


@pytest.fixture
def name(live: RunningService) -> Iterator[str]:
    """A name that the test publishes; it is deleted afterwards."""
    yield "spam"
    live.client.delete("/v1/adapters/spam")


def ask(live: RunningService, texts: list[str], name: str = "spam", **fields: Any) -> None:
    for start in range(0, len(texts), 100):
        live.predict(adapter=name, inputs=texts[start : start + 100], **fields)


def drift_of(live: RunningService, name: str = "spam", **params: str) -> dict[str, Any]:
    answer = live.client.get(f"/v1/adapters/{name}/drift", params=params)
    assert answer.status_code == 200, answer.text
    DriftDetail.model_validate_json(answer.content)
    return dict(answer.json())


def levels(drift: dict[str, Any]) -> dict[str, str]:
    return {item["quantity"]: item["level"] for item in drift["quantities"]}


def uncertain_of(live: RunningService, name: str = "spam") -> list[dict[str, Any]]:
    answer = live.client.get(f"/v1/adapters/{name}/uncertain")
    assert answer.status_code == 200, answer.text
    UncertainTexts.model_validate_json(answer.content)
    lines = live.client.get(f"/v1/adapters/{name}/uncertain", params={"format": "jsonl"})
    assert lines.headers["content-type"].startswith("application/x-ndjson")
    texts: list[dict[str, Any]] = answer.json()["texts"]
    assert [json.loads(line) for line in lines.text.splitlines()] == texts
    return texts


@pytest.mark.slow
def test_texts_like_those_of_training_are_stable_and_others_are_not(
    live: RunningService, name: str
) -> None:
    revision = live.put(name, adapter())
    empty = drift_of(live)
    assert (empty["texts"], empty["since"], empty["quantities"]) == (0, None, [])
    assert empty["reference_texts"] == len(USUAL)
    ask(live, usual_texts(LEAST_TEXTS - 1, seed=7))
    few = drift_of(live)
    assert few["quantities"] == []
    assert few["note"].startswith(
        f"{LEAST_TEXTS - 1} texts so far; a comparison needs {LEAST_TEXTS}, and each start"
    )
    assert few["counting_since"] == empty["counting_since"] <= few["since"]
    ask(live, usual_texts(201, seed=8))
    usual = drift_of(live)
    assert (usual["adapter"], usual["revision"], usual["texts"]) == (name, revision, 300)
    assert usual["note"] is None
    assert set(levels(usual).values()) == {"stable"}
    assert list(levels(usual)) == ["label", "confidence", "length", "unknown"]
    ask(live, strange_texts(WINDOW))
    strange = levels(drift_of(live))
    assert strange["length"] == strange["unknown"] == "large"


@pytest.mark.slow
def test_the_bins_are_the_shares_of_the_profile_and_of_the_texts(
    live: RunningService, name: str
) -> None:
    made = adapter()
    live.put(name, made)
    texts = usual_texts(200, seed=9)
    ask(live, texts)
    for quantity in drift_of(live)["quantities"]:
        bins = quantity["bins"]
        assert sum(item["reference"] for item in bins) == pytest.approx(1, abs=1e-4)
        assert sum(item["seen"] for item in bins) == pytest.approx(1, abs=1e-4)
    results = live.predict(adapter=name, inputs=texts)["results"]
    spam = sum(result["label"] == "spam" for result in results) / len(results)
    (label,) = (item for item in drift_of(live)["quantities"] if item["quantity"] == "label")
    assert made.spec.profile is not None
    by_name = {item["bin"]: item for item in label["bins"]}
    assert by_name["spam"]["seen"] == pytest.approx(spam, abs=1e-5)
    assert by_name["spam"]["reference"] == pytest.approx(
        made.spec.profile.labels[1] / len(USUAL), abs=1e-5
    )


@pytest.mark.slow
def test_metrics_show_the_current_revision_and_go_with_it(live: RunningService, name: str) -> None:
    live.put(name, adapter())
    series = ("idspam_adapter_drift_psi", frozenset({("adapter", name), ("quantity", "length")}))
    assert series not in live.series()
    ask(live, strange_texts(LEAST_TEXTS))
    psi = live.metric("idspam_adapter_drift_psi", adapter=name, quantity="length")
    shown = {item["quantity"]: item["psi"] for item in drift_of(live)["quantities"]}
    assert psi == pytest.approx(shown["length"], rel=1e-6)
    assert live.metric("idspam_adapter_drift_level", adapter=name, quantity="length") == 2
    assert live.metric("idspam_adapter_drift_texts", adapter=name) == LEAST_TEXTS
    live.put(name, adapter(seed=2))
    left = [key for key in live.series() if key[0].startswith("idspam_adapter_drift")]
    assert not left
    assert drift_of(live)["texts"] == 0
    ask(live, strange_texts(LEAST_TEXTS))
    assert series in live.series()
    assert live.client.delete(f"/v1/adapters/{name}").status_code == 204
    assert series not in live.series()
    assert error_of(live.client.get(f"/v1/adapters/{name}/drift"))["type"] == "adapter_not_found"


@pytest.mark.slow
def test_two_revisions_are_counted_each_by_itself(live: RunningService, name: str) -> None:
    first = live.put(name, adapter())
    staged = live.client.put(
        f"/v1/adapters/{name}", params={"stage": "true"}, content=serialize(adapter(seed=2))
    )
    second = staged.json()["revision"]
    never = {"max_error_rate": None, "max_disagreement": None, "max_latency_ratio": None}
    body = {"revision": second, "percent": 40, "shadow": False, "rule": never}
    assert live.client.put(f"/v1/adapters/{name}/traffic", json=body).status_code == 200
    ask(live, usual_texts(300, seed=3))
    counts = [drift_of(live, revision=revision[:12])["texts"] for revision in (first, second)]
    assert sum(counts) == 300
    assert 60 < counts[1] < 180
    assert drift_of(live)["revision"] == first
    # A shadow answers no text, so none is counted for it.
    live.client.put(f"/v1/adapters/{name}/traffic", json={**body, "shadow": True})
    ask(live, usual_texts(100, seed=4))
    assert drift_of(live, revision=second)["texts"] == counts[1]
    # Once it is the current revision, its counts go on.
    promoted = live.client.post(f"/v1/adapters/{name}/traffic/promote")
    assert promoted.status_code == 200, promoted.text
    assert (drift_of(live)["revision"], drift_of(live)["texts"]) == (second, counts[1])
    old = drift_of(live, revision=first)
    assert (old["texts"], old["note"]) == (0, NOT_COUNTED)


@pytest.mark.slow
def test_a_pinned_old_revision_is_not_counted(live: RunningService, name: str) -> None:
    first = live.put(name, adapter())
    second = live.put(name, adapter(seed=2))
    ask(live, USUAL[:50], name=f"{name}@{first}")
    ask(live, USUAL[:30], name=f"{name}@{second}")
    assert drift_of(live)["texts"] == 30
    assert drift_of(live, revision=first)["note"] == NOT_COUNTED


@pytest.mark.slow
def test_sets_of_labels_and_answers_that_are_none_have_bins_of_their_own(
    live: RunningService, name: str
) -> None:
    sets = adapter(activation="sigmoid", labels=("x", "y"), thresholds=(0.9, 0.9))
    live.put(name, sets)
    ask(live, usual_texts(300, seed=5))
    drift = drift_of(live)
    assert set(levels(drift).values()) == {"stable"}
    assert sets.spec.profile is not None
    if sets.spec.profile.unlabelled > 20:
        assert "(none)" in [item["bin"] for item in drift["quantities"][0]["bins"]]
    plain = live.predict(adapter=name, inputs=USUAL[:100])["results"]
    assert any("labels" in result for result in plain)
    live.client.delete(f"/v1/adapters/{name}")
    scores = sorted(
        result["score"] for result in _answers(live, adapter(seed=3), usual_texts(100, seed=6))
    )
    abstaining = adapter(seed=3, decision={"abstain_below": scores[50]})
    live.put(name, abstaining)
    ask(live, usual_texts(300, seed=5))
    drift = drift_of(live)
    (none,) = (item for item in drift["quantities"][0]["bins"] if item["bin"] == "(abstained)")
    assert none["seen"] == pytest.approx(0.5, abs=0.15)
    assert levels(drift)["label"] == "stable"


def _answers(live: RunningService, made: Adapter, texts: list[str]) -> list[dict[str, Any]]:
    live.put("plain", made)
    results: list[dict[str, Any]] = live.predict(adapter="plain", inputs=texts)["results"]
    live.client.delete("/v1/adapters/plain")
    return results


def test_an_adapter_without_a_profile_says_so(live: RunningService, name: str) -> None:
    live.put(name, make_adapter(BACKBONE))
    ask(live, USUAL)
    drift = drift_of(live)
    assert (drift["quantities"], drift["note"], drift["texts"]) == ([], NO_PROFILE, 0)


@pytest.mark.slow
def test_every_way_to_ask_is_counted_once(live: RunningService, name: str) -> None:
    live.put(name, adapter())
    live.predict(adapter=name, inputs="free card")
    live.predict(adapter=name, inputs="free card", explain=True)
    assert live.client.post(f"/adapters/{name}/predict", json={"inputs": "win"}).status_code == 200
    with Client(live.url) as client:
        assert len(list(client.stream(["one", "two"], adapter=name))) == 2
        assert client.drift(name).texts == 5
        with pytest.raises(NotFound):
            client.drift("none")
    refused = live.client.post("/v1/predict", json={"adapter": name, "inputs": []})
    assert refused.status_code == 422
    assert drift_of(live)["texts"] == 5


@pytest.mark.slow
def test_the_least_certain_texts_are_kept_to_be_labelled(live: RunningService, name: str) -> None:
    revision = live.put(name, adapter(seed=4))
    texts = usual_texts(60, seed=11)
    results = live.predict(adapter=name, inputs=texts)["results"]
    lines = uncertain_of(live)
    by_score = sorted(zip(results, texts, strict=True), key=lambda pair: pair[0]["score"])
    assert [line["text"] for line in lines] == [text for _, text in by_score[:5]]
    for line, (result, _) in zip(lines, by_score, strict=False):
        assert line["answer"] == result["label"]
        assert line["revision"] == revision
        assert line["certainty"] == pytest.approx(result["score"], abs=1e-5)
        assert [item["label"] for item in line["scores"]] == [
            item["label"] for item in result["scores"]
        ]
    answer = live.client.get(f"/v1/adapters/{name}/uncertain", params={"format": "csv"})
    assert "attachment" in answer.headers["content-disposition"]
    assert answer.headers["cache-control"] == "no-store"
    rows = list(csv.DictReader(io.StringIO(answer.text)))
    assert [row["text"] for row in rows] == [line["text"] for line in lines]
    assert {row["label"] for row in rows} == {""}
    with Client(live.url) as client:
        assert [item.text for item in client.uncertain(name)] == [row["text"] for row in rows]
        client.forget_uncertain(name)
        assert client.uncertain(name) == ()
    ask(live, texts[:2])
    assert len(uncertain_of(live)) == 2


def test_kept_texts_go_with_their_revision_and_with_their_name(
    live: RunningService, name: str
) -> None:
    live.put(name, make_adapter(BACKBONE))
    ask(live, ["first"])
    assert len(uncertain_of(live)) == 1
    live.put(name, make_adapter(BACKBONE, seed=9))
    assert uncertain_of(live) == []
    ask(live, ["second"])
    live.client.delete(f"/v1/adapters/{name}")
    live.put(name, make_adapter(BACKBONE, seed=9))
    assert uncertain_of(live) == []


def test_pairs_long_texts_and_every_character_arrive(live: RunningService, name: str) -> None:
    live.put(name, make_adapter(BACKBONE))
    long = "free card " * 1000
    inputs = [
        {"text": 'a "quoted", text\nin two lines', "text_pair": "=1+1 🙂"},
        {"text": long},
        {"text": ""},
    ]
    live.predict(adapter=name, inputs=inputs)
    lines = {line["text"]: line for line in uncertain_of(live)}
    assert lines[inputs[0]["text"]]["text_pair"] == "=1+1 🙂"
    assert not lines[""]["cut"]
    assert lines[long[:MOST_CHARACTERS]]["cut"]
    answer = live.client.get(f"/v1/adapters/{name}/uncertain?format=csv")
    rows = {row["text"]: row for row in csv.DictReader(io.StringIO(answer.text, newline=""))}
    assert rows[inputs[0]["text"]]["text_pair"] == "=1+1 🙂"


@pytest.mark.parametrize("format", ["xml", "", "CSV"])
def test_another_format_is_refused(live: RunningService, name: str, format: str) -> None:
    live.put(name, make_adapter(BACKBONE))
    answer = live.client.get(f"/v1/adapters/{name}/uncertain", params={"format": format})
    assert answer.status_code == 422
    assert "format" in str(error_of(answer)["details"])


@pytest.mark.slow
def test_nothing_is_kept_or_counted_where_the_settings_say_so(tmp_path: Path) -> None:
    with serve(tmp_path, DRIFT_TEXTS="0") as off:
        off.put("spam", adapter())
        ask(off, USUAL)
        assert drift_of(off)["note"] == OFF
        for method in ("GET", "DELETE"):
            answer = off.client.request(method, "/v1/adapters/spam/uncertain")
            assert answer.status_code == 404
            assert error_of(answer)["type"] == "texts_not_kept"
        unknown = off.client.get("/v1/adapters/none/uncertain")
        assert error_of(unknown)["type"] == "adapter_not_found"


def records(live: RunningService) -> list[dict[str, Any]]:
    lines = (live.adapter_dir / ".audit" / "audit.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["event"].startswith("texts.")]


@pytest.mark.slow
def test_the_audit_log_says_who_read_and_removed_texts_and_not_which(
    live: RunningService, name: str
) -> None:
    before = len(records(live))
    live.put(name, adapter())
    ask(live, usual_texts(3))
    path, sender = f"/v1/adapters/{name}/uncertain", {"X-Request-ID": "r-7"}
    for format in ("json", "jsonl", "csv"):
        live.client.get(path, params={"format": format}, headers=sender)
    for _ in range(2):
        assert live.client.delete(path, headers=sender).status_code == 204
    # What gives nobody any texts is not recorded.
    assert live.client.get("/v1/adapters/none/uncertain").status_code == 404
    told = records(live)[before:]
    assert [
        (line["event"], line.get("stage"), line.get("outcome"), line.get("texts")) for line in told
    ] == [
        ("texts.read", None, None, 3),
        ("texts.read", None, None, 3),
        ("texts.read", None, None, 3),
        ("texts.forget", "begun", None, None),
        ("texts.forget", "ended", "done", 3),
        ("texts.forget", "begun", None, None),
        ("texts.forget", "ended", "unchanged", 0),
    ]
    assert [line["format"] for line in told[:3]] == ["json", "jsonl", "csv"]
    for line in told:
        assert (line["adapter"], line["request_id"], line["address"]) == (name, "r-7", "127.0.0.1")
        assert not any(text in json.dumps(line) for text in usual_texts(3))


@pytest.mark.slow
def test_texts_are_not_given_to_anybody_without_a_record(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with serve(tmp_path / "adapters", UNCERTAIN_TEXTS="5", AUDIT_LOG=str(log)) as live:
        live.put("spam", adapter())
        ask(live, usual_texts(3))
        log.unlink()
        log.mkdir()
        path = "/v1/adapters/spam/uncertain"
        for answer in (live.client.get(path), live.client.delete(path)):
            assert (answer.status_code, error_of(answer)["type"]) == (503, "audit_failed")
        log.rmdir()
        assert len(live.client.get(path).json()["texts"]) == 3
        assert live.metric("idspam_audit_failures_total") == 2


def test_only_a_key_that_names_the_scope_reads_texts_and_the_log_names_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "service.http.drift")
    with serve(tmp_path, API_KEYS="reader", ADMIN_KEYS="boss", UNCERTAIN_TEXTS="5") as live:
        live.put("spam", make_adapter(BACKBONE), **bearer("boss"))
        path = "/v1/adapters/spam/uncertain"
        for method, what in (("GET", "read"), ("DELETE", "removed")):
            refused = live.client.request(method, path, headers=bearer("reader"))
            assert refused.status_code == 403
            assert not [each for each in caplog.records if each.name == "service.http.drift"]
            assert live.client.request(method, path, headers=bearer("boss")).status_code < 300
            (line,) = (each for each in caplog.records if each.name == "service.http.drift")
            assert line.getMessage() == f"kept texts {what} name=spam texts=0 client=env:admin-1"
            caplog.clear()
        answer = live.client.get("/v1/adapters/spam/drift", headers=bearer("reader"))
        assert answer.status_code == 200
