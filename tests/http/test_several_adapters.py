"""One text for several adapters, on the real service in one process and with workers."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from adapters.backbone.loading import load_backbone
from adapters.format.files import serialize
from adapters.tokenizer import Encoding, Steps, TextEncoder
from service.client import Client, Input
from tests.support.http_service import error_of, serve
from tests.support.service_process import ReadyService, ready_service
from tests.support.tiny_models import make_adapter, make_backbone, save_backbone

pytestmark = pytest.mark.slow

NAMES = ("a", "b", "c")
TEXTS = ("free win now", "my card is not good")
ENCODE, STEPS, LOCATE = TextEncoder.encode, TextEncoder.steps, TextEncoder.locate


@pytest.fixture(scope="module", params=[0, 2], ids=["one process", "two workers"])
def service(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ReadyService]:
    folder = save_backbone(tmp_path_factory.mktemp("backbone"))
    saved = load_backbone(str(folder), device="cpu")
    with ready_service(
        folder, tmp_path_factory.mktemp("s"), workers=request.param, MAX_INPUTS="8"
    ) as running:
        for seed, name in enumerate(NAMES):
            data = serialize(make_adapter(saved, seed=seed, insertion_layer=1))
            assert httpx.put(f"{running.url}/v1/adapters/{name}", content=data).is_success
        yield running


def post(service: ReadyService, **body: Any) -> httpx.Response:
    return httpx.post(f"{service.url}/v1/predict", json=body, timeout=30)


def test_every_adapter_answers_every_text_as_if_it_were_asked_alone(service: ReadyService) -> None:
    answer = post(service, inputs=list(TEXTS), adapters=list(NAMES), explain=True).json()
    asked = [(index, name) for index in range(len(TEXTS)) for name in NAMES]
    assert [(result["input"], result["adapter"]) for result in answer["results"]] == asked
    for result in answer["results"]:
        (alone,) = post(
            service, inputs=TEXTS[result["input"]], adapter=result["adapter"], explain=True
        ).json()["results"]
        assert "input" not in alone
        assert result["revision"] == alone["revision"]
        assert [score["score"] for score in result["scores"]] == pytest.approx(
            [score["score"] for score in alone["scores"]], abs=1e-5
        )
        assert [word["weight"] for word in result["explanation"]["words"]] == pytest.approx(
            [word["weight"] for word in alone["explanation"]["words"]], abs=1e-5
        )
    # In one batch each text is run once below the layer where the prompts are inserted.
    assert 1 <= answer["timings_ms"]["shared"] <= len(asked) - len(TEXTS)


def test_texts_with_a_hidden_word_are_run_once_for_all_adapters(service: ReadyService) -> None:
    answer = post(service, inputs=TEXTS[0], adapters=list(NAMES), explain="occlusion").json()
    words = [len(result["explanation"]["words"]) for result in answer["results"]]
    assert words == [3, 3, 3]
    # The text and three with a word hidden, each for two adapters after the first.
    assert answer["timings_ms"]["shared"] == 2 * 4


def test_an_input_may_name_its_own(service: ReadyService) -> None:
    inputs: list[Any] = [
        "free",
        {"text": "win", "adapters": ["c", "a"], "id": "two"},
        {"text": "you", "adapter": "b"},
    ]
    results = post(service, inputs=inputs, adapters=["b", "c"]).json()["results"]
    assert [(each["input"], each["id"], each["adapter"]) for each in results] == [
        (0, None, "b"),
        (0, None, "c"),
        (1, "two", "c"),
        (1, "two", "a"),
        (2, None, "b"),
    ]


def test_the_client_takes_several_adapters(service: ReadyService) -> None:
    with Client(service.url) as client:
        answer = client.predict(["free", Input("win", adapter="a")], adapters=["b", "c"])
        assert [(each.input, each.adapter) for each in answer] == [(0, "b"), (0, "c"), (1, "a")]
        assert answer.timings_ms.shared is not None
        plain = client.predict(["free", "free"], "a")
        assert [each.input for each in plain] == [None, None]
        assert plain.timings_ms.shared is None


@pytest.mark.parametrize("characters", [10, 5000], ids=["at once", "in steps"])
def test_a_text_is_tokenised_once_for_all_adapters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, characters: int
) -> None:
    tokenised: list[str] = []
    located: list[str] = []

    def encode(encoder: TextEncoder, text: str, *args: Any, **kwargs: Any) -> Encoding:
        tokenised.append(text)
        return ENCODE(encoder, text, *args, **kwargs)

    def locate(encoder: TextEncoder, text: str, *args: Any, **kwargs: Any) -> Any:
        located.append(text)
        return LOCATE(encoder, text, *args, **kwargs)

    def steps(encoder: TextEncoder, texts: Any, **kwargs: Any) -> Steps[list[Encoding]]:
        tokenised.extend(text for text, _, _ in texts)
        return STEPS(encoder, texts, **kwargs)

    backbone = make_backbone()
    # Half of the adapters read fewer tokens.
    adapters = [make_adapter(backbone, seed=seed, max_length=16 << seed % 2) for seed in range(4)]
    texts = ["free win " + "x" * characters, "you " * characters]
    with serve(tmp_path) as running:
        for seed, adapter in enumerate(adapters):
            running.put(f"a{seed}", adapter)
        monkeypatch.setattr(TextEncoder, "encode", encode)
        monkeypatch.setattr(TextEncoder, "steps", steps)
        monkeypatch.setattr(TextEncoder, "locate", locate)
        names = [f"a{seed}" for seed in range(4)]
        body: dict[str, Any] = {"inputs": [*texts, texts[0]], "adapters": names, "explain": True}
        results = running.predict(**body)["results"]
        assert sorted(tokenised) == sorted(located) == sorted(2 * texts)
        for result in results:
            text = body["inputs"][result["input"]]
            (alone,) = running.predict(inputs=text, adapter=result["adapter"])["results"]
            assert (result["tokens"], result["truncated"]) == (alone["tokens"], alone["truncated"])
            assert [each["score"] for each in result["scores"]] == pytest.approx(
                [each["score"] for each in alone["scores"]], abs=1e-5
            )


@pytest.mark.parametrize(
    ("body", "status", "part"),
    [
        ({"inputs": "x", "adapters": []}, 422, "adapters"),
        ({"inputs": "x", "adapters": ["a"] * 65}, 422, "adapters"),
        ({"inputs": "x", "adapters": "a"}, 422, "adapters"),
        ({"inputs": "x", "adapters": [3]}, 422, "adapters.0"),
        ({"inputs": "x", "adapters": ["a"], "adapter": "a"}, 422, "`adapter`, too"),
        (
            {"inputs": [{"text": "x", "adapter": "a", "adapters": ["b"]}]},
            422,
            "inputs.0.adapters",
        ),
        ({"inputs": "x", "adapters": ["a", "none"]}, 404, "none"),
        ({"inputs": ["x"] * 3, "adapters": list(NAMES)}, 413, "9 answers"),
    ],
)
def test_bad_requests_say_what_is_wrong(
    service: ReadyService, body: dict[str, Any], status: int, part: str
) -> None:
    response = post(service, **body)
    assert response.status_code == status, response.text
    error = error_of(response)
    assert part in error["message"] + " ".join(error.get("details") or ())
