"""Adapters of every kind in one request, from upload to answer, with and without workers."""

from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from adapters.adapter import classify, prepare, rows_of
from adapters.backbone.loading import load_backbone
from adapters.backbone.model import Backbone
from adapters.format.files import Adapter, serialize
from tests.support.kinds import adapters_of_all_kinds
from tests.support.pooling import mean_pooled
from tests.support.service_process import ready_service
from tests.support.tiny_models import save_backbone

TEXTS = ("free win now", "the card is not good", "")


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_a_request_may_name_adapters_of_every_kind(tmp_path: Path, workers: int) -> None:
    folder = save_backbone(tmp_path / "backbone", layers=3)
    backbone = load_backbone(str(folder), device="cpu", dtype="float32")
    adapters = {
        f"kind-{number}": adapter
        for number, adapter in enumerate(adapters_of_all_kinds(backbone).values())
    }
    inputs = [
        {"adapter": name, "text": text, "id": f"{name} {text}"}
        for text in TEXTS
        for name in adapters
    ]
    with (
        ready_service(folder, tmp_path, workers=workers, DTYPE="float32") as running,
        httpx.Client(base_url=running.url, timeout=30) as client,
    ):
        for name, adapter in adapters.items():
            answer = client.put(f"/v1/adapters/{name}", content=serialize(adapter))
            assert answer.status_code == 201, answer.text
            summary = client.get(f"/v1/adapters/{name}").json()
            assert summary["method"] == adapter.spec.method
            assert summary["prompt_length"] == adapter.spec.prompt_length
        answers = [
            client.post("/v1/predict", json={"inputs": inputs, "explain": explain})
            for explain in (False, "attention", "occlusion")
        ]
        for answer in answers:
            assert answer.status_code == 200, answer.text
        vectors = client.post("/embed", json={"inputs": list(TEXTS)}).json()
        query = {"query": TEXTS[1], "documents": list(TEXTS), "model": "kind-0", "label": "l0"}
        ranked = client.post("/v1/rerank", json=query).json()["results"]
    np.testing.assert_allclose(vectors, mean_pooled(folder, list(TEXTS)), atol=1e-5)
    prepared = [prepare(adapters["kind-0"], backbone)]
    rows = [(0, backbone.encoder.encode(TEXTS[1], text, max_length=64)) for text in TEXTS]
    pairs = classify(backbone, backbone.pack(rows_of(prepared, rows)), prepared)
    order = np.argsort([-answer.scores[0] for answer in pairs], kind="stable").tolist()
    assert [item["index"] for item in ranked] == order
    plain, attended, occluded = (answer.json()["results"] for answer in answers)
    for item, result, explained, hidden in zip(inputs, plain, attended, occluded, strict=True):
        adapter = adapters[item["adapter"]]
        prepared = [prepare(adapter, backbone)]
        encoding = backbone.encoder.encode(item["text"], max_length=adapter.spec.max_length)
        (alone,) = classify(backbone, backbone.pack(rows_of(prepared, [(0, encoding)])), prepared)
        expected = dict(zip(adapter.spec.labels, alone.scores.tolist(), strict=True))
        for each in (result, explained, hidden):
            scores = {entry["label"]: entry["score"] for entry in each["scores"]}
            assert scores == pytest.approx(expected, abs=1e-5)
            assert each["label"] == result["label"]
        prompt = adapter.spec.prompt
        if prompt is None or prompt.kind == "static":
            assert explained["explanation"]["words"] == []
            assert "occlusion" in explained["explanation"]["note"]
        else:
            # Each of these words is one token.
            words = [entry["weight"] for entry in explained["explanation"]["words"]]
            assert words == pytest.approx(alone.token_weights[1:-1].tolist(), abs=1e-5)
            special = explained["explanation"]["special_tokens"]
            assert special["weight"] == pytest.approx(1 - sum(words), abs=1e-5)
        words = [entry["word"] for entry in hidden["explanation"]["words"]]
        assert words == item["text"].split()
        left = [words[:index] + words[index + 1 :] for index in range(len(words))]
        assert_losses(backbone, adapter, left, result, hidden["explanation"]["words"])


def assert_losses(
    backbone: Backbone,
    adapter: Adapter,
    texts: list[list[str]],
    result: dict[str, Any],
    words: list[dict[str, Any]],
) -> None:
    """The weights of words are what the score loses for the texts without them."""
    if not texts:
        return
    prepared, best = [prepare(adapter, backbone)], adapter.spec.labels.index(result["label"])
    rows = [
        (0, backbone.encoder.encode(" ".join(text), max_length=adapter.spec.max_length))
        for text in texts
    ]
    answers = classify(backbone, backbone.pack(rows_of(prepared, rows)), prepared)
    lost = [result["score"] - float(answer.scores[best]) for answer in answers]
    assert [word["weight"] for word in words] == pytest.approx(lost, abs=2e-5)
