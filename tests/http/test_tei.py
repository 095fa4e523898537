"""Text Embeddings Inference's routes: its bodies in, its bodies, errors and headers out."""

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from huggingface_hub import InferenceClient
from huggingface_hub.errors import HfHubHTTPError

from adapters.format.spec import AdapterSpec
from tests.support.http_service import Brake, RunningService, serve, until
from tests.support.tiny_models import make_adapter, make_backbone

LONG = "the card is not good " * 40
LABELS = ("ham", "spam", "other")


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    folder = tmp_path_factory.mktemp("adapters")
    with serve(folder, DEFAULT_ADAPTER="a", MAX_INPUTS="8") as running:
        backbone = make_backbone()
        running.put("a", make_adapter(backbone, seed=1, labels=LABELS, max_length=32))
        running.put("b", make_adapter(backbone, seed=2, activation="sigmoid", labels=("x",)))
        yield running


def spec_of(live: RunningService, name: str) -> AdapterSpec:
    return live.service.catalog.resolve(name).spec


def ask(live: RunningService, inputs: Any, path: str = "/predict", **fields: Any) -> httpx.Response:
    return live.client.post(path, json={"inputs": inputs} | fields)


def own(live: RunningService, text: str, pair: str | None = None) -> list[dict[str, Any]]:
    """What the native route answers, in the other shape."""
    (native,) = live.predict(adapter="a", inputs={"text": text, "text_pair": pair})["results"]
    return [{"score": item["score"], "label": item["label"]} for item in native["scores"]]


def same(answer: Any, expected: list[dict[str, Any]]) -> bool:
    """Keys in this order, labels best first, and scores to float32's last digits."""
    return [list(item) for item in answer] == [["score", "label"]] * len(expected) and all(
        mine["label"] == theirs["label"]
        and math.isclose(mine["score"], theirs["score"], abs_tol=1e-6)
        for mine, theirs in zip(answer, expected, strict=True)
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "path", ["/predict", "/", "/invocations", "/adapters/a", "/adapters/a/predict"]
)
def test_one_text_is_answered_by_one_list_of_all_labels(live: RunningService, path: str) -> None:
    assert same(ask(live, "free win now", path).json(), own(live, "free win now"))
    assert same(ask(live, ["free win now"], path).json(), own(live, "free win now"))


def test_two_strings_are_a_pair_and_not_two_texts(live: RunningService) -> None:
    assert same(ask(live, ["a good card", "hello"]).json(), own(live, "a good card", "hello"))


def test_a_list_of_lists_is_a_batch_of_texts_and_pairs(live: RunningService) -> None:
    answers = ask(live, [["free win now"], ["a good card", "hello"], ["you"]]).json()
    expected = [own(live, "free win now"), own(live, "a good card", "hello"), own(live, "you")]
    assert len(answers) == 3
    assert all(same(mine, theirs) for mine, theirs in zip(answers, expected, strict=True))


def test_a_name_may_pin_a_revision(live: RunningService) -> None:
    revision = live.service.catalog.resolve("a").key.revision
    answer = ask(live, "you", f"/adapters/a@{revision[:12]}/predict")
    assert same(answer.json(), own(live, "you"))
    assert answer.headers["x-adapter-revision"] == revision


def test_timings_and_truncation_are_in_the_headers(live: RunningService) -> None:
    headers = ask(live, [["you"], [LONG]]).headers
    for name in ("compute", "total", "tokenization", "queue", "inference"):
        assert headers[f"x-{name}-time"].isdigit()
    assert headers["x-compute-type"] == "cpu"
    assert headers["x-compute-characters"] == str(3 + len(LONG))
    assert headers["x-compute-tokens"] == str(3 + 32)
    assert headers["x-truncated-inputs"] == "1"


def test_too_long_a_text_is_cut_at_the_end_that_is_asked_for(live: RunningService) -> None:
    text = "free win now " + LONG
    right, left = ask(live, text), ask(live, text, truncation_direction="left")
    assert same(left.json(), own(live, " ".join(text.split()[-30:])))
    assert same(right.json(), own(live, " ".join(text.split()[:30])))
    assert not same(left.json(), right.json())
    assert ask(live, text, truncate=None, truncation_direction="Right").json() == right.json()


def test_raw_scores_are_logits_of_the_scores(live: RunningService) -> None:
    raw = ask(live, "free win now", raw_scores=True).json()
    scores = {item["label"]: item["score"] for item in own(live, "free win now")}
    total = sum(math.exp(item["score"]) for item in raw)
    for item in raw:
        assert math.isclose(math.exp(item["score"]) / total, scores[item["label"]], rel_tol=1e-4)
    (alone,) = ask(live, "you", "/adapters/b/predict").json()
    (logit,) = ask(live, "you", "/adapters/b/predict", raw_scores=True).json()
    assert math.isclose(1 / (1 + math.exp(-logit["score"])), alone["score"], rel_tol=1e-4)


EMPTY, VALIDATION = (400, "Empty"), (422, "Validation")


@pytest.mark.parametrize(
    ("inputs", "expected"),
    [
        ([], EMPTY),
        ("", VALIDATION),
        (["", ""], VALIDATION),
        (["a", "b", "c"], VALIDATION),
        ([["a", "b", "c"]], VALIDATION),
        ([[]], VALIDATION),
        ([["a"], "b"], VALIDATION),
        (["a", ["b"]], VALIDATION),
        ([["a"], [1]], VALIDATION),
        (7, VALIDATION),
        (None, VALIDATION),
        ({"text": "a"}, VALIDATION),
        ([["a"]] * 9, (413, "Validation")),
    ],
)
def test_bad_inputs_have_that_servers_errors(
    live: RunningService, inputs: Any, expected: tuple[int, str]
) -> None:
    answer = ask(live, inputs)
    assert list(answer.json()) == ["error", "error_type"]
    assert (answer.status_code, answer.json()["error_type"]) == expected


