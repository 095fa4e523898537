"""Canary and shadow over HTTP: who answers which text, what is shown, and how it ends."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from adapters.format.files import Adapter, serialize
from service.client import Client, NotFound, Rule
from service.http.openapi.schemas import TrafficDetail
from tests.support.http_service import RunningService, error_of, serve, until
from tests.support.tiny_models import make_adapter, make_backbone

TEXTS = [f"free card {number}" for number in range(200)]
# Nothing ends by itself.
OFF = {"max_error_rate": None, "max_disagreement": None, "max_latency_ratio": None}


def adapter(seed: int = 1, **fields: Any) -> Adapter:
    return make_adapter(make_backbone(), seed=seed, **fields)


def opposite(seed: int = 1) -> Adapter:
    """The other label for every text."""
    made = adapter(seed)
    tensors = {
        name: -tensor if name.startswith("head.out") else tensor
        for name, tensor in made.tensors.items()
    }
    return Adapter(made.spec, tensors)


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    with serve(tmp_path_factory.mktemp("adapters")) as running:
        yield running


@pytest.fixture
def revisions(live: RunningService) -> Iterator[tuple[str, str]]:
    """The current revision of `spam`, and a staged one that answers the opposite."""
    first = live.put("spam", adapter())
    yield first, stage(live, opposite())
    live.client.delete("/v1/adapters/spam")


def stage(live: RunningService, made: Adapter, name: str = "spam") -> str:
    answer = live.client.put(f"/v1/adapters/{name}?stage=true", content=serialize(made))
    assert answer.status_code == 200, answer.text
    assert not answer.json()["changed"]
    return str(answer.json()["revision"])


def divide(live: RunningService, revision: str, percent: float, **fields: Any) -> dict[str, Any]:
    answer = try_to_divide(live, revision=revision, percent=percent, **{"rule": OFF} | fields)
    assert answer.status_code == 200, answer.text
    return detail(answer)


def try_to_divide(live: RunningService, name: str = "spam", **body: Any) -> httpx.Response:
    return live.client.put(f"/v1/adapters/{name}/traffic", json=body)


def shown(live: RunningService, name: str = "spam") -> dict[str, Any]:
    return detail(live.client.get(f"/v1/adapters/{name}/traffic"))


def detail(answer: httpx.Response) -> dict[str, Any]:
    assert answer.status_code == 200, answer.text
    TrafficDetail.model_validate_json(answer.content)
    return dict(answer.json())


def answered_by(live: RunningService, texts: list[str] = TEXTS, **headers: str) -> list[str]:
    body = {"adapter": "spam", "inputs": texts}
    answer = live.client.post("/v1/predict", json=body, headers=headers)
    assert answer.status_code == 200, answer.text
    return [result["revision"] for result in answer.json()["results"]]


def compared(live: RunningService, texts: int) -> None:
    """Ask until so many texts are compared: those that find the queue full are not."""

    def enough() -> bool:
        answered_by(live)
        return bool(shown(live)["figures"]["compared"] >= texts)

    until(enough)


def test_a_staged_revision_is_stored_and_answers_nothing_but_its_pin(
    live: RunningService, revisions: tuple[str, str]
) -> None:
    first, second = revisions
    assert set(answered_by(live)) == {first}
    pinned = live.predict(adapter=f"spam@{second[:8]}", inputs="x")["results"][0]
    assert pinned["revision"] == second
    assert live.client.get("/v1/adapters/spam").json()["revisions"] == [first, second]
    traffic = shown(live)
    assert (traffic["revision"], traffic["percent"], traffic["state"]) == (second, 0.0, "active")
    # It was never current, so there is nothing before this one.
    answer = live.client.post("/v1/adapters/spam/rollback", json={})
    assert error_of(answer)["type"] == "revision_not_found"
    missing = live.client.put("/v1/adapters/none?stage=true", content=serialize(adapter()))
    assert error_of(missing)["type"] == "adapter_not_found"
    hint = "; a name's first revision cannot be staged: publish it without `stage`"
    assert error_of(missing)["message"].endswith(hint)
    # Before any of its bytes is read.
    assert error_of(live.client.put("/v1/adapters/none?stage=true"))["message"].endswith(hint)


def test_a_canary_answers_its_share_and_keeps_its_texts_when_it_grows(
    live: RunningService, revisions: tuple[str, str]
) -> None:
    first, second = revisions
    before: set[str] = set()
    for percent in (0, 10, 40, 100):
        divide(live, second[:12], percent)
        answers = answered_by(live)
        assert answers == answered_by(live, TEXTS)
        taken = {text for text, by in zip(TEXTS, answers, strict=True) if by == second}
        assert set(answers) <= {first, second}
        assert before <= taken
        assert len(taken) / len(TEXTS) == pytest.approx(percent / 100, abs=0.12)
        before = taken
    # A pin is never divided.
    pinned = live.predict(adapter=f"spam@{first}", inputs=TEXTS)["results"]
    assert {result["revision"] for result in pinned} == {first}


def test_each_text_has_the_answer_of_the_revision_that_it_names(
    live: RunningService, revisions: tuple[str, str]
) -> None:
    divide(live, revisions[1], 50)
    mixed = live.predict(adapter="spam", inputs=TEXTS)["results"]
    alone = {
        revision: live.predict(adapter=f"spam@{revision}", inputs=TEXTS)["results"]
        for revision in revisions
    }
    assert {result["revision"] for result in mixed} == set(revisions)
    for index, result in enumerate(mixed):
        expected = alone[result["revision"]][index]
        assert result["label"] == expected["label"]
        assert result["score"] == pytest.approx(expected["score"], abs=1e-5)


@pytest.mark.slow
def test_a_request_key_decides_for_all_texts_of_a_request(
    live: RunningService, revisions: tuple[str, str]
) -> None:
    divide(live, revisions[1], 50)
    by_key = {
        key: answered_by(live, TEXTS[:20], **{"X-Request-Key": key})
        for key in (f"user-{number}" for number in range(40))
    }
    assert all(len(set(answers)) == 1 for answers in by_key.values())
    assert len({answers[0] for answers in by_key.values()}) == 2
    for key, answers in by_key.items():
        assert answered_by(live, ["another"], **{"X-Request-Key": key}) == answers[:1]
    with Client(str(live.client.base_url)) as client:
        answer = client.predict("x", "spam", request_key="user-7")
        assert answer[0].revision == by_key["user-7"][0]


def test_every_protocol_follows_the_division_and_says_who_answered(
    live: RunningService, revisions: tuple[str, str]
) -> None:
    divide(live, revisions[1], 50)
    expected = answered_by(live)
    distinct = ", ".join(dict.fromkeys(expected))
    labels = [result["label"] for result in live.predict(adapter="spam", inputs=TEXTS)["results"]]
    tei = live.client.post("/adapters/spam/predict", json={"inputs": [[text] for text in TEXTS]})
    assert tei.headers["x-adapter-revision"] == distinct
    assert [row[0]["label"] for row in tei.json()] == labels
    vllm = live.client.post("/classify", json={"model": "spam", "input": TEXTS})
    assert vllm.headers["x-adapter-revision"] == distinct
    assert [item["label"] for item in vllm.json()["data"]] == labels
    tensor = {"name": "text", "datatype": "BYTES", "shape": [len(TEXTS)], "data": TEXTS}
    outputs = [{"name": name} for name in ("label", "revision", "predicted")]
    oip = live.client.post("/v2/models/spam/infer", json={"inputs": [tensor], "outputs": outputs})
    values = {output["name"]: output["data"] for output in oip.json()["outputs"]}
    assert values["revision"] == expected
    assert values["label"] == labels
    assert "model_version" not in oip.json()
    # One text, or one key, has one revision.
    one = tensor | {"shape": [1], "data": TEXTS[:1]}
    answer = live.client.post("/v2/models/spam/infer", json={"inputs": [one]})
    assert answer.json()["model_version"] == expected[0]
    keyed = live.client.post(
        "/v2/models/spam/infer", json={"inputs": [tensor]}, headers={"X-Request-Key": "k"}
    )
    assert keyed.json()["model_version"] in revisions
    version = f"/v2/models/spam/versions/{revisions[0]}/infer"
    pinned = live.client.post(version, json={"inputs": [tensor]})
    assert pinned.json()["model_version"] == revisions[0]


def test_a_shadow_answers_nothing_and_is_compared(
    live: RunningService, revisions: tuple[str, str]
) -> None:
    first, second = revisions
    divide(live, second, 100, shadow=True)
    for start in range(0, 40, 5):
        assert set(answered_by(live, TEXTS[start : start + 5])) == {first}
    until(lambda: shown(live)["figures"]["shadow"]["texts"] > 0)

    def all_seen() -> bool:
        figures = shown(live)["figures"]
        # A test before this one may have left texts of the same revisions.
        return bool(figures["compared"] + figures["dropped"] >= 40)

    until(all_seen)
    figures = shown(live)["figures"]
    assert figures["current"]["texts"] == 40
    assert figures["canary"]["texts"] == 0
    assert figures["disagreements"] == figures["compared"] > 0
    assert figures["disagreement_rate"] == 1.0
    assert {(item["before"], item["after"]) for item in figures["directions"]} <= {
        ("ham", "spam"),
        ("spam", "ham"),
    }
    series = live.series()
    of = frozenset({("adapter", "spam")})
    assert series["idspam_traffic_percent", of | {("mode", "shadow")}] == 100
    assert series["idspam_traffic_texts_total", of | {("role", "current")}] >= 40
    disagreed = series["idspam_traffic_compared_total", of | {("outcome", "disagree")}]
    assert disagreed >= figures["compared"]
    directions = {
        labels: value
        for (name, labels), value in series.items()
        if name == "idspam_traffic_disagreements_total"
    }
    assert sum(directions.values()) == disagreed
    assert series["idspam_traffic_score_difference_count", of] >= figures["compared"]


def test_a_canary_that_disagrees_is_taken_back_and_says_why(
    live: RunningService, revisions: tuple[str, str]
) -> None:
    first, second = revisions
    divide(live, second, 50, rule={"max_disagreement": 0.3})
    endings = live.metric("idspam_traffic_endings_total", cause="disagreement")

    def ended() -> bool:
        answered_by(live, TEXTS[:10])
        return bool(shown(live)["state"] == "ended")

    until(ended)
    traffic = shown(live)
    assert traffic["ended"]["cause"] == "disagreement"
    assert "the limit is 30.0%" in traffic["ended"]["reason"]
    assert traffic["figures"]["disagreements"] >= 30
    assert set(answered_by(live)) == {first}
    assert live.metric("idspam_traffic_endings_total", cause="disagreement") == endings + 1
    percent = ("idspam_traffic_percent", frozenset({("adapter", "spam"), ("mode", "canary")}))
    assert percent not in live.series()
    records = audited(live, "adapter.end_traffic")
    assert [record["stage"] for record in records[-2:]] == ["begun", "ended"]
    assert records[-1]["cause"] == "disagreement"
    assert records[-1]["why"] == traffic["ended"]["reason"]
    assert records[-1]["revision"] == second
    # It can be tried again.
    assert divide(live, second, 1)["state"] == "active"


def test_a_canary_with_the_same_answers_stays(live: RunningService) -> None:
    live.put("spam", adapter())
    # The same weights in another file.
    second = stage(live, adapter(max_length=64))
    divide(live, second, 50, rule=None)
    compared(live, 60)
    traffic = shown(live)
    assert traffic["state"] == "active"
    assert traffic["figures"]["disagreements"] == 0
    assert abs(traffic["figures"]["score_difference"]) < 1e-4
    live.client.delete("/v1/adapters/spam")


@pytest.mark.slow
@pytest.mark.parametrize("shadow", [False, True])
def test_a_candidate_whose_file_is_lost_is_taken_back_at_once(
    tmp_path: Path, *, shadow: bool
) -> None:
    # One place on the device: the candidate has to be read again.
    with serve(tmp_path, MAX_ACTIVE_ADAPTERS="1", MAX_REGISTERED_ADAPTERS="1") as live:
        first = live.put("spam", adapter())
        live.put("other", adapter(3))
        second = stage(live, opposite())
        divide(live, second, 100, shadow=shadow)
        live.predict(adapter="other", inputs="x")
        (tmp_path / "spam" / f"{second}.safetensors").unlink()
        body = {"adapter": "spam", "inputs": "free card"}

        def ended() -> bool:
            live.client.delete("/v1/adapters/other")
            live.client.post("/v1/predict", json=body)
            return bool(shown(live)["state"] == "ended")

        if shadow:
            # A shadow evicts nothing, so nobody notices before it is wanted.
            live.client.post("/v2/repository/models/spam/load")
        until(ended)
        assert shown(live)["ended"]["cause"] == "unusable"
        assert set(answered_by(live)) == {first}


def test_staging_what_was_current_before_takes_nothing_from_rolling_back(
    live: RunningService,
) -> None:
    first = live.put("spam", adapter())
    second = live.put("spam", opposite())
    assert stage(live, adapter()) == first
    divide(live, first, 10)
    answer = live.client.post("/v1/adapters/spam/rollback", json={})
    assert answer.json()["revision"] == first
    assert shown(live)["ended"]["cause"] == "promoted"
    # And staging what is current changes nothing.
    assert stage(live, adapter()) == first
    assert live.client.get("/v1/adapters/spam").json()["revisions"] == [first, second]
    live.client.delete("/v1/adapters/spam")


def test_promotion_makes_it_current_and_rolling_back_undoes_it(
    live: RunningService, revisions: tuple[str, str]
) -> None:
    first, second = revisions
    divide(live, second, 10)
    refused = live.client.post(
        "/v1/adapters/spam/traffic/promote", headers={"If-Match": f'"{second}"'}
    )
    assert error_of(refused)["type"] == "revision_conflict"
    answer = live.client.post("/v1/adapters/spam/traffic/promote")
    assert answer.json()["revision"] == second
    assert answer.headers["etag"] == f'"{second}"'
    assert set(answered_by(live)) == {second}
    assert shown(live)["ended"]["cause"] == "promoted"
    again = live.client.post("/v1/adapters/spam/traffic/promote")
    assert error_of(again)["type"] == "traffic_not_found"
    back = live.client.post("/v1/adapters/spam/rollback", json={})
    assert back.json()["revision"] == first
    forth = live.client.post("/v1/adapters/spam/rollback", json={})
    assert forth.json()["revision"] == second


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ("publish", "replaced"),
        ("roll back to another", "replaced"),
        ("roll back to it", "promoted"),
        ("unload", "unusable"),
        ("delete traffic", "stopped"),
    ],
)
def test_a_division_ends_with_its_revisions_and_names_the_cause(
    live: RunningService, revisions: tuple[str, str], change: str, cause: str
) -> None:
    first, second = revisions
    client = live.client
    third = live.put("spam", adapter(5))
    divide(live, second, 50)
    match change:
        case "publish":
            live.put("spam", adapter(6))
        case "roll back to another":
            assert client.post("/v1/adapters/spam/rollback", json={}).json()["revision"] == first
        case "roll back to it":
            client.post("/v1/adapters/spam/rollback", json={"revision": second})
        case "unload":
            client.post("/v2/repository/models/spam/unload")
            client.post("/v2/repository/models/spam/load")
        case "delete traffic":
            assert client.delete("/v1/adapters/spam/traffic").status_code == 204
            assert client.delete("/v1/adapters/spam/traffic").status_code == 204
    traffic = shown(live)
    assert traffic["ended"]["cause"] == cause
    assert (traffic["revision"], traffic["baseline"]) == (second, third)
    assert len(set(answered_by(live))) == 1


def test_a_revision_that_reads_texts_cannot_be_deleted(
    live: RunningService, revisions: tuple[str, str]
) -> None:
    path = f"/v1/adapters/spam/revisions/{revisions[1]}"
    divide(live, revisions[1], 50)
    refused = live.client.delete(path)
    assert (refused.status_code, error_of(refused)["type"]) == (409, "revision_tried")
    assert len(set(answered_by(live))) == 2
    live.client.delete("/v1/adapters/spam/traffic")
    assert live.client.delete(path).status_code == 204
    assert shown(live)["state"] == "ended"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("body", "status", "kind"),
    [
        ({"revision": "f" * 64, "percent": 5}, 404, "revision_not_found"),
        ({"revision": "", "percent": 5}, 422, "invalid_request"),
        ({"revision": "xyz", "percent": 5}, 422, "invalid_request"),
        ({"percent": 5}, 422, "invalid_request"),
        ({"revision": "SECOND"}, 422, "invalid_request"),
        ({"revision": "SECOND", "percent": -0.1}, 422, "invalid_request"),
        ({"revision": "SECOND", "percent": 100.1}, 422, "invalid_request"),
        ({"revision": "SECOND", "percent": "5"}, 422, "invalid_request"),
        ({"revision": "SECOND", "percent": True}, 422, "invalid_request"),
        ({"revision": "SECOND", "percent": 5, "shadow": 1}, 422, "invalid_request"),
        ({"revision": "SECOND", "percent": 5, "more": 1}, 422, "invalid_request"),
        (
            {"revision": "SECOND", "percent": 5, "rule": {"min_texts": 0}},
            422,
            "invalid_request",
        ),
        (
            {"revision": "SECOND", "percent": 5, "rule": {"max_disagreement": 2}},
            422,
            "invalid_request",
        ),
        ({"revision": "FIRST", "percent": 5}, 409, "revision_current"),
        ([], 422, "invalid_request"),
    ],
)
def test_a_division_that_cannot_be_is_refused_and_changes_nothing(
    live: RunningService,
    revisions: tuple[str, str],
    body: Any,
    status: int,
    kind: str,
) -> None:
    first, second = revisions
    before = divide(live, second, 0)
    text = json.dumps(body).replace("SECOND", second).replace("FIRST", first)
    answer = live.client.put(
        "/v1/adapters/spam/traffic",
        content=text,
        headers={"Content-Type": "application/json"},
    )
    assert (answer.status_code, error_of(answer)["type"]) == (status, kind), answer.text
    assert shown(live)["since"] == before["since"]
    assert set(answered_by(live)) == {first}


def test_other_labels_can_only_be_a_shadow(live: RunningService) -> None:
    first = live.put("spam", adapter())
    second = stage(live, adapter(2, labels=("ham", "spam", "other")))
    refused = try_to_divide(live, revision=second, percent=5)
    assert (refused.status_code, error_of(refused)["type"]) == (409, "revision_unlike")
    assert error_of(refused)["details"] == ["labels added: other"]
    divide(live, second, 100, shadow=True)
    assert set(answered_by(live)) == {first}
    until(lambda: shown(live)["figures"]["compared"] > 0)
    live.client.delete("/v1/adapters/spam")


def test_conditions_and_names_that_do_not_hold_are_refused(
    live: RunningService, revisions: tuple[str, str]
) -> None:
    first, second = revisions
    body = {"revision": second, "percent": 5}
    path = "/v1/adapters/spam/traffic"
    wrong, right = {"If-Match": f'"{second}"'}, {"If-Match": f'"{first}"'}
    for answer in (
        live.client.put(path, json=body, headers=wrong),
        live.client.delete(path, headers=wrong),
    ):
        assert (answer.status_code, error_of(answer)["type"]) == (412, "revision_conflict")
    assert live.client.put(path, json=body, headers=right).status_code == 200
    assert live.client.delete(path, headers=right).status_code == 204
    for method in ("GET", "PUT", "DELETE"):
        answer = live.client.request(method, "/v1/adapters/none/traffic", json=body)
        assert (answer.status_code, error_of(answer)["type"]) == (404, "adapter_not_found")
    live.put("plain", adapter())
    for method, more in (("GET", ""), ("DELETE", ""), ("POST", "/promote")):
        answer = live.client.request(method, f"/v1/adapters/plain/traffic{more}")
        assert (answer.status_code, error_of(answer)["type"]) == (404, "traffic_not_found")


@pytest.mark.slow
def test_the_quota_and_the_answer_are_those_of_one_revision(tmp_path: Path) -> None:
    with serve(tmp_path) as live:
        live.put("spam", adapter())
        second = stage(live, opposite())
        divide(live, second, 100, shadow=True)
        before = live.metric("idspam_predictions_total", adapter="spam", label="ham")
        before += live.metric("idspam_predictions_total", adapter="spam", label="spam")
        answered_by(live, TEXTS[:20])
        until(lambda: shown(live)["figures"]["compared"] > 0)
        after = live.metric("idspam_predictions_total", adapter="spam", label="ham")
        after += live.metric("idspam_predictions_total", adapter="spam", label="spam")
        assert after - before == 20


@pytest.mark.slow
def test_a_division_and_its_end_survive_a_restart(tmp_path: Path) -> None:
    with serve(tmp_path) as live:
        first = live.put("spam", adapter())
        second = stage(live, opposite())
        divide(live, second, 50, rule=OFF | {"min_texts": 77})
        before = answered_by(live)
    with serve(tmp_path) as live:
        assert answered_by(live) == before
        assert shown(live)["rule"]["min_texts"] == 77
        live.client.delete("/v1/adapters/spam/traffic")
    with serve(tmp_path) as live:
        traffic = shown(live)
        assert (traffic["ended"]["cause"], traffic["figures"]) == ("stopped", None)
        assert set(answered_by(live)) == {first}
        divide(live, second, 50)
    # A crash between the change of the revision and the end of the division.
    (tmp_path / "spam" / "current").write_text(f"{second}\n{first}\n")
    with serve(tmp_path) as live:
        assert shown(live)["ended"]["cause"] == "promoted"
        assert set(answered_by(live)) == {second}


@pytest.mark.slow
@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b'{"revision": 1}', b"[]" * 1000])
def test_a_damaged_division_is_none_and_can_be_replaced(tmp_path: Path, content: bytes) -> None:
    with serve(tmp_path) as live:
        first = live.put("spam", adapter())
        second = stage(live, opposite())
    (tmp_path / "spam" / "traffic").write_bytes(content)
    with serve(tmp_path) as live:
        traffic = shown(live)
        assert (traffic["ended"]["cause"], traffic["revision"]) == ("damaged", None)
        assert set(answered_by(live)) == {first}
        divide(live, second, 100)
        assert set(answered_by(live)) == {second}


def test_the_client_does_all_of_it(live: RunningService) -> None:
    first, second = serialize(adapter()), serialize(opposite())
    with Client(str(live.client.base_url)) as client:
        client.upload("spam", first)
        staged = client.upload("spam", second, stage=True)
        rule = Rule(max_disagreement=None, min_texts=50)
        traffic = client.set_traffic("spam", staged.revision[:10], 25, shadow=True, rule=rule)
        assert (traffic.percent, traffic.shadow, traffic.rule) == (25.0, True, rule)
        assert client.traffic("spam").revision == staged.revision
        client.end_traffic("spam")
        assert client.traffic("spam").state == "ended"
        client.set_traffic("spam", staged.revision, 5)
        assert client.promote("spam").revision == staged.revision
        client.delete("spam")
        with pytest.raises(NotFound):
            client.traffic("spam")


def audited(live: RunningService, event: str) -> list[dict[str, Any]]:
    file = live.adapter_dir / ".audit" / "audit.jsonl"
    records = [json.loads(line) for line in file.read_text().splitlines()]
    return [record for record in records if record["event"] == event]
