"""vLLM's `/classify`: its body in, its body and errors out."""

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.support.http_service import RunningService, serve
from tests.support.tiny_models import make_adapter, make_backbone


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    with serve(tmp_path_factory.mktemp("adapters"), MAX_INPUTS="4") as running:
        running.put("a", make_adapter(make_backbone(), max_length=16))
        yield running


def ask(live: RunningService, **body: Any) -> httpx.Response:
    return live.client.post("/classify", json=body)


def test_texts_are_answered_in_that_servers_shape(live: RunningService) -> None:
    texts = ["free win now", "you"]
    answer = ask(live, model="a", input=texts, priority=3, user="somebody")
    content = answer.json()
    own = live.predict(adapter="a", inputs=texts)["results"]
    scores = [{item["label"]: item["score"] for item in result["scores"]} for result in own]
    assert content.pop("id") == f"classify-{answer.headers['x-request-id']}"
    assert isinstance(content.pop("created"), int)
    assert content == {
        "object": "list",
        "model": "a",
        "data": [
            {
                "index": index,
                "label": own[index]["label"],
                "probs": pytest.approx([scores[index]["ham"], scores[index]["spam"]], abs=1e-6),
                "num_classes": 2,
            }
            for index in range(2)
        ],
        "usage": {
            "prompt_tokens": 8,
            "total_tokens": 8,
            "completion_tokens": 0,
            "prompt_tokens_details": None,
        },
    }
    assert ask(live, model="a", input="you").json()["data"][0]["index"] == 0


def test_too_long_a_text_is_refused_unless_it_may_be_cut(live: RunningService) -> None:
    long = "card " * 40
    assert ask(live, model="a", input=long).status_code == 400
    for limit in (-1, 16, 400):
        cut = ask(live, model="a", input=long, truncate_prompt_tokens=limit)
        assert cut.json()["usage"]["prompt_tokens"] == 16


@pytest.mark.parametrize(
    ("body", "status", "kind"),
    [
        ({"model": "nobody", "input": "a"}, 404, "NotFoundError"),
        ({"input": "a"}, 404, "NotFoundError"),
        ({"model": "a"}, 400, "BadRequestError"),
        ({"model": "a", "input": []}, 400, "BadRequestError"),
        ({"model": "a", "input": [1, 2]}, 400, "BadRequestError"),
        ({"model": "a", "input": "a", "truncate_prompt_tokens": 4}, 400, "BadRequestError"),
        ({"model": "a", "input": "a", "add_special_tokens": False}, 400, "BadRequestError"),
        ({"model": "a", "input": "a", "use_activation": False}, 400, "BadRequestError"),
        ({"model": "a", "input": ["a"] * 5}, 413, "BadRequestError"),
    ],
)
def test_mistakes_have_that_servers_errors(
    live: RunningService, body: dict[str, Any], status: int, kind: str
) -> None:
    answer = ask(live, **body)
    error = answer.json()["error"]
    assert set(answer.json()) == {"error"}
    assert list(error) == ["message", "type", "param", "code"]
    assert (answer.status_code, error["code"], error["type"]) == (status, status, kind)
