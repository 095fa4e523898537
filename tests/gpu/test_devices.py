"""One service on all GPUs of this machine: the same bits from each, and a killed engine."""

from pathlib import Path

import httpx
import pytest
import torch

from adapters.backbone.loading import load_backbone
from adapters.format.files import serialize
from tests.support.service_process import TEXTS, Load, body_of, ready_service, until
from tests.support.tiny_models import make_adapter, save_backbone

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.timeout(150),
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]


def test_every_gpu_answers_with_the_same_bits_and_one_may_be_killed(tmp_path: Path) -> None:
    source = save_backbone(tmp_path / "backbone", hidden_size=64)
    saved = load_backbone(str(source), device="cpu")
    gpus = torch.cuda.device_count()
    settings = {"DEVICE": "cuda:all", "DTYPE": "bfloat16"}
    with ready_service(source, tmp_path, workers=2, **settings) as service:
        put = httpx.put(
            f"{service.url}/v1/adapters/a", content=serialize(make_adapter(saved)), timeout=30
        )
        assert put.status_code == 201
        builds = [labels for name, labels in service.series() if name == "idspam_build_info"]
        assert {dict(labels)["device"] for labels in builds} == {f"cuda:{n}" for n in range(gpus)}

        def scores(text: str) -> list[float]:
            answer = httpx.post(f"{service.url}/v1/predict", json=body_of("a", text), timeout=30)
            assert answer.status_code == 200
            return [item["score"] for item in answer.json()["results"][0]["scores"]]

        expected = {text: scores(text) for text in TEXTS}
        for _ in range(10):
            assert {text: scores(text) for text in TEXTS} == expected
        until(
            lambda: sum(name == "idspam_engine_texts_total" for name, _ in service.series()) == gpus
        )
        with Load(service.url, "a") as load:
            until(lambda: len(load.answers) > 50)
            killed = service.kill("engine-1")
            until(lambda: service.children().get("engine-1", killed) != killed)
            until(lambda: ready_devices(service.url) == gpus)
        assert load.statuses() == {200}
        assert not load.errors
        assert {text: scores(text) for text in TEXTS} == expected


def ready_devices(url: str) -> int:
    details = httpx.get(f"{url}/readyz").json()["details"]
    return int(details["devices"] - details["devices_missing"])
