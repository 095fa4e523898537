"""With two workers and an engine process there is one count, and one place where texts are kept."""

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from adapters.backbone.model import Backbone
from adapters.format.files import serialize
from tests.support.profiles import profiled, strange_texts, usual_texts
from tests.support.service_process import body_of, ready_service, until
from tests.support.tiny_models import make_adapter

# It starts processes.
pytestmark = pytest.mark.slow


def test_workers_count_together_and_keep_texts_in_one_place(
    folder: Path, saved: Backbone, tmp_path: Path
) -> None:
    adapter = profiled(make_adapter(saved, seed=1), saved, usual_texts(300))
    with (
        ready_service(folder, tmp_path, DRIFT_TEXTS="400", UNCERTAIN_TEXTS="5") as service,
        service.clients(2) as (one, other),
    ):
        assert one.put("/v1/adapters/a", content=serialize(adapter)).status_code == 201

        def drift(client: httpx.Client) -> dict[str, Any]:
            answer = client.get("/v1/adapters/a/drift")
            assert answer.status_code == 200, answer.text
            return dict(answer.json())

        def texts(client: httpx.Client) -> list[str]:
            answer = client.get("/v1/adapters/a/uncertain")
            assert answer.status_code == 200, answer.text
            return [item["text"] for item in answer.json()["texts"]]

        for number, client in enumerate((one, other)):
            asked = strange_texts(60) if number else usual_texts(60, seed=5)
            assert client.post("/v1/predict", json=body_of("a", *asked)).status_code == 200
        # The engine counts before it answers: nothing is to be waited for.
        assert drift(one) == drift(other)
        assert drift(one)["texts"] == 120
        assert {"length", "unknown"} <= {
            item["quantity"] for item in drift(one)["quantities"] if item["level"] == "large"
        }
        series = (
            "idspam_adapter_drift_level",
            frozenset({("adapter", "a"), ("quantity", "length")}),
        )
        until(lambda: service.series().get(series) == 2)

        # A text travels after its answer.
        until(lambda: len(texts(one)) == 5)
        assert texts(one) == texts(other)
        assert other.delete("/v1/adapters/a/uncertain").status_code == 204
        assert texts(one) == []
        # Each worker writes who has read and removed them, before it answers.
        log = (service.adapter_dir / ".audit" / "audit.jsonl").read_text().splitlines()
        told = [record for record in map(json.loads, log) if record["event"].startswith("texts.")]
        assert len({record["process"] for record in told}) == 2
        assert [record["texts"] for record in told if record.get("outcome") == "done"] == [5]
        began = drift(one)["counting_since"]

        # Counts begin anew with the engine, and what it said is void.
        service.kill("engine")
        until(lambda: series not in service.series())
        until(lambda: one.get("/readyz").status_code == 200)
        assert drift(one)["texts"] == 0
        assert drift(one)["counting_since"] >= began
