"""Adapters of every kind in one request, from upload to answer, with and without workers."""

from pathlib import Path

import httpx
import pytest

from adapters.adapter import classify, prepare, rows_of
from adapters.backbone.loading import load_backbone
from adapters.format.files import serialize
from tests.support.kinds import adapters_of_all_kinds
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
        best = adapter.spec.labels.index(result["label"])
        for index, entry in enumerate(hidden["explanation"]["words"]):
            left = " ".join(words[:index] + words[index + 1 :])
            encoding = backbone.encoder.encode(left, max_length=adapter.spec.max_length)
            batch = backbone.pack(rows_of(prepared, [(0, encoding)]))
            score = classify(backbone, batch, prepared)[0].scores[best]
            assert entry["weight"] == pytest.approx(result["score"] - score, abs=2e-5)
