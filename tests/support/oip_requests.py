"""Requests of the Open Inference Protocol to a running service, and what their answers say."""

from typing import Any

import httpx

from tests.support.http_service import RunningService

INFER_PATH = "/v2/models/a/infer"
TEXTS = ["free win now", "my card is not good", ""]


def text_tensor(*data: str, name: str = "text", **fields: Any) -> dict[str, Any]:
    """An input of texts as JSON."""
    return {"name": name, "shape": [len(data)], "datatype": "BYTES", "data": list(data)} | fields


def infer(
    live: RunningService, *inputs: Any, path: str = INFER_PATH, **fields: Any
) -> httpx.Response:
    return live.client.post(path, json={"inputs": list(inputs)} | fields)


def outputs_of(response: httpx.Response) -> dict[str, Any]:
    """The data of a successful answer's outputs, by name."""
    assert response.status_code == 200, response.text
    return {output["name"]: output["data"] for output in response.json()["outputs"]}


def refusal_of(response: httpx.Response, status: int = 400) -> str:
    """The message of an error, which has the protocol's one shape."""
    assert response.status_code == status, response.text
    content = response.json()
    assert list(content) == ["error"]
    return str(content["error"])
