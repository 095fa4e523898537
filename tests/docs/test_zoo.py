"""The zoo fits the default backbone, and its reports say what its files do."""

import json
from hashlib import sha256
from pathlib import Path

import pytest

from adapters.backbone.loading import load_backbone
from adapters.backbone.model import check_fits
from adapters.format.files import load_adapter

TREE = Path(__file__).resolve().parents[2]
ZOO = TREE / "adapters" / "zoo"
# The accuracy on the test split that an adapter needs to be part of the zoo.
LEAST_ACCURACY = {"sms-spam": 0.985, "banking77": 0.905, "clinc150": 0.83, "sentiment": 0.80}


@pytest.mark.slow
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


def test_every_adapter_has_a_card_that_is_about_this_file() -> None:
    for name in LEAST_ACCURACY:
        card, content = (ZOO / f"{name}.md").read_text(), (ZOO / f"{name}.safetensors").read_bytes()
        report = json.loads((ZOO / f"{name}.json").read_text())
        assert f"| revision (sha256 of the file) | `{sha256(content).hexdigest()}` |" in card
        assert f"| bytes | {len(content)} |" in card
        assert f"this adapter **{report['test']['accuracy']:.4f}**" in card
        assert f"always the most frequent label {report['majority']:.4f}." in card
        assert ".venv/bin/python -m service serve\n" in card
