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
        answer = client.post("/v1/predict", json={"inputs": inputs, "explain": True})
        assert answer.status_code == 200, answer.text
    for item, result in zip(inputs, answer.json()["results"], strict=True):
        adapter = adapters[item["adapter"]]
        prepared = [prepare(adapter, backbone)]
        encoding = backbone.encoder.encode(item["text"], max_length=adapter.spec.max_length)
        (alone,) = classify(backbone, backbone.pack(rows_of(prepared, [(0, encoding)])), prepared)
        scores = {entry["label"]: entry["score"] for entry in result["scores"]}
        expected = dict(zip(adapter.spec.labels, alone.scores.tolist(), strict=True))
        assert scores == pytest.approx(expected, abs=1e-5)
        weights = [entry["weight"] for entry in result["explanation"]]
        assert weights == pytest.approx(alone.token_weights.tolist(), abs=1e-5)
        prompt = adapter.spec.prompt
        assert bool(weights) is (prompt is not None and prompt.kind != "static")
