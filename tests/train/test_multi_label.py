"""Several labels a text, from training to the file: every command, method and figure."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from adapters.format.files import Adapter, load_adapter
from tests.support import families
from tests.support.experiments import warm_workers
from tests.support.label_sets import LABELS, label_sets, write_jsonl
from tests.support.training import Interrupt, dataset, is_same, settings_of
from train import cli
from train.config.settings import StorageType
from train.data.dataset import Dataset
from train.errors import DataError, ResumeError
from train.experiments.compare import compare
from train.fit.fit import fit, set_up
from train.loop.checkpoint import checkpoint_path
from train.loop.progress import Progress
from train.methods import METHODS
from train.metrics import Metric, MultiLabelMetrics
from train.report.card_file import card_path
from train.report.evaluation import evaluate
from train.report.report import FitReport
from train.set_metrics import MultiLabelAssessment

pytestmark = pytest.mark.slow

TRAIN, VALIDATION, TEST = label_sets(160, seed=1), label_sets(60, seed=2), label_sets(60, seed=3)


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("backbone")
    families.save("bert", folder)
    return str(folder)


def _fit(
    backbone: str,
    output: Path,
    progress: Progress | None = None,
    *,
    train: Dataset = TRAIN,
    validation: Dataset | None = VALIDATION,
    **values: object,
) -> tuple[FitReport, Adapter]:
    settings = settings_of(backbone, **({"epochs": 6, "patience": 6} | values))
    report = fit(train, validation, TEST, settings, output, progress or Progress())
    return report, load_adapter(output)


@pytest.fixture(scope="module")
def whole(backbone: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[FitReport, Adapter]:
    return _fit(backbone, tmp_path_factory.mktemp("whole") / "a.safetensors")


def test_sets_are_learnt_and_reported_beside_their_controls(
    whole: tuple[FitReport, Adapter],
) -> None:
    report, adapter = whole
    assert isinstance(report.test, MultiLabelMetrics)
    assert isinstance(report.majority.test, MultiLabelMetrics)
    assert isinstance(report.head_only.test, MultiLabelMetrics)
    assert report.test.micro_f1 > report.majority.test.micro_f1
    assert report.test.exact_match > report.majority.test.exact_match + 0.1
    assert (adapter.spec.activation, adapter.spec.labels) == ("sigmoid", LABELS)
    best = report.epochs[report.best_epoch - 1]
    assert best.micro_f1 == max(epoch.micro_f1 or 0.0 for epoch in report.epochs)
    assert adapter.spec.thresholds is not None
    assert report.thresholds == dict(zip(LABELS, adapter.spec.thresholds, strict=True))


def test_the_file_answers_as_the_report_says(
    backbone: str, whole: tuple[FitReport, Adapter]
) -> None:
    report, adapter = whole
    again = evaluate(
        Path(report.output),
        TEST,
        backbone=backbone,
        device="cpu",
        dtype=None,
        progress=Progress(),
    ).report
    assert again.metrics == report.test
    measured, card = again.assessment, report.assessments["test"]
    assert isinstance(measured, MultiLabelAssessment)
    assert isinstance(card, MultiLabelAssessment)
    for figure in ("rows", "micro_f1", "macro_f1", "exact_match", "labels", "thresholds", "sizes"):
        assert getattr(measured, figure) == getattr(card, figure)
    for one, other in ((measured.scaled, card.scaled), (measured.unscaled, card.unscaled)):
        assert one.brier == pytest.approx(other.brier, abs=1e-6)
        assert one.expected_calibration_error == pytest.approx(
            other.expected_calibration_error, abs=1e-6
        )
    content = json.loads(again.to_json())
    assert {"micro_f1", "macro_f1", "exact_match"} < content.keys()
    assert content["data"]["unlabelled"] == sum(not row.labels for row in TEST.examples)
    assert adapter.spec.provenance.metrics["test_micro_f1"] == pytest.approx(content["micro_f1"])


def test_the_card_shows_the_figures_of_sets(whole: tuple[FitReport, Adapter]) -> None:
    report, adapter = whole
    assert isinstance(report.test, MultiLabelMetrics)
    card = card_path(Path(report.output)).read_text()
    for part in (
        f"any number of its {len(LABELS)} labels, or none.",
        "micro-F1 of the labels given to the 60 rows of `test`: this adapter **",
        f"| `test` | micro-F1 | {report.test.micro_f1:.4f} |",
        f"| `test` | exact match | {report.test.exact_match:.4f} |",
        "| *without a label* |",
        "| label | threshold | rows | answers | precision | recall | F1 |",
        "the thresholds were chosen on `validation`",
        "### How many labels, on `test`",
        "| epoch | training loss | micro-F1 | macro-F1 | seconds |",
    ):
        assert part in card, part
    for part in ("Confusion", "Matthews", "most confident", "\n\n\n"):
        assert part not in card, part
    content = json.loads(report.to_json())
    assert content["assessments"]["test"]["micro_f1"]["value"] == report.test.micro_f1
    assert content["majority"] == content["baselines"]["majority"]["test"]["micro_f1"]
    assert adapter.spec.thresholds is not None
    for label, threshold in zip(LABELS, adapter.spec.thresholds, strict=True):
        assert f"| `{label}` | {threshold:.4f} |" in card


def test_without_validation_or_calibration_no_threshold_is_stored(
    backbone: str, tmp_path: Path
) -> None:
    for name, values in (
        ("a", {"calibration": False}),
        ("b", {"validation": None, "validation_fraction": 0.0}),
    ):
        report, adapter = _fit(backbone, tmp_path / f"{name}.safetensors", epochs=1, **values)
        assert adapter.spec.thresholds is None
        assert report.thresholds is None
        assert adapter.spec.calibration.temperature == 1.0
        assert "here one half for every label" in card_path(tmp_path / f"{name}.x").read_text()


def test_rows_are_held_out_if_there_are_no_validation_rows(backbone: str, tmp_path: Path) -> None:
    report, _ = _fit(backbone, tmp_path / "a.safetensors", validation=None, epochs=1)
    assert set(report.data) == {"train", "validation", "test"}
    assert set(report.data["validation"].labels) == set(LABELS)


def test_a_resumed_run_ends_with_the_bits_of_an_uninterrupted_one(
    backbone: str, tmp_path: Path, whole: tuple[FitReport, Adapter]
) -> None:
    output = tmp_path / "a.safetensors"
    with pytest.raises(KeyboardInterrupt):
        _fit(backbone, output, Interrupt(50))
    report, adapter = _fit(backbone, output, resume=True)
    assert is_same(adapter, whole[1])
    assert adapter.spec.thresholds == whole[1].spec.thresholds
    assert (report.test, report.best_epoch) == (whole[0].test, whole[0].best_epoch)
    assert [epoch.micro_f1 for epoch in report.epochs] == [
        epoch.micro_f1 for epoch in whole[0].epochs
    ]


def test_a_run_on_one_label_a_text_is_another_run(backbone: str, tmp_path: Path) -> None:
    output = tmp_path / "a.safetensors"
    with pytest.raises(KeyboardInterrupt):
        _fit(backbone, output, Interrupt(10))
    # The same texts, and the same hash: only the kind of their labels differs.
    first = replace(
        TRAIN,
        examples=tuple(replace(row, label=(*row.labels, "none")[0]) for row in TRAIN.examples),
    )
    with pytest.raises(ResumeError, match="belongs to a run with other data"):
        fit(
            first,
            replace(first, examples=first.examples[:60], source="v", sha256=VALIDATION.sha256),
            None,
            settings_of(backbone, epochs=6, patience=6, resume=True),
            output,
            Progress(),
        )
    assert checkpoint_path(output).exists()


def test_a_head_is_taken_over_from_sets_and_not_from_single_labels(
    backbone: str, tmp_path: Path, whole: tuple[FitReport, Adapter]
) -> None:
    class Notes(Progress):
        def __init__(self) -> None:
            self.said = ""

        def note(self, message: str) -> None:
            self.said += message + "\n"

    notes = Notes()
    _fit(backbone, tmp_path / "a.safetensors", notes, epochs=1, init_from=whole[0].output)
    assert "its generator, vectors and head" in notes.said
    single = tmp_path / "single.safetensors"
    data = dataset(60, seed=1)
    fit(data, data, None, settings_of(backbone, epochs=1), single, Progress())
    notes = Notes()
    _fit(backbone, tmp_path / "b.safetensors", notes, epochs=1, init_from=str(single))
    assert "its generator and vectors; it has another kind of answer: a new head" in notes.said


def test_a_search_compares_its_trials_by_micro_f1(backbone: str, tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    report, _ = _fit(backbone, tmp_path / "a.safetensors", search=2, epochs=2)
    chosen = next(trial for trial in report.trials if trial.chosen)
    assert chosen.accuracy == max(epoch.micro_f1 or 0.0 for epoch in report.epochs)


@pytest.mark.parametrize("storage", [StorageType.FLOAT32, StorageType.FLOAT16, StorageType.AUTO])
def test_stored_weights_give_the_measured_answers(
    backbone: str, tmp_path: Path, storage: StorageType
) -> None:
    output = tmp_path / "a.safetensors"
    report, _ = _fit(backbone, output, epochs=2, storage_dtype=storage)
    measured = evaluate(
        output, TEST, backbone=backbone, device="cpu", dtype=None, progress=Progress()
    )
    assert measured.report.metrics == report.test


@pytest.mark.parametrize("name", METHODS)
def test_every_method_learns_sets(backbone: str, tmp_path: Path, name: str) -> None:
    from train.config.defaults import load_backbone_for

    settings = settings_of(backbone, epochs=1)
    training = set_up(
        name,
        {"train": TRAIN, "validation": VALIDATION},
        settings,
        load_backbone_for(settings),
        selection="validation",
        metric=Metric.MICRO_F1,
        checkpoint_file=tmp_path / "a.state",
        progress=Progress(),
    )
    loop, objective = training.loop, training.method.objective
    true = training.classes["validation"]

    def loss() -> float:
        return float(objective.loss(training.logits()["validation"], true)) / len(true)

    # The head starts at the frequencies of the labels.
    shares = training.classes["train"].mean(dim=0)
    assert torch.allclose(training.method.head.out_bias.sigmoid(), shares, atol=0.01)
    before = loss()
    loop.fit(Progress())
    assert loss() < before
    training.close()


def test_a_comparison_reports_micro_f1(backbone: str, tmp_path: Path) -> None:
    folder = tmp_path / "faults"
    folder.mkdir()
    for split, data in (("train", TRAIN), ("test", TEST)):
        write_jsonl(folder / f"{split}.jsonl", data)
    with warm_workers():
        findings = compare(
            [str(folder)],
            ["idspam", "head-only"],
            [1],
            settings_of(backbone, epochs=1),
            tmp_path / "out",
            data_root=None,
            jobs=1,
        )
    assert not findings.failed
    assert findings.metrics == {"faults": Metric.MICRO_F1}
    report = (tmp_path / "out" / "report.md").read_text()
    assert "faults (micro-f1)" in report
    rows = (tmp_path / "out" / "results.csv").read_text()
    for metric in ("micro-f1", "macro-f1", "accuracy"):
        assert f",test,{metric}," in rows
    assert "matthews" not in rows


def test_the_commands_take_a_separator_and_refuse_in_one_line(
    backbone: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [f"{row.text},{'|'.join(row.labels)}" for row in TRAIN.examples]
    good = tmp_path / "good.csv"
    good.write_text("text,label\n" + "\n".join(lines) + "\n")
    output = tmp_path / "a.safetensors"
    common = ["fit", "--backbone", backbone, "--device", "cpu", "--epochs", "1", "--quiet"]
    common += ["--output", str(output)]
    assert cli.main([*common, "--train", str(good), "--label-separator", "|"]) == 0
    assert "micro-F1" in capsys.readouterr().out
    measure = ["evaluate", "--adapter", str(output), "--data", str(good), "--backbone", backbone]
    assert cli.main([*measure, "--quiet", "--device", "cpu", "--label-separator", "|"]) == 0
    assert "exact match" in capsys.readouterr().out
    some = tmp_path / "some.csv"
    some.write_text("text,label\n" + "\n".join(line for line in lines if line[-1] != ",") + "\n")
    before = sorted(tmp_path.iterdir())
    common += ["--overwrite"]
    training, unread = [*common, "--train", str(good), "--label-separator"], [*measure]
    unread[4] = str(some)
    for arguments, said in (
        (unread, "has one label a text, the adapter has several labels a text"),
        ([*training, ";"], "no row has two labels with ';'"),
        ([*training, "ab"], "expected one character"),
    ):
        assert cli.main(arguments) == 2
        (error,) = capsys.readouterr().err.strip().splitlines()[-1:]
        assert said in error
    assert sorted(tmp_path.iterdir()) == before


def test_one_label_a_text_is_refused_by_an_adapter_of_sets(
    backbone: str, whole: tuple[FitReport, Adapter]
) -> None:
    with pytest.raises(DataError, match="has one label a text, the adapter has several"):
        evaluate(
            Path(whole[0].output),
            dataset(4, seed=1),
            backbone=backbone,
            device="cpu",
            dtype=None,
            progress=Progress(),
        )
