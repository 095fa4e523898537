"""`fit` and `evaluate` on a tiny random backbone: files, repeatability, resuming and reports."""

import hashlib
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from adapters.format.files import Adapter, load_adapter
from tests.support import families
from tests.support.tiny_models import attention_of
from tests.support.training import (
    EPOCHS,
    TEST,
    TRAIN,
    VALIDATION,
    Interrupt,
    RecordingProgress,
    files_of,
    fitted,
    is_same,
    settings_of,
)
from train.config.defaults import PRESETS
from train.config.settings import CacheMode, MethodName, Preset, StorageType
from train.errors import OutputError, ResumeError, SettingsError, TrainingError
from train.fit.fit import fit
from train.loop.checkpoint import checkpoint_path
from train.loop.loop import Loop
from train.loop.progress import EpochReport, Progress
from train.metrics import Assessment, Metrics
from train.report.card_file import card_path
from train.report.evaluation import evaluate
from train.report.report import FitReport

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("backbone")
    families.save("bert", folder)
    return str(folder)


@pytest.fixture(scope="module")
def whole(backbone: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[FitReport, Adapter]:
    """One run from its first step to its last."""
    return _fit(backbone, tmp_path_factory.mktemp("whole") / "a.safetensors")


def _fit(backbone: str, output: Path, **values: object) -> tuple[FitReport, Adapter]:
    return fitted(settings_of(backbone, **values), output)


def test_the_task_is_learnt_and_reported_beside_its_controls(
    whole: tuple[FitReport, Adapter],
) -> None:
    report, adapter = whole
    assert isinstance(report.test, Metrics)
    assert isinstance(report.majority.test, Metrics)
    assert report.test.accuracy > report.majority.test.accuracy + 0.2
    assert report.head_only.test is not None
    assert report.trainable_parameters == sum(tensor.numel() for tensor in adapter.tensors.values())
    assert len(report.epochs) == EPOCHS
    best = report.epochs[report.best_epoch - 1]
    assert best.accuracy == max(epoch.accuracy or 0.0 for epoch in report.epochs)
    output = Path(report.output)
    assert sorted(output.parent.iterdir()) == files_of(output)


def test_the_card_and_the_json_say_what_was_measured(backbone: str, tmp_path: Path) -> None:
    output = tmp_path / "My Task.safetensors"
    report, _ = _fit(backbone, output)
    card = card_path(output).read_text()
    assert report.card == str(card_path(output))
    content = json.loads(report.to_json())
    assert content["assessments"].keys() == {"validation", "test"}
    for split, assessment in content["assessments"].items():
        accuracy = assessment["accuracy"]
        assert accuracy["value"] == content[split]["accuracy"]
        assert accuracy["low"] <= accuracy["value"] <= accuracy["high"]
        assert f"| `{split}` | accuracy | {accuracy['value']:.4f} |" in card
    assert assessment["rows"] == len(TEST)
    assert hashlib.sha256(output.read_bytes()).hexdigest() in card
    assert "--name my-task " in card
    # A later run replaces the card.
    _fit(backbone, output, epochs=1)
    assert card_path(output).read_text() != card


@pytest.mark.parametrize("content", ["# Read me\n", "", "---\ntitle: mine\n---\nlibrary_name"])
def test_a_card_replaces_nothing_but_a_card(backbone: str, tmp_path: Path, content: str) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(content)
    with pytest.raises(OutputError, match="is not a model card and would be replaced"):
        _fit(backbone, tmp_path / "README.safetensors")
    assert readme.read_text() == content
    (tmp_path / "x.md").mkdir()
    with pytest.raises(OutputError, match="is a folder"):
        _fit(backbone, tmp_path / "x.safetensors")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "x.md"]


def test_the_same_seed_gives_the_same_bits_and_another_seed_does_not(
    backbone: str, tmp_path: Path, whole: tuple[FitReport, Adapter]
) -> None:
    _, one = whole
    _, same = _fit(backbone, tmp_path / "b.safetensors")
    assert is_same(one, same)
    other = fit(
        TRAIN,
        VALIDATION,
        TEST,
        replace(settings_of(backbone), seed=6),
        tmp_path / "c.safetensors",
        Progress(),
    )
    assert other.epochs[0].loss != 0
    assert not is_same(one, load_adapter(tmp_path / "c.safetensors"))


@pytest.mark.parametrize("generator_input", ["hidden", "embeddings"])
def test_cached_trunk_states_change_nothing(
    backbone: str, tmp_path: Path, generator_input: str
) -> None:
    """To rounding: the trunk ran on batches of other sizes, so float32 sums differ in order."""
    adapters = {}
    for mode in (CacheMode.OFF, CacheMode.MEMORY, CacheMode.DISK):
        report, adapter = _fit(
            backbone,
            tmp_path / f"{mode}.safetensors",
            method=MethodName.IDSPAM,
            cache=mode,
            generator_input=generator_input,
            storage_dtype=StorageType.FLOAT32,
        )
        assert report.cache["mode"] == mode.value
        adapters[mode] = adapter
    assert is_same(adapters[CacheMode.MEMORY], adapters[CacheMode.DISK])
    for name, tensor in adapters[CacheMode.OFF].tensors.items():
        torch.testing.assert_close(
            tensor, adapters[CacheMode.MEMORY].tensors[name], rtol=1e-3, atol=1e-4
        )


