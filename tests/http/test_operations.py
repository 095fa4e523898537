"""Probes, start and end of the service, errors' one shape, request ids, and the OpenAPI page."""

import inspect
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import BaseModel

from adapters import errors as adapter_errors
from adapters.backbone.model import Backbone
from adapters.errors import AdapterError
from service import errors as service_errors
from service.errors import ServiceError
from service.http.app import route_paths
from service.http.errors import ERRORS, INTERNAL, kind_of, own_shape, refusal_of
from service.http.openapi import examples
from service.http.openapi.documentation import error_table
from service.http.openapi.schemas import (
    AdapterDetail,
    AdapterList,
    ErrorResponse,
    Health,
    PredictRequest,
    PredictResponse,
    PublishedAdapter,
    RollbackRequest,
)
from tests.support.http_service import Brake, RunningService, error_of, serve, until
from tests.support.tiny_models import make_adapter, make_backbone

TREE = Path(__file__).resolve().parents[2]


@pytest.fixture
def live(tmp_path: Path) -> Iterator[RunningService]:
    with serve(tmp_path) as running:
        yield running


def classes_of(module: Any, base: type[Exception]) -> list[type[Exception]]:
    classes = [item for _, item in inspect.getmembers(module, inspect.isclass)]
    return [
        item for item in classes if issubclass(item, base) and not item.__name__.startswith("_")
    ]


def test_every_error_class_has_its_own_row_in_the_table() -> None:
    classes = classes_of(adapter_errors, AdapterError) + classes_of(service_errors, ServiceError)
    assert len(classes) > 20
    assert [item.__name__ for item in classes if item not in ERRORS] == []
    assert all(400 <= kind.status < 600 and kind.type and kind.meaning for kind in ERRORS.values())


def test_errors_from_elsewhere_say_nothing_of_themselves() -> None:
    refusal = refusal_of(ValueError("secret"))
    assert refusal.kind is INTERNAL
    response = own_shape(refusal)
    assert response.status_code == 500
    assert b"secret" not in response.body
    ErrorResponse.model_validate_json(bytes(response.body))


def test_a_subclass_without_a_row_takes_its_base_class() -> None:
    class Narrower(service_errors.Overloaded):
        pass

    assert kind_of(Narrower("x", retry_after=1.0)).status == 429


@pytest.mark.slow
def test_probes_answer_and_work_is_refused_while_loading(tmp_path: Path) -> None:
    loaded = threading.Event()

    def load() -> Backbone:
        assert loaded.wait(20)
        return make_backbone()

    with serve(tmp_path, load=load, wait=False) as live:
        until(lambda: "loading" in live.client.get("/readyz").text)
        assert live.client.get("/healthz").status_code == 200
        ready = live.client.get("/readyz")
        assert ready.status_code == 503
        assert Health.model_validate(ready.json()).status == "unavailable"
        assert live.client.get("/metrics").status_code == 200
        for method, path in (
            ("POST", "/v1/predict"),
            ("GET", "/v1/adapters"),
            ("PUT", "/v1/adapters/a"),
        ):
            response = live.client.request(method, path)
            assert response.status_code == 503
            assert error_of(response)["type"] == "not_ready"
            assert int(response.headers["retry-after"]) >= 1
        loaded.set()
        until(lambda: live.client.get("/readyz").status_code == 200)
        assert live.client.get("/readyz").json()["reason"] is None


def test_a_dead_engine_is_not_live_and_every_request_says_so(tmp_path: Path) -> None:
    def load() -> Backbone:
        raise RuntimeError("no such luck")

    with serve(tmp_path, load=load, wait=False) as live:
        until(lambda: live.client.get("/healthz").status_code == 503)
        assert live.client.get("/readyz").status_code == 503
        response = live.client.post("/v1/predict", json={"adapter": "a", "inputs": "x"})
        assert response.status_code == 503
        assert error_of(response)["type"] == "unavailable"
        assert isinstance(live.service.starting.exception(), RuntimeError)


