"""`fit --init-from`: a related task's adapter as the start of the next one."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from adapters.format.files import Adapter, load_adapter, save_adapter
from tests.support import families
from tests.support.tiny_models import attention_of
from tests.support.training import (
    TEST,
    TRAIN,
    VALIDATION,
    Interrupt,
    RecordingProgress,
    dataset,
    fitted,
    is_same,
    settings_of,
)
from train.config.settings import FitSettings, StorageType
from train.errors import ResumeError, SettingsError
from train.fit.fit import fit
from train.report.card_file import card_path

# So small a learning rate that weights change only in the last digits of float32.
STILL = {
    "epochs": 1,
    "learning_rate": 1e-12,
    "weight_decay": 0.0,
    "storage_dtype": StorageType.FLOAT32,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two backbones, and an adapter of the first one without any default switch."""
    folder = tmp_path_factory.mktemp("folder")
    families.save("bert", folder / "bert")
    families.save("bert", folder / "other", seed=1)
    settings = settings_of(
        str(folder / "bert"),
        prompt_length=3,
        bottleneck=5,
        insertion_layer=1,
        generator_pooling="mean",
        final_activation="tanh",
        max_length=20,
        storage_dtype=StorageType.FLOAT32,
    )
    fitted(settings, folder / "source.safetensors")
    return folder


def _from(folder: Path, **values: object) -> FitSettings:
    return settings_of(None, init_from=str(folder / "source.safetensors"), **values)


def _close(one: Adapter, other: Adapter, *, names: str) -> None:
    for name, tensor in one.tensors.items():
        if name.startswith(names):
            torch.testing.assert_close(other.tensors[name], tensor, rtol=0, atol=1e-8)


@pytest.mark.slow
def test_the_flag_alone_takes_backbone_switches_and_weights(folder: Path, tmp_path: Path) -> None:
    source, recorded = load_adapter(folder / "source.safetensors"), RecordingProgress()
    report, adapter = fitted(_from(folder, **STILL), tmp_path / "a.safetensors", recorded)
    elsewhere = {"calibration", "provenance"}
    assert adapter.spec.model_dump(exclude=elsewhere) == source.spec.model_dump(exclude=elsewhere)
    _close(source, adapter, names="")
    assert any(
        note.endswith("source.safetensors: its generator, vectors and head")
        for note in recorded.notes
    )
    assert report.settings["init_from"] == str(folder / "source.safetensors")
    assert "source.safetensors" in card_path(tmp_path / "a.safetensors").read_text()


@pytest.mark.slow
def test_switches_that_are_given_win_where_shapes_allow(folder: Path, tmp_path: Path) -> None:
    settings = _from(folder, **STILL, insertion_layer=2, final_activation="none", max_length=30)
    _, adapter = fitted(settings, tmp_path / "a.safetensors")
    spec = adapter.spec
    prompt = attention_of(adapter)
    assert (prompt.layer, prompt.final_activation, spec.max_length) == (2, "none", 30)
    assert spec.prompt_length == 3
    _close(load_adapter(folder / "source.safetensors"), adapter, names="generator.")


def test_with_other_labels_the_generator_is_copied_and_the_head_is_new(
    folder: Path, tmp_path: Path
) -> None:
    other, recorded = dataset(60, seed=4, labels=("ham", "spam")), RecordingProgress()
    settings = _from(folder, **STILL, validation_fraction=0.0)
    fit(other, None, None, settings, tmp_path / "a.safetensors", recorded)
    adapter = load_adapter(tmp_path / "a.safetensors")
    assert adapter.spec.labels == ("ham", "spam")
    _close(load_adapter(folder / "source.safetensors"), adapter, names="generator.")
    assert float(adapter.tensors["head.out.weight"].abs().max()) < 1e-6
    assert any("the labels differ: a new head" in note for note in recorded.notes)


