"""The Open Inference Protocol's routes: its bodies in, its bodies and errors out."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import orjson
import pytest

from adapters import __version__
from service.http.openapi.compatible import OIP_INFER, OIP_MODEL, OIP_SERVER
from service.http.protocols.oip.tensors import InferRequest, read_texts
from tests.support.http_service import Brake, RunningService, serve, until
from tests.support.oip_requests import (
    INFER_PATH,
    TEXTS,
    infer,
    outputs_of,
    refusal_of,
    text_tensor,
)
from tests.support.tiny_models import make_adapter, make_backbone

LABELS = ("ham", "spam", "other")
LONG = "the card is not good " * 40


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    folder = tmp_path_factory.mktemp("adapters")
    with serve(folder, MAX_INPUTS="8") as running:
        backbone = make_backbone()
        running.put("a", make_adapter(backbone, seed=1, labels=("x", "y")))
        running.put("a", make_adapter(backbone, seed=2, labels=LABELS, max_length=32))
        yield running


def revisions(live: RunningService) -> list[str]:
    return [item.revision for item in live.service.catalog.entry("a").revisions]


@pytest.mark.slow
def test_the_server_says_what_it_is_before_and_while_it_is_ready(tmp_path: Path) -> None:
    brake = Brake()
    brake.on()
    with serve(tmp_path, load=brake.load, wait=False) as starting:
        get = starting.client.get
        try:
            assert get("/v2").json()["version"] == __version__
            assert get("/v2/health/live").content == b'{"live":true}'
            early = get("/v2/health/ready")
            assert early.status_code == 503
            assert list(early.json()) == ["ready", "error"]
            assert refusal_of(get("/v2/models"), 503)
        finally:
            brake.off()
        until(lambda: get("/v2/health/ready").status_code == 200)
        assert get("/v2/health/ready").content == b'{"ready":true}'
        assert get("/v2/models").content == b'{"models":[]}'


def test_metadata_is_of_the_revision_that_was_asked_for(live: RunningService) -> None:
    new, old = revisions(live)
    assert live.client.get("/v2/models").json() == {"models": ["a"]}
    for path, labels in (("", 3), (f"/versions/{new}", 3), (f"/versions/{old[:9]}", 2)):
        metadata = live.client.get(f"/v2/models/a{path}").json()
        assert list(metadata) == ["name", "versions", "platform", "inputs", "outputs"]
        assert metadata["versions"] == [new, old]
        tensors = [*metadata["inputs"], *metadata["outputs"]]
        assert [(item["name"], item["datatype"], item["shape"]) for item in tensors] == [
            ("text", "BYTES", [-1]),
            ("text_pair", "BYTES", [-1]),
            ("label", "BYTES", [-1]),
            ("probs", "FP32", [-1, labels]),
            ("truncated", "BOOL", [-1]),
            ("tokens", "INT32", [-1]),
            ("predicted", "BOOL", [-1, labels]),
            ("abstained", "BOOL", [-1]),
            ("revision", "BYTES", [-1]),
        ]
        ready = live.client.get(f"/v2/models/a{path}/ready")
        assert ready.content == b'{"name":"a","ready":true}'
    for path in ("b", "b/ready", f"a/versions/{'0' * 64}", "a/versions/zz/ready", "A%20B"):
        refusal_of(live.client.get(f"/v2/models/{path}"), 404)


def test_an_answer_is_the_protocols_to_the_byte(live: RunningService) -> None:
    results = live.predict(adapter="a", inputs=TEXTS)["results"]
    scores = [{item["label"]: item["score"] for item in result["scores"]} for result in results]
    probs = [row[label] for row in scores for label in LABELS]
    best = [result["label"] for result in results]
    expected = {
        "model_name": "a",
        "model_version": revisions(live)[0],
        "id": "42",
        "outputs": [
            {"name": "label", "shape": [3], "datatype": "BYTES", "data": best},
            {"name": "probs", "shape": [3, 3], "datatype": "FP32", "data": probs},
        ],
    }
    answer = infer(live, text_tensor(*TEXTS), id="42")
    assert answer.headers["content-type"] == "application/json"
    assert "Inference-Header-Content-Length" not in answer.headers
    assert answer.content == orjson.dumps(expected)
    del expected["id"]
    assert infer(live, text_tensor(*TEXTS)).content == orjson.dumps(expected)


def test_pairs_are_read_as_the_native_route_reads_them(live: RunningService) -> None:
    pairs = [{"text": "free win", "text_pair": "now"}, {"text": "my card", "text_pair": ""}]
    results = live.predict(adapter="a", inputs=pairs)["results"]
    one, two = (tuple(item[name] for item in pairs) for name in ("text", "text_pair"))
    both = text_tensor("free win", "now", "my card", "", shape=[2, 2])
    for inputs in ([text_tensor(*one), text_tensor(*two, name="text_pair")], [both]):
        outputs = outputs_of(infer(live, *inputs, outputs=[{"name": "label"}, {"name": "tokens"}]))
        assert outputs["label"] == [item["label"] for item in results]
        assert outputs["tokens"] == [item["tokens"] for item in results]
    # An empty second text is a pair: it has one more separator than no second text.
    alone = outputs_of(infer(live, text_tensor("my card"), outputs=[{"name": "tokens"}]))["tokens"]
    assert results[1]["tokens"] == alone[0] + 1


def test_the_predicted_labels_are_those_of_the_native_route(live: RunningService) -> None:
    backbone = make_backbone()
    several = make_adapter(
        backbone, seed=3, labels=LABELS, activation="sigmoid", thresholds=(0.02, 0.5, 0.98)
    )
    live.put("several", several)
    for name in ("a", "several"):
        results = live.predict(adapter=name, inputs=TEXTS)["results"]
        sets = [result.get("labels", [result["label"]]) for result in results]
        requested = [{"name": "predicted"}]
        for binary in (False, True):
            answer = infer(
                live,
                text_tensor(*TEXTS),
                path=f"/v2/models/{name}/infer",
                outputs=requested,
                parameters={"binary_data_output": binary},
            )
            flat = list(answer.content[-9:]) if binary else outputs_of(answer)["predicted"]
            assert flat == [label in labels for labels in sets for label in LABELS]
    assert {len(labels) for labels in sets} != {1}
    assert live.client.delete("/v1/adapters/several").status_code == 204


def test_a_version_pins_its_revision(live: RunningService) -> None:
    old = revisions(live)[1]
    for path in (f"/v2/models/a/versions/{old[:8]}/infer", f"/v2/models/a@{old[:8]}/infer"):
        answer = infer(live, text_tensor("x"), path=path).json()
        assert (answer["model_name"], answer["model_version"]) == ("a", old)
        assert answer["outputs"][1]["shape"] == [1, 2]


def test_what_was_cut_is_said_and_may_be_refused(live: RunningService) -> None:
    requested = [{"name": "truncated"}, {"name": "tokens"}]
    answer = infer(live, text_tensor("x", LONG, LONG), outputs=requested)
    assert answer.json()["parameters"] == {"truncated": 2}
    assert outputs_of(answer)["truncated"] == [False, True, True]
    assert outputs_of(answer)["tokens"][1:] == [32, 32]
    assert "parameters" not in infer(live, text_tensor("x")).json()
    said = refusal_of(infer(live, text_tensor("x", LONG), parameters={"truncate": False}))
    assert said == (
        "input 'text': element 1: 202 tokens, adapter 'a' reads 32 and truncate is false"
    )


@pytest.mark.parametrize(
    ("fields", "fault"),
    [
        ({"inputs": []}, "input 'text': missing"),
        ({"inputs": None}, "inputs: Input should be a valid list"),
        ({"inputs": [{}] * 2000}, "inputs: List should have at most 8 items"),
        ({"inputs": [{"name": "text"}]}, "inputs.0.shape: Field required"),
        (
            {"inputs": [text_tensor("x", shape=["1"])]},
            "inputs.0.shape.0: Input should be a valid int",
        ),
        (
            {"inputs": [text_tensor("x", shape=[2**70])]},
            "inputs.0.shape.0: Input should be a valid int",
        ),
        ({"inputs": [text_tensor("x", shape=[2])]}, "1 elements, its shape says 2"),
        ({"inputs": [text_tensor(*"123456789")]}, "at most 8 texts are allowed"),
        ({"inputs": [text_tensor("x", datatype="INT32")]}, "datatype 'INT32', expected 'BYTES'"),
        ({"outputs": [{"name": "logits"}]}, "output 'logits': no such output"),
        ({"parameters": {"timeout": "1"}}, "parameters.timeout: Input should be a valid integer"),
        ({"parameters": {"timeout": -1}}, "parameters.timeout: Input should be greater than"),
        ({"parameters": {"truncate": 1}}, "parameters.truncate: Input should be a valid boolean"),
        ({"id": 42}, "id: Input should be a valid string"),
    ],
)
def test_what_is_wrong_with_a_request_is_400_and_named(
    live: RunningService, fields: dict[str, Any], fault: str
) -> None:
    response = live.client.post(INFER_PATH, json={"inputs": [text_tensor("x")]} | fields)
    said = refusal_of(response)
    assert fault in said
    assert len(said) < 1000


def test_parameters_that_select_nothing_are_ignored(live: RunningService) -> None:
    parameters = {"priority": 3, "sequence_id": 0, "timeout": 0, "mine": [1]}
    assert infer(live, text_tensor("x"), parameters=parameters, model_name="a").status_code == 200


def test_unknown_models_and_routes_have_the_protocols_error(live: RunningService) -> None:
    for path in ("/v2/models/b/infer", "/v2/models/a/versions/ff/infer", "/v2/models/a@/infer"):
        refusal_of(infer(live, text_tensor("x"), path=path), 404)
    assert refusal_of(live.client.get("/v2/models/a/stats"), 404) == "Not Found"
    assert refusal_of(live.client.get(INFER_PATH), 405) == "Method Not Allowed"


def test_a_busy_service_says_429_and_a_deadline_504(tmp_path: Path) -> None:
    brake = Brake()
    with serve(tmp_path, load=brake.load, MAX_WAITING_TOKENS="100") as small:
        small.put("a", make_adapter(make_backbone(), max_length=64))
        brake.on()
        with ThreadPoolExecutor(2) as others:
            try:
                others.submit(infer, small, text_tensor(LONG))
                until(lambda: brake.holds)
                others.submit(infer, small, text_tensor(LONG))
                until(lambda: small.service.health().details["waiting_entries"] == 1)
                busy = infer(small, text_tensor(LONG))
                late = infer(small, text_tensor("x"), parameters={"timeout": 50_000})
            finally:
                brake.off()
    refusal_of(busy, 429)
    assert int(busy.headers["retry-after"]) >= 1
    assert "deadline" in refusal_of(late, 504)


def test_requests_are_counted_by_the_template_of_their_route(live: RunningService) -> None:
    route = "/v2/models/{name}/versions/{version}/infer"
    before = live.metric("idspam_requests_total", route=route, outcome="success")
    infer(live, text_tensor("x"), path=f"/v2/models/a/versions/{revisions(live)[0]}/infer")
    after = live.metric("idspam_requests_total", route=route, outcome="success")
    assert after == before + 1


def test_the_documentations_examples_are_such_bodies(live: RunningService) -> None:
    content = OIP_INFER["openapi_extra"]["requestBody"]["content"]["application/json"]
    for example in content["examples"].values():
        asked = InferRequest.model_validate(example["value"])
        assert read_texts(asked.inputs, b"", limit=8)
        answer = live.client.post(INFER_PATH, json=example["value"])
        assert answer.status_code == 200
    shown = OIP_INFER["responses"][200]["content"]["application/json"]["example"]
    assert list(shown) == list(infer(live, text_tensor("x"), id="42").json())
    for entry, path in ((OIP_SERVER, "/v2"), (OIP_MODEL, "/v2/models/a")):
        example = entry["responses"][200]["content"]["application/json"]["example"]
        assert list(example) == list(live.client.get(path).json())
