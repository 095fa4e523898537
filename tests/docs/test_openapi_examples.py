"""The examples of README and of the OpenAPI document: the zoo answers each of them as shown."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.http.openapi import examples
from tests.support.service_process import TREE, environ, service_process
from tests.support.shown_answers import is_shown

pytestmark = pytest.mark.slow

# Made up or different in each answer, in the OpenAPI document.
VARYING = frozenset({"id", "created", "revision", "model_version", "timings_ms"})
# Routes that classify, with the path that asks them for `sms-spam`.
ROUTES = {
    "/v1/predict": "/v1/predict",
    "/predict": "/predict",
    "/adapters/{name}/predict": "/adapters/sms-spam/predict",
    "/classify": "/classify",
    "/embed": "/embed",
    "/v1/embeddings": "/v1/embeddings",
    "/v2/models/{name}/infer": "/v2/models/sms-spam/infer",
}


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("adapters")
    environment = environ(
        Path("all-MiniLM-L6-v2"), folder, ZOO_DIR="tree", DEFAULT_ADAPTER="sms-spam"
    )
    with service_process(environment) as running:
        assert running.stdout is not None
        yield running.stdout.readline().split()[1]


def ask(url: str, path: str, body: Any) -> Any:
    response = httpx.post(url + path, json=body, timeout=60)
    assert response.status_code == 200, response.text
    return response.json()


def without_nulls(answer: Any) -> Any:
    """As FastAPI leaves the examples of its document."""
    if isinstance(answer, dict):
        return {key: without_nulls(value) for key, value in answer.items() if value is not None}
    return [without_nulls(item) for item in answer] if isinstance(answer, list) else answer


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (TREE / "README.md").read_text(), re.DOTALL)


def test_the_first_request_of_the_readme_is_answered_as_shown(url: str) -> None:
    (command,) = (block for block in blocks("sh") if '"top_k": 1' in block)
    request = re.search(r"-d '(\{.*\})'", command, re.DOTALL)
    assert request
    (shown,) = (json.loads(block) for block in blocks("json"))
    answer = ask(url, "/v1/predict", json.loads(request[1]))
    assert is_shown(answer, shown, varying=frozenset({"timings_ms"})), answer


@pytest.mark.parametrize("route", ROUTES)
def test_requests_of_the_openapi_document_are_answered_as_shown_there(url: str, route: str) -> None:
    operation = httpx.get(f"{url}/openapi.json", timeout=60).json()["paths"][route]["post"]
    requests = operation["requestBody"]["content"]["application/json"]["examples"]
    answers = [
        without_nulls(ask(url, ROUTES[route], request["value"])) for request in requests.values()
    ]
    shown = operation["responses"]["200"]["content"]["application/json"]["example"]
    if route != "/v1/predict":
        assert is_shown(answers[0], shown, varying=VARYING), answers[0]
        return
    # Its answer also shows a kind of adapter that the zoo does not have.
    results = [result for answer in answers for result in answer["results"]]
    of_zoo = [result for result in shown["results"] if result["adapter"] == "sms-spam"]
    assert of_zoo
    for expected in of_zoo:
        assert any(is_shown(result, expected, varying=VARYING) for result in results), results


def test_lines_of_the_openapi_document_are_answered_as_shown_there(url: str) -> None:
    body = "".join(f"{json.dumps(line)}\n" for line in examples.STREAM_LINES)
    headers = {"Content-Type": "application/x-ndjson"}
    path = "/v1/predict/stream?adapter=sms-spam"
    answer = httpx.post(url + path, content=body, headers=headers, timeout=60)
    lines = [json.loads(line) for line in answer.text.splitlines()]
    assert len(lines) == len(examples.STREAM_LINES)
    for line, expected in zip(lines, examples.STREAM_ANSWERS, strict=False):
        assert line["id"] == expected["id"]
        assert is_shown(line, expected, varying=VARYING), line
    assert lines[-1]["error"]["type"] == "adapter_not_found"


def test_what_differs_is_not_what_is_shown() -> None:
    shown = {"label": "spam", "score": 0.99, "revision": "5f2c..."}
    assert is_shown({"label": "spam", "score": 0.98, "revision": "5f2cab"}, shown)
    assert not is_shown({"label": "ham", "score": 0.99, "revision": "5f2cab"}, shown)
    assert not is_shown({"label": "spam", "score": 0.9, "revision": "5f2cab"}, shown)
    assert not is_shown({"label": "spam", "score": 0.99, "revision": "5f3cab"}, shown)
    assert not is_shown({"label": "spam", "score": 0.99}, shown)