@pytest.mark.parametrize("steps", [1, 5, 12, 13, 30])
def test_a_resumed_run_ends_with_the_bits_of_an_uninterrupted_one(
    backbone: str, tmp_path: Path, whole: tuple[FitReport, Adapter], steps: int
) -> None:
    output = tmp_path / "cut.safetensors"
    with pytest.raises(KeyboardInterrupt):
        fit(TRAIN, VALIDATION, TEST, settings_of(backbone), output, Interrupt(steps))
    assert checkpoint_path(output).exists()
    assert not output.exists()
    report, adapter = _fit(backbone, output, resume=True)
    expected, expected_adapter = whole
    assert is_same(adapter, expected_adapter)
    assert [epoch.loss for epoch in report.epochs] == [epoch.loss for epoch in expected.epochs]
    assert report.best_epoch == expected.best_epoch
    assert not checkpoint_path(output).exists()


class _Cut(list[EpochReport]):
    """A history that is interrupted as soon as it has another epoch."""

    def append(self, report: EpochReport) -> None:
        super().append(report)
        raise KeyboardInterrupt

    def __setitem__(self, at: Any, reports: Any) -> None:
        super().__setitem__(at, reports)
        raise KeyboardInterrupt


def test_an_epoch_is_reported_once_if_its_end_is_interrupted(
    backbone: str,
    tmp_path: Path,
    whole: tuple[FitReport, Adapter],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    output, validate = tmp_path / "cut.safetensors", Loop._validate

    def validate_and_cut(self: Loop, running: dict[str, float]) -> EpochReport:
        report = validate(self, running)
        if report.epoch == 2:
            self.checkpoint.history = _Cut(self.checkpoint.history)
        return report

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "_validate", validate_and_cut)
        with pytest.raises(KeyboardInterrupt):
            _fit(backbone, output)
    report, adapter = _fit(backbone, output, resume=True)
    expected, expected_adapter = whole
    assert is_same(adapter, expected_adapter)
    assert [epoch.epoch for epoch in report.epochs] == [epoch.epoch for epoch in expected.epochs]


def test_a_checkpoint_of_another_run_is_refused(backbone: str, tmp_path: Path) -> None:
    output = tmp_path / "a.safetensors"
    with pytest.raises(ResumeError, match="no interrupted run"):
        _fit(backbone, output, resume=True)
    with pytest.raises(KeyboardInterrupt):
        fit(TRAIN, VALIDATION, TEST, settings_of(backbone), output, Interrupt(3))
    with pytest.raises(ResumeError, match="other data, settings or backbone"):
        _fit(backbone, output, resume=True, learning_rate=1e-4)
    checkpoint_path(output).write_bytes(b"\x00" * 50)
    with pytest.raises(ResumeError, match="cannot be read"):
        _fit(backbone, output, resume=True)


def test_a_loss_that_is_not_finite_stops_the_run_names_the_step_and_leaves_a_checkpoint(
    backbone: str, tmp_path: Path
) -> None:
    output = tmp_path / "a.safetensors"
    wild = {"learning_rate": 10.0, "epochs": 50, "patience": 50, "weight_decay": 10.0}
    recorded = RecordingProgress()
    with pytest.raises(TrainingError, match=r"at step \d+ of epoch \d+: stopped") as caught:
        fitted(settings_of(backbone, **wild), output, recorded)
    assert f"the last good state is in {checkpoint_path(output)}" in str(caught.value)
    assert not output.exists()
    assert not card_path(output).exists()
    for name, tensor in load_file(checkpoint_path(output)).items():
        assert bool(tensor.isfinite().all()), name
    # It resumes from there, and the same error comes again.
    with pytest.raises(TrainingError) as again:
        fitted(settings_of(backbone, **wild, resume=True), output)
    assert str(again.value) == str(caught.value)


def test_there_is_a_checkpoint_from_the_first_step_on(
    backbone: str, tmp_path: Path, whole: tuple[FitReport, Adapter]
) -> None:
    output = tmp_path / "a.safetensors"
    with pytest.raises(OSError, match="gone"):
        fitted(settings_of(backbone), output, Interrupt(1, OSError("the machine is gone")))
    _, resumed = _fit(backbone, output, resume=True)
    assert is_same(resumed, whole[1])