def test_request_ids_are_echoed_if_plain_and_made_if_not(live: RunningService) -> None:
    def ask(sent: str | None) -> str:
        headers = {} if sent is None else {"X-Request-ID": sent}
        return str(live.client.get("/healthz", headers=headers).headers["x-request-id"])

    assert ask("abc-1.2:3_4") == "abc-1.2:3_4"
    new_ids = [ask(sent) for sent in (None, "a b", "x" * 129, "a=b", "")]
    assert len(set(new_ids)) == 5
    assert all(len(item) == 16 for item in new_ids)
    assert live.client.get("/nowhere").headers["x-request-id"]


def test_examples_are_what_their_models_say() -> None:
    pairs: list[tuple[type[BaseModel], Any]] = [
        *((PredictRequest, example) for example in examples.PREDICT_REQUESTS.values()),
        *((RollbackRequest, example) for example in examples.ROLLBACKS.values()),
        (PredictResponse, examples.PREDICT_RESPONSE),
        (PublishedAdapter, examples.PUBLISHED),
        (AdapterList, examples.LIST_PAGE),
        (AdapterDetail, examples.DETAIL),
        (Health, examples.HEALTHY),
        (Health, examples.NOT_READY),
        *((ErrorResponse, examples.error_body(error)) for error in examples.ERRORS),
    ]
    checked = [model.model_validate(example) for model, example in pairs]
    assert len(checked) > 15
    assert all(isinstance(item, BaseModel) for item in checked)


@pytest.mark.slow
def test_predict_examples_of_the_openapi_page_are_answered(live: RunningService) -> None:
    live.put("sms-spam", make_adapter(make_backbone()))
    schema = live.client.get("/openapi.json").json()
    content = schema["paths"]["/v1/predict"]["post"]["requestBody"]["content"]["application/json"]
    assert content["schema"] == {"$ref": "#/components/schemas/PredictRequest"}
    assert len(content["examples"]) == 2
    for example in content["examples"].values():
        answer = live.predict(**example["value"])
        PredictResponse.model_validate(answer)


@pytest.mark.slow
def test_openapi_refers_to_nothing_that_is_missing_and_documents_every_route(
    live: RunningService,
) -> None:
    text = live.client.get("/openapi.json").text
    schema = json.loads(text)
    names = {part.split('"')[0] for part in text.split("#/components/schemas/")[1:]}
    assert names <= set(schema["components"]["schemas"])
    operations = [operation for path in schema["paths"].values() for operation in path.values()]
    pages = {path for path in route_paths() if path.startswith(("/docs", "/console"))}
    assert set(schema["paths"]) == set(route_paths()) - pages - {"/openapi.json"}
    # For programs; the same path is also the console.
    assert set(schema["paths"]["/"]) == {"get", "post"}
    for operation in operations:
        assert operation["description"]
        if "/v1" in operation["operationId"]:
            assert {"401", "503"} <= set(operation["responses"])
    assert live.client.get("/docs").status_code == 200


def test_api_page_has_every_route_and_every_error() -> None:
    page = (TREE / "docs" / "api.md").read_text()
    assert error_table() in page
    for route in ("POST /v1/predict", "PUT /v1/adapters/{name}", "GET /v1/adapters/{name}/file"):
        assert f"`{route}`" in page


@pytest.mark.slow
def test_requests_in_flight_longer_than_the_drain_are_failed(tmp_path: Path) -> None:
    brake = Brake()
    with serve(tmp_path, load=brake.load, DRAIN_SECONDS="0.2") as live:
        live.put("a", make_adapter(make_backbone()))
        brake.on()
        answers: list[int] = []
        body = {"adapter": "a", "inputs": "x"}
        asking = [
            threading.Thread(
                target=lambda: answers.append(
                    httpx.post(f"{live.url}/v1/predict", json=body, timeout=20).status_code
                )
            )
            for _ in range(3)
        ]
        asking[0].start()
        until(lambda: brake.holds)
        for thread in asking[1:]:
            thread.start()
        until(lambda: live.service.health().details["waiting_entries"] == 2)
        loop = live.service.starting.get_loop()
        loop.call_soon_threadsafe(lambda: loop.create_task(live.service.drain()))
        until(lambda: len(answers) == 3)
        brake.off()
        assert set(answers) == {503}
