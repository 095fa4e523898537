"""Quotas over HTTP: 429 with Retry-After in the shape of every protocol."""

from collections.abc import Iterator

import pytest

from tests.support.http_service import RunningService, error_of, serve
from tests.support.key_files import bearer, write_keys
from tests.support.tiny_models import make_adapter, make_backbone


@pytest.fixture(scope="module")
def live(
    tmp_path_factory: pytest.TempPathFactory, tokens: dict[str, str]
) -> Iterator[RunningService]:
    folder = tmp_path_factory.mktemp("quotas")
    tokens |= write_keys(
        folder / "keys.jsonl",
        all={},
        few={"requests_per_minute": 3},
        short={"tokens_per_minute": 12},
        hidden={"tokens_per_minute": 12},
    )
    with serve(folder / "adapters", KEYS_FILE=str(folder / "keys.jsonl")) as running:
        running.put("a", make_adapter(make_backbone()), **bearer(tokens["all"]))
        yield running


def test_requests_beyond_the_quota_are_429_in_each_protocols_shape(
    live: RunningService, tokens: dict[str, str]
) -> None:
    few = bearer(tokens["few"])
    for _ in range(3):
        assert live.client.get("/v1/adapters", headers=few).status_code == 200
    text = {"inputs": "x", "adapter": "a"}
    own = live.client.post("/v1/predict", json=text, headers=few)
    assert error_of(own)["type"] == "quota_exceeded"
    tei = live.client.post("/adapters/a/predict", json={"inputs": "x"}, headers=few)
    assert tei.json()["error_type"] == "Overloaded"
    oip = live.client.get("/v2/models/a", headers=few)
    assert oip.json() == {"error": "this key has used up its requests"}
    vllm = live.client.post("/classify", json={"model": "a", "input": "x"}, headers=few)
    assert vllm.json()["error"]["code"] == 429
    for answer in (own, tei, oip, vllm):
        assert answer.status_code == 429
        assert 1 <= int(answer.headers["retry-after"]) <= 20
    # Probes need no key, and another key is another bucket.
    assert live.client.get("/readyz", headers=few).status_code == 200
    assert live.client.get("/v1/adapters", headers=bearer(tokens["all"])).status_code == 200


def test_tokens_are_counted_when_they_are_answered(
    live: RunningService, tokens: dict[str, str]
) -> None:
    short, body = bearer(tokens["short"]), {"adapter": "a", "inputs": ["free win now"] * 4}
    first = live.client.post("/v1/predict", json=body, headers=short)
    assert first.status_code == 200
    used = sum(result["tokens"] for result in first.json()["results"])
    assert used > 12
    refused = live.client.post("/v1/predict", json=body, headers=short)
    assert refused.status_code == 429
    assert error_of(refused)["message"] == "this key has used up its tokens"
    assert int(refused.headers["retry-after"]) == pytest.approx((used - 12) * 5, abs=2)
    # It still may read.
    assert live.client.get("/v1/adapters/a", headers=short).status_code == 200


def test_the_rows_of_an_explanation_are_counted_too(
    live: RunningService, tokens: dict[str, str]
) -> None:
    key, body = bearer(tokens["hidden"]), {"adapter": "a", "inputs": "free win now"}
    body["explain"] = "occlusion"
    answer = live.client.post("/v1/predict", json=body, headers=key)
    assert answer.json()["results"][0]["tokens"] == 5
    # The text, and once more without each of its words.
    used = 5 + 3 * 4
    refused = live.client.post("/v1/predict", json=body, headers=key)
    assert refused.status_code == 429
    assert int(refused.headers["retry-after"]) == pytest.approx((used - 12) * 5, abs=2)


def test_an_exhausted_quota_is_no_overload_of_the_service(
    live: RunningService, tokens: dict[str, str]
) -> None:
    metrics = live.client.get("/metrics", headers=bearer(tokens["all"])).text
    for line in metrics.splitlines():
        if line.startswith("idspam_requests_total") and 'outcome="overloaded"' in line:
            assert line.endswith(" 0.0")
    assert 'idspam_access_refusals_total{reason="requests_quota"} 4.0' in metrics
    assert 'idspam_access_refusals_total{reason="tokens_quota"} 2.0' in metrics