def test_micro_batches_give_the_weights_of_whole_ones(backbone: str, tmp_path: Path) -> None:
    """Without dropout, whose masks are drawn per micro-batch; float32 sums have another order."""
    settings = settings_of(
        backbone,
        batch_size=32,
        dropout=0.0,
        hidden_dropout=0.0,
        storage_dtype=StorageType.FLOAT32,
    )
    _, whole = fitted(settings, tmp_path / "a.safetensors")
    _, parts = fitted(replace(settings, micro_batch=8), tmp_path / "b.safetensors")
    assert not is_same(whole, parts)
    for name, tensor in whole.tensors.items():
        torch.testing.assert_close(parts.tensors[name], tensor, rtol=1e-3, atol=1e-4)


def test_a_micro_batch_above_the_batch_is_refused(backbone: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="--micro-batch 9 is more than the batch of 8"):
        _fit(backbone, tmp_path / "a.safetensors", micro_batch=9)


@pytest.mark.parametrize("preset", list(Preset))
def test_a_preset_decides_what_is_left_open(backbone: str, tmp_path: Path, preset: Preset) -> None:
    chosen = PRESETS[preset]
    _, adapter = _fit(backbone, tmp_path / "a.safetensors", preset=preset, epochs=1, bottleneck=3)
    prompt = attention_of(adapter)
    assert prompt.final_activation is chosen.final_activation
    assert prompt.source is chosen.generator_input
    assert prompt.bottleneck == 3


def test_without_room_for_a_cache_the_run_goes_on_and_a_note_says_so(
    backbone: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = MethodName.IDSPAM
    _, kept = _fit(backbone, tmp_path / "a.safetensors", method=method, cache=CacheMode.MEMORY)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "not there"))
    recorded = RecordingProgress()
    settings = settings_of(backbone, method=method, cache=CacheMode.DISK)
    report, adapter = fitted(settings, tmp_path / "b.safetensors", recorded)
    assert report.cache["mode"] == "off"
    note = next(
        note for note in recorded.notes if note.startswith("no room to keep the lower layers")
    )
    assert "train, validation, test" in note
    for name, tensor in kept.tensors.items():
        torch.testing.assert_close(adapter.tensors[name], tensor, rtol=1e-2, atol=1e-3)


def test_the_best_weights_are_kept_and_patience_ends_the_run(backbone: str, tmp_path: Path) -> None:
    epochs = RecordingProgress()
    output = tmp_path / "a.safetensors"
    settings = settings_of(
        backbone, epochs=30, patience=2, storage_dtype=StorageType.FLOAT32, calibration=False
    )
    report = fit(TRAIN, VALIDATION, TEST, settings, output, epochs)
    best = report.epochs[report.best_epoch - 1]
    assert len(report.epochs) == min(30, report.best_epoch + 2)
    assert isinstance(report.validation, Metrics)
    assert report.validation.accuracy == best.accuracy
    assert [epoch.epoch for epoch in epochs.epochs] == list(range(1, len(report.epochs) + 1))


def test_without_validation_rows_a_share_of_the_training_rows_is_held_out(
    backbone: str, tmp_path: Path
) -> None:
    output = tmp_path / "a.safetensors"
    report = fit(TRAIN, None, None, settings_of(backbone), output, Progress())
    assert report.validation is not None
    assert report.test is None
    assert report.data["train"].rows + report.data["validation"].rows == len(TRAIN)


@pytest.mark.parametrize("storage", list(StorageType))
def test_evaluate_finds_the_figures_that_fit_reported(
    backbone: str, tmp_path: Path, storage: StorageType
) -> None:
    """fit measures the weights in their storage type, so the file answers as the report says."""
    output = tmp_path / "a.safetensors"
    report, adapter = _fit(backbone, output, storage_dtype=storage)
    dtypes = {tensor.dtype for tensor in adapter.tensors.values()}
    expected = {
        StorageType.FLOAT32: {torch.float32},
        StorageType.FLOAT16: {torch.float16},
        StorageType.AUTO: dtypes,
    }
    assert dtypes == expected[storage]
    assert len(dtypes) == 1
    evaluation = evaluate(
        output, TEST, backbone=backbone, device="cpu", dtype=None, progress=Progress()
    ).report
    assert evaluation.metrics == report.test
    measured, card = evaluation.assessment, report.assessments["test"]
    assert isinstance(measured, Assessment)
    assert isinstance(card, Assessment)
    for figure in ("rows", "accuracy", "macro_f1", "matthews", "labels", "matrix", "confusions"):
        assert getattr(measured, figure) == getattr(card, figure)
    for one, other in ((measured.scaled, card.scaled), (measured.unscaled, card.unscaled)):
        assert one.negative_log_likelihood == pytest.approx(other.negative_log_likelihood, abs=1e-6)
        assert one.expected_calibration_error == pytest.approx(
            other.expected_calibration_error, abs=1e-6
        )
    assert [(part.rows, part.accuracy) for part in measured.coverage] == [
        (part.rows, part.accuracy) for part in card.coverage
    ]
    assert isinstance(report.test, Metrics)
    assert adapter.spec.provenance.metrics["test_accuracy"] == pytest.approx(report.test.accuracy)
