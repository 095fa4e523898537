"""Several labels a text on the default backbone: trained, published, served, and asked for."""

import json
import subprocess
import sys
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import httpx
import pytest

from adapters.adapter import classify, prepare
from adapters.backbone.loading import DEFAULT_BACKBONE, load_backbone
from adapters.format.files import load_adapter
from adapters.packed.packing import Row, RowShape
from service.client import Client
from tests.support.service_process import TREE, ReadyService, ready_service
from train import cli

pytestmark = pytest.mark.slow

ROWS = [
    ("the door is stuck and it squeaks", ["door", "noise"]),
    ("the door does not close", ["door"]),
    ("somebody left the door open", ["door"]),
    ("a loud noise from the pump", ["noise", "pump"]),
    ("it squeaks all night", ["noise"]),
    ("humming and rattling in the cellar", ["noise"]),
    ("the pump leaks", ["pump"]),
    ("the pump has stopped", ["pump"]),
    ("no fault was found", []),
    ("everything works, thank you", []),
    ("the visit is on Monday", []),
    ("door and pump are broken", ["door", "pump"]),
]
TEXTS = ["the pump is loud", "the front door squeaks", "see you on Tuesday", "", "door, pump!"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    for name, rows in (("train", ROWS * 4), ("validation", ROWS)):
        lines = (json.dumps({"text": text, "label": labels}) for text, labels in rows)
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    output = folder / "faults.safetensors"
    command = ["fit", "--train", str(folder / "train.jsonl"), "--output", str(output), "--quiet"]
    command += ["--validation", str(folder / "validation.jsonl")]
    assert cli.main([*command, "--device", "cpu", "--epochs", "5", "--batch-size", "8"]) == 0
    return output


@pytest.fixture(scope="module")
def expected(trained: Path) -> list[dict[str, float]]:
    """Every text's scores by label, each text alone and without a service."""
    adapter, backbone = load_adapter(trained), load_backbone(DEFAULT_BACKBONE, device="cpu")
    prepared = prepare(adapter, backbone)
    scores = []
    for text in TEXTS:
        encoding = backbone.encoder.encode(text, max_length=adapter.spec.max_length)
        batch = backbone.pack([Row(encoding, RowShape.of(adapter.spec), 0)])
        (answer,) = classify(backbone, batch, [prepared])
        scores.append(dict(zip(adapter.spec.labels, answer.scores.tolist(), strict=True)))
    return scores


@pytest.mark.parametrize("workers", [0, 2])
def test_the_service_answers_as_the_trained_model_does(
    trained: Path, expected: list[dict[str, float]], tmp_path: Path, workers: int
) -> None:
    spec = load_adapter(trained).spec
    thresholds = dict(zip(spec.labels, spec.label_thresholds, strict=True))
    with ready_service(Path(DEFAULT_BACKBONE), tmp_path, workers=workers) as service:
        push = ["push", "--adapter", str(trained), "--name", "faults", "--url", service.url]
        assert cli.main(push) == 0
        body = {"adapter": "faults", "inputs": TEXTS}
        results: list[dict[str, Any]] = httpx.post(
            f"{service.url}/v1/predict", json=body, timeout=30
        ).json()["results"]
        sets = [result["labels"] for result in results]
        for result, scores in zip(results, expected, strict=True):
            served = {item["label"]: item["score"] for item in result["scores"]}
            # float32 sums in another order, in a batch of other texts.
            assert served == pytest.approx(scores, abs=1e-5)
            assert set(result["labels"]) == {
                label for label, score in served.items() if score >= thresholds[label]
            }
            assert result["label"] == max(served, key=served.__getitem__)
        # What it learnt: the texts name their labels, and one has none.
        assert sets[2] == []
        assert "door" in sets[1]

        with Client(service.url) as client:
            assert [result.labels for result in client.predict(TEXTS, "faults")] == [
                tuple(labels) for labels in sets
            ]
        counted = [label for labels in sets for label in labels or [""]]
        expected_counts = {label: 2.0 * counted.count(label) for label in set(counted)}
        # Workers send their counts once in a while.
        ends = monotonic() + 10
        while (given := _given(service)) != expected_counts and monotonic() < ends:
            sleep(0.1)
        assert given == expected_counts
        _check_the_commands(service.url, tmp_path, sets)


def _given(service: ReadyService) -> dict[str, float]:
    """How often each label was given, by the service's metrics."""
    return {
        dict(labels)["label"]: value
        for (name, labels), value in service.series().items()
        if name == "idspam_labels_given_total" and dict(labels)["adapter"] == "faults"
    }


def _check_the_commands(url: str, folder: Path, sets: list[list[str]]) -> None:
    """`service predict` of a labelled file, and `adapters show`."""
    file = folder / "labelled.jsonl"
    file.write_text("\n".join(json.dumps({"text": text, "label": ["x", "y"]}) for text in TEXTS))
    command = ["predict", str(file), "--adapter", "faults"]
    lines = _service(url, *command).splitlines()
    assert [json.loads(line)["labels"] for line in lines] == sets
    shown = " ".join(_service(url, "adapters", "show", "faults").split())
    assert "answers several labels a text, thresholds 0." in shown


def _service(url: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "service", *arguments, "--url", url],
        cwd=TREE,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return done.stdout
