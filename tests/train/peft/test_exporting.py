"""An exported LoRA adapter answers in PEFT as it does here."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from adapters.backbone.loading import load_backbone
from adapters.backbone.model import Backbone
from adapters.format.files import Adapter, save_adapter
from adapters.format.spec import (
    AdapterSpec,
    Calibration,
    Head,
    HeadKind,
    HiddenActivation,
    LoraTuning,
    Pooling,
    Site,
    StaticPrompt,
    VectorTuning,
)
from tests.support.families import FAMILY_NAMES
from tests.support.peft_models import (
    FLOAT32_BOUND,
    LABELS,
    TEXTS,
    peft_scores,
    save_base,
    served_scores,
)
from train.cli import main
from train.peft.exporting import export_peft
from train.peft.importing import import_peft
from train.peft.names import NAMES


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Backbone]:
    """A backbone of every family; its name is its folder."""
    root = tmp_path_factory.mktemp("bases")
    return {
        family: load_backbone(str(save_base(family, root / family)), device="cpu")
        for family in FAMILY_NAMES
    }


def adapter_of(
    host: Backbone,
    *,
    sites: tuple[Site, ...] = (Site.QUERY, Site.VALUE),
    layers: tuple[int, int] = (0, 4),
    **fields: Any,
) -> Adapter:
    """A random LoRA adapter, unless `fields` say otherwise."""
    tuning = LoraTuning(
        layers=layers,
        intermediate_size=host.intermediate_size,
        rank=3,
        scaling=1.7,
        sites=sites,
    )
    spec = AdapterSpec(
        backbone=host.identity,
        tokenizer_sha256=host.encoder.sha256,
        hidden_size=host.hidden_size,
        **{"tuning": tuning, "labels": LABELS, "max_length": 40} | fields,
    )
    random = torch.Generator().manual_seed(3)
    tensors = {
        name: torch.randn(shape, generator=random) / (shape[0] ** 0.5 if "head" in name else 4)
        for name, shape in spec.shapes().items()
    }
    return Adapter(spec, tensors)


def written(adapter: Adapter, folder: Path) -> Path:
    path = folder / "x.safetensors"
    save_adapter(path, adapter)
    return path


# The short name of BERT's down means other modules as well. Joined matrices have a larger rank.
QUERY_VALUE, DOWN, MORE = (
    ((Site.QUERY, Site.VALUE), (0, 4)),
    ((Site.DOWN,), (1, 3)),
    ((Site.QUERY, Site.KEY, Site.UP), (2, 4)),
)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "sites", "layers"),
    [
        *((family, *MORE) for family in FAMILY_NAMES),
        *((family, *DOWN) for family in ("bert", "electra", "distilbert")),
        *((family, *QUERY_VALUE) for family in ("bert", "gpt2")),
    ],
)
def test_an_exported_adapter_answers_in_peft_as_here(
    hosts: dict[str, Backbone],
    tmp_path: Path,
    family: str,
    sites: tuple[Site, ...],
    layers: tuple[int, int],
) -> None:
    host = hosts[family]
    head = Head(kind=HeadKind.LINEAR)
    if len(sites) == 1 and family != "gpt2":
        head = Head(kind=HeadKind.MLP, hidden=NAMES[family].hidden)
    calibration = Calibration(temperature=1.3)
    adapter = adapter_of(host, sites=sites, layers=layers, head=head, calibration=calibration)
    export_peft(written(adapter, tmp_path), tmp_path / "tuned")
    # For GPT-2, as the README of the folder says.
    texts = [f"{text}<|endoftext|>" for text in TEXTS] if family == "gpt2" else TEXTS
    theirs = peft_scores(Path(host.identity.name), tmp_path / "tuned", texts)
    ours = served_scores(adapter, host)
    assert np.ptp(ours, axis=0).max() > 0.01, "the texts must get different scores"
    assert np.abs(ours - theirs).max() <= FLOAT32_BOUND


@pytest.mark.slow
@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_an_export_can_be_imported_again(
    hosts: dict[str, Backbone], tmp_path: Path, family: str
) -> None:
    adapter = adapter_of(hosts[family])
    export_peft(written(adapter, tmp_path), tmp_path / "tuned")
    again = import_peft(tmp_path / "tuned", LABELS, end_token=family == "gpt2").adapter
    ours, theirs = (served_scores(each, hosts[family]) for each in (adapter, again))
    assert np.abs(ours - theirs).max() <= FLOAT32_BOUND


def test_what_the_folder_cannot_hold_is_in_its_readme(
    hosts: dict[str, Backbone], tmp_path: Path
) -> None:
    adapter = adapter_of(hosts["bert"], activation="sigmoid", thresholds=(0.2, 0.5, 0.75))
    export_peft(written(adapter, tmp_path), tmp_path / "tuned")
    readme = (tmp_path / "tuned" / "README.md").read_text()
    for part in ("`sports`, `money`, `weather`", "0.2, 0.5, 0.75", "40 tokens", "sigmoid()"):
        assert part in readme


@pytest.mark.parametrize(
    ("family", "fields", "expected"),
    [
        ("bert", {"prompt": StaticPrompt(length=2)}, "it has a prompt (static)"),
        ("bert", {"tuning": None}, "its tuning is none; only LoRA can be exported"),
        (
            "bert",
            {"tuning": VectorTuning(layers=(0, 4), intermediate_size=40)},
            "its tuning is vectors; only LoRA can be exported",
        ),
        (
            "bert",
            {"head": Head(pooling=Pooling.MEAN)},
            "its head reads mean, that of a bert the first",
        ),
        ("gpt2", {"head": Head(pooling=Pooling.FIRST)}, "its head reads first, that of a gpt2 the"),
        (
            "bert",
            {"head": Head(kind=HeadKind.MLP, hidden=HiddenActivation.RELU)},
            "its head has the activation relu, that of a bert has tanh",
        ),
        (
            "distilbert",
            {"labels": tuple(f"label {index}" for index in range(13))},
            "a linear head of 13 labels does not pass through 24 units of relu",
        ),
        ("gpt2", {"head": Head(kind=HeadKind.MLP)}, "its head has two layers"),
    ],
)
def test_what_peft_cannot_express_is_named(
    hosts: dict[str, Backbone],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    family: str,
    fields: dict[str, Any],
    expected: str,
) -> None:
    path = written(adapter_of(hosts[family], **fields), tmp_path)
    assert main(["export-peft", str(path), str(tmp_path / "tuned")]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"error: {path}: PEFT cannot express this adapter: {expected}")
    assert "\n" not in line
    assert [each.name for each in tmp_path.iterdir()] == ["x.safetensors"]


def test_only_a_new_or_an_empty_folder_is_written(
    hosts: dict[str, Backbone], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(written(adapter_of(hosts["bert"]), tmp_path))
    assert main(["export-peft", path, str(tmp_path)]) == 2
    assert "exists already; name a new or an empty folder" in capsys.readouterr().err
    assert main(["export-peft", path, str(tmp_path / "no" / "such")]) == 2
    assert "there is no folder" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert main(["export-peft", path, str(tmp_path / "empty")]) == 0
    assert "adapter_config.json" in [each.name for each in (tmp_path / "empty").iterdir()]
