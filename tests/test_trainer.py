"""`fit` and `evaluate` on a tiny random backbone: what is kept, repeatable and reported."""

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from adapters.adapter import Adapter
from adapters.files import load_adapter
from tests import families
from train.data import Dataset, Example
from train.errors import ResumeError, TrainingError
from train.evaluation import evaluate
from train.progress import SilentProgress
from train.report import EpochReport, FitReport
from train.settings import CacheMode, FitSettings, StorageType
from train.state import state_path
from train.trainer import fit

EPOCHS = 4


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("backbone")
    families.save("bert", folder)
    return str(folder)


def _dataset(rows: int, *, seed: int) -> Dataset:
    """Texts that say good or bad among other words: a label that can be learnt."""
    rng = random.Random(seed)
    examples = []
    for _ in range(rows):
        label = rng.choice(("good", "bad"))
        words = [
            rng.choice(("the", "card", "my", "call", "you", "now"))
            for _ in range(rng.randint(1, 8))
        ]
        words.insert(rng.randint(0, len(words)), label)
        examples.append(Example(" ".join(words), None, label))
    return Dataset(f"made-{seed}", f"{seed:064x}", tuple(examples))


TRAIN, VALIDATION, TEST = _dataset(90, seed=1), _dataset(40, seed=2), _dataset(40, seed=3)


def _settings(backbone: str, **values: object) -> FitSettings:
    given = {"epochs": EPOCHS, "batch_size": 8, "learning_rate": 3e-3, "patience": EPOCHS} | values
    return FitSettings(backbone=backbone, device="cpu", seed=5, **given)  # type: ignore[arg-type]  # by name


def _fit(backbone: str, output: Path, **values: object) -> tuple[FitReport, Adapter]:
    report = fit(TRAIN, VALIDATION, TEST, _settings(backbone, **values), output, SilentProgress())
    return report, load_adapter(output)


def _same(one: Adapter, other: Adapter) -> bool:
    return all(torch.equal(tensor, other.tensors[name]) for name, tensor in one.tensors.items())