@pytest.mark.parametrize(
    ("path", "body", "expected"),
    [
        ("/predict", b'{"inputs": ', (400, "Validation")),
        ("/predict", b"{}", VALIDATION),
        ("/predict", b'{"inputs": "a", "truncate": "yes"}', VALIDATION),
        ("/predict", b'{"inputs": "a", "truncation_direction": "up"}', VALIDATION),
        ("/adapters/nobody/predict", b'{"inputs": "a"}', (404, "Validation")),
        ("/adapters/a/nothing", b"{}", (404, "Validation")),
        ("/adapters/a@00/predict", b'{"inputs": "a"}', (404, "Validation")),
    ],
)
def test_other_mistakes_have_them_too(
    live: RunningService, path: str, body: bytes, expected: tuple[int, str]
) -> None:
    answer = live.client.post(path, content=body, headers={"Content-Type": "application/json"})
    assert (answer.status_code, answer.json()["error_type"]) == expected
    assert set(answer.json()) == {"error", "error_type"}


def test_too_long_a_text_is_refused_where_nothing_may_be_cut(live: RunningService) -> None:
    answer = ask(live, LONG, truncate=False)
    assert answer.status_code == 422
    assert answer.json() == {
        "error": "inputs: 202 tokens, adapter 'a' reads 32 and truncate is false",
        "error_type": "Validation",
    }


def test_info_tells_what_the_adapter_answers(live: RunningService) -> None:
    info = live.client.get("/info").json()
    labels = {str(index): label for index, label in enumerate(LABELS)}
    assert info["model_type"]["classifier"]["id2label"] == labels
    assert info["model_type"]["classifier"]["label2id"] == {"ham": 0, "spam": 1, "other": 2}
    assert info["max_input_length"] == spec_of(live, "a").max_length == 32
    assert (info["max_client_batch_size"], info["served_model_name"]) == (8, "a")
    assert live.client.get("/adapters/b/info").json()["served_model_name"] == "b"
    assert live.client.get("/adapters/nobody/info").status_code == 404


def test_health_is_empty_or_says_unhealthy(live: RunningService) -> None:
    for path in ("/health", "/ping", "/adapters/a/health"):
        answer = live.client.get(path)
        assert (answer.status_code, answer.content) == (200, b"")
    assert live.client.get("/adapters/nobody/health").status_code == 404
    live.service._draining = True
    try:
        answer = live.client.get("/health")
        assert answer.status_code == 503
        assert answer.content == b'{"error":"unhealthy","error_type":"unhealthy"}'
        assert ask(live, "a").json()["error_type"] == "Unhealthy"
    finally:
        live.service._draining = False


def test_without_a_default_adapter_the_error_says_what_to_do(tmp_path: Path) -> None:
    with serve(tmp_path) as bare:
        answer = ask(bare, "a")
        assert answer.status_code == 404
        assert "IDSPAM_DEFAULT_ADAPTER" in answer.json()["error"]


@pytest.mark.slow
def test_overload_is_429_with_that_servers_type(tmp_path: Path) -> None:
    brake = Brake()
    with serve(tmp_path, load=brake.load, MAX_WAITING_TOKENS="100") as small:
        small.put("a", make_adapter(make_backbone(), max_length=64))
        brake.on()
        with ThreadPoolExecutor(2) as others:
            try:
                others.submit(ask, small, LONG, "/adapters/a/predict")
                until(lambda: brake.holds)
                others.submit(ask, small, LONG, "/adapters/a/predict")
                until(lambda: small.service.health().details["waiting_entries"] == 1)
                answer = ask(small, LONG, "/adapters/a/predict")
            finally:
                brake.off()
    assert (answer.status_code, answer.json()["error_type"]) == (429, "Overloaded")
    assert int(answer.headers["retry-after"]) >= 1


def test_the_hubs_client_classifies_texts_pairs_and_batches(live: RunningService) -> None:
    for base in (live.url, f"{live.url}/adapters/a", f"{live.url}/adapters/a/predict"):
        client = InferenceClient(base)
        elements = client.text_classification("free win now")
        assert same(
            [{"score": item.score, "label": item.label} for item in elements],
            own(live, "free win now"),
        )
        best = client.text_classification("free win now", top_k=1)
        assert [item.label for item in best] == [elements[0].label]
        # It declares a string and sends what it is given; of a batch it returns the first answer.
        pair: Any = ["a good card", "hello"]
        assert [item.label for item in client.text_classification(pair)] == [
            item["label"] for item in own(live, *pair)
        ]
        batch: Any = [["you"], ["a good card", "hello"]]
        assert [item.label for item in client.text_classification(batch)] == [
            item["label"] for item in own(live, "you")
        ]


def test_the_hubs_client_gets_its_own_errors(live: RunningService) -> None:
    with pytest.raises(HfHubHTTPError, match="404"):
        InferenceClient(f"{live.url}/adapters/nobody").text_classification("a")
    client = InferenceClient(live.url)
    with pytest.raises(HfHubHTTPError, match="answers by softmax"):
        client.text_classification("a", function_to_apply="sigmoid")
    assert client.text_classification("a", function_to_apply="none")[0].score <= 0