@pytest.mark.slow
def test_labels_in_another_order_keep_their_columns(folder: Path, tmp_path: Path) -> None:
    source = load_adapter(folder / "source.safetensors")
    turned = {
        name: tensor.flip(-1) if name.startswith("head.out") else tensor
        for name, tensor in source.tensors.items()
    }
    spec = source.spec.model_copy(update={"labels": source.spec.labels[::-1]})
    save_adapter(tmp_path / "turned.safetensors", Adapter(spec, turned))
    settings = settings_of(None, init_from=str(tmp_path / "turned.safetensors"), **STILL)
    _, adapter = fitted(settings, tmp_path / "a.safetensors")
    assert adapter.spec.labels == source.spec.labels
    _close(source, adapter, names="head.")


@pytest.mark.slow
def test_a_start_from_the_same_task_is_better_than_none(folder: Path, tmp_path: Path) -> None:
    plain = settings_of(str(folder / "bert"), epochs=1, prompt_length=3, insertion_layer=1)
    scratch, _ = fitted(plain, tmp_path / "a.safetensors")
    warm, _ = fitted(_from(folder, epochs=1), tmp_path / "b.safetensors")
    assert warm.epochs[0].loss < scratch.epochs[0].loss - 0.05


def test_an_adapter_that_does_not_fit_is_refused_with_every_difference(
    folder: Path, tmp_path: Path
) -> None:
    settings = _from(folder, prompt_length=4, head="mlp", generator_pooling="mean")
    with pytest.raises(SettingsError) as caught:
        fitted(replace(settings, backbone=str(folder / "other")), tmp_path / "a.safetensors")
    (fault,) = caught.value.faults
    assert fault.startswith(f"--init-from {folder}/source.safetensors: backbone: trained on ")
    assert fault.endswith("; --prompt-length 4: its is 3; --head mlp: its is linear")
    # The default, asked for.
    with_default = replace(_from(folder), given=("generator_pooling",))
    with pytest.raises(SettingsError, match="--generator-pooling attention: its is mean"):
        fitted(with_default, tmp_path / "a.safetensors")
    (tmp_path / "x.safetensors").write_text("no adapter")
    with pytest.raises(SettingsError, match=r"--init-from .*: not a valid adapter: "):
        fitted(
            settings_of(None, init_from=str(tmp_path / "x.safetensors")), tmp_path / "a.safetensors"
        )
    with pytest.raises(SettingsError, match=r"--init-from .*none: No such file"):
        fitted(settings_of(None, init_from=str(tmp_path / "none")), tmp_path / "a.safetensors")


@pytest.mark.slow
def test_a_resumed_run_is_one_from_the_same_adapter(folder: Path, tmp_path: Path) -> None:
    _, whole = fitted(_from(folder), tmp_path / "whole.safetensors")
    output = tmp_path / "a.safetensors"
    with pytest.raises(KeyboardInterrupt):
        fitted(_from(folder), output, Interrupt(5))
    source = load_adapter(folder / "source.safetensors")
    moved = {name: tensor + 1e-3 for name, tensor in source.tensors.items()}
    save_adapter(tmp_path / "other.safetensors", replace(source, tensors=moved))
    other = replace(_from(folder), init_from=str(tmp_path / "other.safetensors"), resume=True)
    with pytest.raises(ResumeError, match="other data, settings or backbone"):
        fitted(other, output)
    _, resumed = fitted(replace(_from(folder), resume=True), output)
    assert is_same(resumed, whole)


@pytest.mark.slow
def test_every_trial_of_a_search_starts_there(folder: Path, tmp_path: Path) -> None:
    recorded = RecordingProgress()
    settings = _from(folder, search=2, epochs=1, given=("batch_size",))
    report = fit(TRAIN, VALIDATION, TEST, settings, tmp_path / "a.safetensors", recorded)
    assert sum("its generator, vectors and head" in note for note in recorded.notes) == 2
    # What the adapter decides is not searched.
    assert set(report.trials[0].settings) == {"weight_decay", "dropout"}
