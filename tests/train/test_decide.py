"""`fit --precision` and `--abstain-below`: from the command line to file, card and report."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from adapters.format.files import load_adapter
from tests.support import families
from tests.support.label_sets import label_sets, write_jsonl
from tests.support.training import TEST, TRAIN, VALIDATION, fitted, settings_of
from train import cli
from train.data.dataset import Dataset
from train.errors import SettingsError
from train.loop.progress import Progress
from train.report.card_file import card_path
from train.report.evaluation import evaluate


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("backbone")
    families.save("bert", folder)
    return str(folder)


def _write(path: Path, data: Dataset) -> str:
    rows = ({"text": row.text, "label": row.label} for row in data.examples)
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return str(path)


@pytest.fixture
def command(backbone: str, tmp_path: Path) -> list[str]:
    """A quick `fit`; its validation rows are 40."""
    argv = ["fit", "--train", _write(tmp_path / "train.jsonl", TRAIN)]
    argv += ["--validation", _write(tmp_path / "validation.jsonl", VALIDATION)]
    argv += ["--backbone", backbone, "--device", "cpu", "--output", str(tmp_path / "x.safetensors")]
    return [*argv, "--quiet", "--epochs", "2", "--batch-size", "8"]


def _refusal(argv: Sequence[str], folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    before = sorted(path.name for path in folder.iterdir())
    assert cli.main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert sorted(path.name for path in folder.iterdir()) == before, "something was written"
    (line,) = err.splitlines()
    return line.removeprefix("error: ")


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["--precision", "0"], "--precision must be greater than 0, not 0.0"),
        (["--precision", "1"], "--precision must be less than 1, not 1.0"),
        (["--precision", "nan"], "--precision must be a finite number, not nan"),
        (["--precision", "most"], "argument --precision: invalid float value: 'most'"),
        (["--abstain-below", "1"], "--abstain-below must be less than 1, not 1.0"),
        (["--abstain-below", "0.5"], "--abstain-below 0.5 never abstains: the best of 2 labels"),
        (
            ["--abstain-below", "0.7", "--precision", "0.9"],
            "--precision chooses what --abstain-below sets: give one of them",
        ),
        (
            ["--precision", "0.95"],
            "--precision 0.95 needs at least 59 validation rows to be shown with 95% confidence, "
            "there are 40",
        ),
    ],
)
def test_what_no_training_could_reach_is_refused_before_it(
    command: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    more: list[str],
    expected: str,
) -> None:
    assert _refusal([*command, *more], tmp_path, capsys).startswith(expected)


def test_a_precision_needs_validation_rows(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    at = command.index("--validation")
    argv = [*command[:at], *command[at + 2 :], "--validation-fraction", "0", "--precision", "0.9"]
    said = _refusal(argv, tmp_path, capsys)
    assert said == "--precision is judged on validation rows, and there are none"


@pytest.mark.parametrize("flag", ["--precision", "--abstain-below"])
def test_sets_of_labels_have_their_own_thresholds(
    backbone: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], flag: str
) -> None:
    train = write_jsonl(tmp_path / "sets.jsonl", label_sets(40, seed=1))
    argv = ["fit", "--train", str(train), "--backbone", backbone, "--quiet", flag, "0.9"]
    said = _refusal([*argv, "--output", str(tmp_path / "x.safetensors")], tmp_path, capsys)
    assert said.startswith(f"{flag} is for one label a text, {train} has several: each label has")


@pytest.mark.slow
def test_a_precision_that_nothing_reaches_leaves_nothing(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two epochs learn next to nothing; 40 rows could show 0.92 at most."""
    (tmp_path / "x.safetensors").write_bytes(b"an older adapter")
    flags = ["--lr", "1e-9", "--precision", "0.92", "--overwrite"]
    said = _refusal([*command, *flags], tmp_path, capsys)
    assert said.startswith(
        "--precision 0.92: on the 40 validation rows no threshold reaches it with 95% confidence; "
    )
    assert (tmp_path / "x.safetensors").read_bytes() == b"an older adapter"


@pytest.mark.slow
def test_a_precision_becomes_a_threshold_and_is_reported(backbone: str, tmp_path: Path) -> None:
    settings = settings_of(backbone, precision=0.4)
    report, adapter = fitted(settings, tmp_path / "a.safetensors")
    decision, chosen = adapter.spec.decision, report.decision
    assert decision is not None
    assert chosen is not None
    assert decision.precision == chosen.precision == 0.4
    assert decision.abstain_below == chosen.abstain_below
    assert chosen.answered.keys() == {"validation", "test"}
    validation = chosen.answered["validation"]
    assert validation.rows == len(VALIDATION)
    assert validation.accuracy is not None
    assert validation.accuracy > 0.4
    assert chosen.answered["test"].rows == len(TEST)
    assert [point[0] for point in decision.coverage] == [part.threshold for part in chosen.coverage]
    assert decision.coverage[0][1:] == (1.0, pytest.approx(report.validation.accuracy, abs=1e-6))  # type: ignore[union-attr]
    content = json.loads(report.to_json())
    assert content["decision"]["answered"]["test"]["accuracy"] == chosen.answered["test"].accuracy
    assert content["calibration"]["after"] <= content["calibration"]["before"]
    assert report.temperature == adapter.spec.calibration.temperature
    again = evaluate(
        tmp_path / "a.safetensors",
        TEST,
        backbone=backbone,
        device="cpu",
        dtype=None,
        progress=Progress(),
    ).report.decision
    assert again is not None
    assert (again.abstain_below, again.precision) == (chosen.abstain_below, 0.4)
    assert again.answered == {"rows": chosen.answered["test"]}
    card = card_path(tmp_path / "a.safetensors").read_text()
    assert f"abstains from texts with a top score below {chosen.abstain_below}**" in card
    assert "It is kept only if it lowers their expected calibration error, cross-fitted" in card


@pytest.mark.slow
def test_a_threshold_may_be_set_and_the_closing_lines_say_what_it_does(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*command, "--abstain-below", "0.7"]) == 0
    out = capsys.readouterr().out
    assert "abstains below 0.7: of validation it answers " in out
    assert "calibration error" in out
    output = str(tmp_path / "x.safetensors")
    measure = ["evaluate", "--adapter", output, "--data", str(tmp_path / "validation.jsonl")]
    at = command.index("--backbone")
    assert cli.main([*measure, *command[at : at + 4], "--quiet"]) == 0
    measured = capsys.readouterr().out
    assert "abstain below" in measured
    assert "abstains below 0.7: of rows it answers " in measured
    decision = load_adapter(tmp_path / "x.safetensors").spec.decision
    assert decision is not None
    assert (decision.abstain_below, decision.precision) == (0.7, None)
    assert decision.coverage[0][1] == 1.0
    card = card_path(tmp_path / "x.safetensors").read_text()
    assert "below 0.7**" in card
    assert "The threshold was given, not chosen." in card


@pytest.mark.slow
def test_without_either_an_adapter_never_abstains_and_has_the_curve(
    backbone: str, tmp_path: Path
) -> None:
    report, adapter = fitted(settings_of(backbone, epochs=1), tmp_path / "a.safetensors")
    assert adapter.spec.abstain_below is None
    assert adapter.spec.decision is not None
    assert len(adapter.spec.decision.coverage) > 5
    assert report.decision is not None
    assert report.decision.answered == {}


def test_settings_that_exclude_each_other_are_refused_in_python_as_well() -> None:
    with pytest.raises(SettingsError, match="give one of them"):
        settings_of(None, precision=0.9, abstain_below=0.7)
