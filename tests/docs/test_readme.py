"""README's example runs as shown: the default backbone, the zoo, a real process."""

import json
import re
from pathlib import Path

import httpx
import pytest

from adapters.backbone.loading import load_backbone
from adapters.backbone.model import check_fits
from adapters.format.files import load_adapter
from tests.support.service_process import environ, service_process

TREE = Path(__file__).resolve().parents[2]
ZOO = TREE / "adapters" / "zoo"
# The accuracy on the test split that an adapter needs to be part of the zoo.
LEAST_ACCURACY = {"sms-spam": 0.985, "banking77": 0.905, "clinc150": 0.83, "sentiment": 0.80}


def _blocks(language: str) -> list[str]:
    readme = (TREE / "README.md").read_text()
    return re.findall(rf"```{language}\n(.*?)```", readme, re.DOTALL)


@pytest.mark.slow
def test_the_first_request_is_answered_as_shown(tmp_path: Path) -> None:
    (command,) = (block for block in _blocks("sh") if '"top_k": 1' in block)
    request = re.search(r"-d '(\{.*\})'", command, re.DOTALL)
    assert request
    shown = json.loads(next(block for block in _blocks("json") if '"results"' in block))
    environment = environ(Path("all-MiniLM-L6-v2"), tmp_path, ZOO_DIR="tree")
    with service_process(environment) as running:
        assert running.stdout is not None
        url = running.stdout.readline().split()[1]
        answer = httpx.post(f"{url}/v1/predict", json=json.loads(request[1]), timeout=60).json()
    for actual, expected in zip(answer["results"], shown["results"], strict=True):
        assert actual["revision"].startswith(expected["revision"].removesuffix("..."))
        # The page shows `auto`, this is float32: the bound is that of docs/exactness.md.
        assert actual["score"] == pytest.approx(expected["score"], abs=0.02)
        for field in ("adapter", "label", "tokens", "truncated"):
            assert actual[field] == expected[field]


def test_the_zoo_fits_the_default_backbone_and_says_where_it_comes_from() -> None:
    backbone = load_backbone(device="cpu")
    files = {path.stem: load_adapter(path).spec for path in sorted(ZOO.glob("*.safetensors"))}
    assert files.keys() == LEAST_ACCURACY.keys()
    for name, spec in files.items():
        check_fits(spec, backbone)
        provenance, report = spec.provenance, json.loads((ZOO / f"{name}.json").read_text())
        assert provenance.command == report["command"]
        assert provenance.data_licence
        assert provenance.data_sha256 == report["data"]["train"]["sha256"]
        measured = provenance.metrics["test_accuracy"]
        assert measured == pytest.approx(report["test"]["accuracy"], abs=1e-6)
        assert measured >= LEAST_ACCURACY[name]