class _Interrupt(SilentProgress):
    """Ctrl-C after so many steps."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    def advance(
        self,
        texts: int,  # noqa: ARG002  # the protocol's
        *,
        loss: float | None = None,
        accuracy: float | None = None,  # noqa: ARG002  # the protocol's
    ) -> None:
        if loss is not None:
            self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


class _Epochs(SilentProgress):
    def __init__(self) -> None:
        self.reports: list[EpochReport] = []

    def epoch_done(self, report: EpochReport) -> None:
        self.reports.append(report)


def test_the_task_is_learnt_and_reported_beside_its_controls(backbone: str, tmp_path: Path) -> None:
    report, adapter = _fit(backbone, tmp_path / "a.safetensors")
    assert report.test is not None
    assert report.majority.test is not None
    assert report.test.accuracy > report.majority.test.accuracy + 0.2
    assert report.head_only.test is not None
    assert report.trainable_parameters == sum(tensor.numel() for tensor in adapter.tensors.values())
    assert len(report.epochs) == EPOCHS
    best = report.epochs[report.best_epoch - 1]
    assert best.accuracy == max(epoch.accuracy or 0.0 for epoch in report.epochs)
    assert not state_path(tmp_path / "a.safetensors").exists()


def test_the_same_seed_gives_the_same_bits_and_another_seed_does_not(
    backbone: str, tmp_path: Path
) -> None:
    _, one = _fit(backbone, tmp_path / "a.safetensors")
    _, same = _fit(backbone, tmp_path / "b.safetensors")
    assert _same(one, same)
    other = fit(
        TRAIN,
        VALIDATION,
        TEST,
        replace(_settings(backbone), seed=6),
        tmp_path / "c.safetensors",
        SilentProgress(),
    )
    assert other.epochs[0].loss != 0
    assert not _same(one, load_adapter(tmp_path / "c.safetensors"))


@pytest.mark.parametrize("generator_input", ["hidden", "embeddings"])
def test_kept_lower_layers_change_nothing(
    backbone: str, tmp_path: Path, generator_input: str
) -> None:
    """float32 sums in another order: batches of other sizes went through the lower layers."""
    found = {}
    for mode in (CacheMode.OFF, CacheMode.MEMORY, CacheMode.DISK):
        report, adapter = _fit(
            backbone,
            tmp_path / f"{mode}.safetensors",
            cache=mode,
            generator_input=generator_input,
            storage_dtype=StorageType.FLOAT32,
        )
        assert report.cache["mode"] == mode.value
        found[mode] = adapter
    assert _same(found[CacheMode.MEMORY], found[CacheMode.DISK])
    for name, tensor in found[CacheMode.OFF].tensors.items():
        torch.testing.assert_close(
            tensor, found[CacheMode.MEMORY].tensors[name], rtol=1e-3, atol=1e-4
        )


@pytest.mark.parametrize("steps", [1, 5, 12, 13, 30])
def test_a_resumed_run_ends_with_the_bits_of_an_uninterrupted_one(
    backbone: str, tmp_path: Path, steps: int
) -> None:
    whole, expected = _fit(backbone, tmp_path / "whole.safetensors")
    output = tmp_path / "cut.safetensors"
    with pytest.raises(KeyboardInterrupt):
        fit(TRAIN, VALIDATION, TEST, _settings(backbone), output, _Interrupt(steps))
    assert state_path(output).exists()
    assert not output.exists()
    report, adapter = _fit(backbone, output, resume=True)
    assert _same(adapter, expected)
    assert [epoch.loss for epoch in report.epochs] == [epoch.loss for epoch in whole.epochs]
    assert report.best_epoch == whole.best_epoch
    assert not state_path(output).exists()


def test_the_state_of_another_run_is_refused(backbone: str, tmp_path: Path) -> None:
    output = tmp_path / "a.safetensors"
    with pytest.raises(ResumeError, match="no interrupted run"):
        _fit(backbone, output, resume=True)
    with pytest.raises(KeyboardInterrupt):
        fit(TRAIN, VALIDATION, TEST, _settings(backbone), output, _Interrupt(3))
    with pytest.raises(ResumeError, match="other data, settings or backbone"):
        _fit(backbone, output, resume=True, learning_rate=1e-4)
    state_path(output).write_bytes(b"\x00" * 50)
    with pytest.raises(ResumeError, match="cannot be read"):
        _fit(backbone, output, resume=True)


def test_a_loss_that_is_not_finite_stops_and_says_where(backbone: str, tmp_path: Path) -> None:
    output = tmp_path / "a.safetensors"
    with pytest.raises(TrainingError, match=r"at step \d+ of epoch \d+: stopped"):
        _fit(backbone, output, learning_rate=10.0, epochs=50, patience=50, weight_decay=10.0)
    assert not output.exists()


def test_the_best_weights_are_kept_and_patience_ends_the_run(backbone: str, tmp_path: Path) -> None:
    epochs = _Epochs()
    output = tmp_path / "a.safetensors"
    settings = _settings(
        backbone, epochs=30, patience=2, storage_dtype=StorageType.FLOAT32, calibration=False
    )
    report = fit(TRAIN, VALIDATION, TEST, settings, output, epochs)
    best = report.epochs[report.best_epoch - 1]
    assert len(report.epochs) == min(30, report.best_epoch + 2)
    assert report.validation is not None
    assert report.validation.accuracy == best.accuracy
    assert [epoch.epoch for epoch in epochs.reports] == list(range(1, len(report.epochs) + 1))


def test_without_validation_rows_a_share_of_the_training_rows_is_held_out(
    backbone: str, tmp_path: Path
) -> None:
    output = tmp_path / "a.safetensors"
    report = fit(TRAIN, None, None, _settings(backbone), output, SilentProgress())
    assert report.validation is not None
    assert report.test is None
    assert report.data["train"].rows + report.data["validation"].rows == len(TRAIN)


@pytest.mark.parametrize("storage", list(StorageType))
def test_evaluate_finds_the_figures_that_fit_reported(
    backbone: str, tmp_path: Path, storage: StorageType
) -> None:
    """fit measures the weights as they are stored, so the file answers as the report says."""
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
    found = evaluate(
        output, TEST, backbone=backbone, device="cpu", dtype="float32", progress=SilentProgress()
    )
    assert found.metrics == report.test
    assert report.test is not None
    assert adapter.spec.provenance.metrics["test_accuracy"] == pytest.approx(report.test.accuracy)
