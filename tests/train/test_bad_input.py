"""Bad input, output or network is found before training and reported in one line."""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from cli.hints import command_line
from tests.support.families import save
from tests.support.training import TRAIN, dataset, settings_of
from train.cli import main
from train.commands import fit as fit_command
from train.config.defaults import load_backbone_for
from train.fit.fit import set_up
from train.loop.progress import Progress
from train.metrics import Metric
from train.report.progress import LineProgress

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bert")
    save("bert", folder)
    return folder


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with one good file."""
    monkeypatch.chdir(tmp_path)
    _write("good.csv", [(row.text, *row.labels) for row in dataset(60, seed=1).examples])
    return tmp_path


def _write(name: str, rows: Sequence[tuple[str, ...]], head: str = "text,label") -> None:
    lines = (",".join(f'"{cell}"' for cell in row) for row in rows)
    Path(name).write_text("\n".join([head, *lines]) + "\n")


def _fit(*more: str, train: str = "good.csv", output: str = "x.safetensors") -> list[str]:
    return ["fit", "--train", train, "--output", output, *more]


def _refusal(argv: Sequence[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The text after `error: ` in the last line; nothing may have been written."""
    before = sorted(path.name for path in Path().iterdir())
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert sorted(path.name for path in Path().iterdir()) == before, "something was written"
    *_, line = err.splitlines()
    assert line.startswith("error: ")
    assert "Traceback" not in err
    return line.removeprefix("error: ")


@pytest.mark.parametrize("flag", ["--train", "--validation", "--test"])
@pytest.mark.parametrize("blank", ["", "  ", "\t \u200b"])
def test_texts_that_are_all_blank_are_refused_by_column(
    folder: Path, capsys: pytest.CaptureFixture[str], flag: str, blank: str
) -> None:
    assert folder.is_dir()
    _write("blank.csv", [(blank, "good"), (blank, "bad")] * 3, head="body,label")
    _write("good.csv", [("a", "good"), ("b", "bad")] * 3, head="body,label")
    argv = _fit(flag, "blank.csv", "--text-column", "body")
    assert _refusal(argv, capsys) == "blank.csv: no row has any text in 'body'"


@pytest.mark.parametrize("label", ["\x1b[31mbad", "bad\u202e", "b\nad"])
def test_a_label_with_control_characters_is_refused_before_training(
    folder: Path, capsys: pytest.CaptureFixture[str], label: str
) -> None:
    assert folder.is_dir()
    _write("odd.csv", [("a", "good"), ("b", label)] * 3)
    refusal = _refusal(_fit(train="odd.csv"), capsys)
    assert label.encode("unicode_escape").decode() in refusal
    assert "has the control character U+" in refusal


def test_a_pair_is_blank_if_both_texts_are(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert folder.is_dir()
    head = "text,text_pair,label"
    _write("blank.csv", [(" ", "\t", "good"), (" ", " ", "bad")] * 3, head=head)
    message = "blank.csv: no row has any text in 'text' and 'text_pair'"
    assert _refusal(_fit(train="blank.csv"), capsys) == message
    rows = [(" ", f"{word} {index}", word) for index in range(9) for word in ("good", "bad")]
    _write("half.csv", rows, head=head)
    assert _refusal(_fit("--micro-batch", "99", train="half.csv"), capsys).startswith("--micro")


@pytest.mark.slow
def test_some_blank_texts_are_counted_and_trained_on(
    folder: Path, bert: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _write("some.csv", [("a", "good"), (" ", "bad"), ("", "bad"), ("b", "good")] * 20)
    argv = _fit("--backbone", str(bert), "--epochs", "1", "--no-progress", train="some.csv")
    assert main(argv) == 0
    assert "some.csv: 80 rows, 40 of them without any text in 'text'\n" in capsys.readouterr().err
    assert (folder / "x.safetensors").exists()


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["--micro-batch", "64", "--batch-size", "32"], "--micro-batch 64 is more than the batch"),
        (["--output", "README.safetensors"], "README.md is not a model card and would be replaced"),
        (["--output", "/proc/x.safetensors"], "--output /proc/x.safetensors: the folder /proc can"),
        (["--output", f"{'x' * 240}.safetensors"], "--output xxx"),
        (["--output", f"{'x' * 300}.safetensors"], f"{'x' * 300}.safetensors: File name too long"),
        (["--init-from", "none.safetensors"], "--init-from none.safetensors: No such file"),
        (["--init-from", "good.csv"], "--init-from good.csv: not a valid adapter: "),
        (["--search", "0"], "--search must be at least 1, not 0"),
        (["--search", "2", "--validation-fraction", "0"], "--search compares its trials on valid"),
        (["--search", "2", "--resume"], "x.safetensors.search: there is no interrupted search"),
        (["--resume"], "x.safetensors.state: there is no interrupted run to resume"),
        (["--output", os.fsdecode(b"\xff.safetensors")], "not UTF-8: ?.safetensors: rename it"),
        (["--data-name", os.fsdecode(b"\xff")], "not UTF-8: ?: rename it"),
    ],
)
def test_failures_of_the_end_are_refused_at_the_start(
    folder: Path,
    bert: Path,
    capsys: pytest.CaptureFixture[str],
    more: list[str],
    expected: str,
) -> None:
    (folder / "README.md").write_text("# Mine\n")
    assert _refusal(_fit("--backbone", str(bert), *more), capsys).startswith(expected)


@pytest.mark.parametrize("command", ["fit", "evaluate"])
def test_a_data_file_whose_name_is_not_utf8_is_refused(
    folder: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    name = os.fsdecode(b"\xff.csv")
    (folder / name).write_text("text,label\n")
    argv = {"fit": _fit(train=name), "evaluate": ["evaluate", "--adapter", "x", "--data", name]}
    assert _refusal(argv[command], capsys) == "not UTF-8: ?.csv: rename it"


@pytest.mark.slow
def test_a_backbone_that_the_hub_lacks_may_be_a_local_folder(folder: Path) -> None:
    done = _process(
        _fit("--backbone", "nobody/nothing"), HF_HUB_OFFLINE="1", HF_HOME=str(folder / "hf")
    )
    assert done.returncode == 2
    *_, line = done.stderr.splitlines()
    assert line.startswith("error: cannot load the config of the backbone 'nobody/nothing': ")
    assert line.endswith("; --backbone takes a folder with the model's files as well")
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_path_that_the_terminal_cannot_encode_is_escaped(folder: Path, bert: Path) -> None:
    argv = _fit("--backbone", str(bert), "--epochs", "1", "--quiet", output="\u20ac.safetensors")
    done = _process(argv, PYTHONIOENCODING="ascii", PYTHONUTF8="1")
    assert done.returncode == 0, done.stderr
    assert "written: \\u20ac.safetensors, and its model card: \\u20ac.md" in done.stdout
    assert (folder / "\u20ac.md").exists()


def _process(argv: Sequence[str], **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "train", *argv],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_weights_that_are_not_finite_do_not_replace_a_good_state(
    bert: Path, tmp_path: Path
) -> None:
    state = tmp_path / "state"
    settings = settings_of(str(bert))
    training = set_up(
        "idspam",
        {"train": TRAIN},
        settings,
        load_backbone_for(settings),
        selection="validation",
        metric=Metric.ACCURACY,
        checkpoint_file=state,
        progress=Progress(),
    )
    training.loop.save()
    good = state.read_bytes()
    with torch.no_grad():
        training.method.tensors["head.out.bias"][0] = float("nan")
    training.loop.save()
    assert state.read_bytes() == good
    training.close()


class _CtrlC(LineProgress):
    """The signal that a terminal sends, in the first stage of a name."""

    def __init__(self, stage: str) -> None:
        super().__init__(sys.stderr)
        self.stage = stage
        self.reached = False

    def begin(self, stage: str, *, texts: int, later: int = 0) -> None:
        super().begin(stage, texts=texts, later=later)
        self.reached = stage == self.stage

    def advance(
        self, texts: int, *, loss: float | None = None, accuracy: float | None = None
    ) -> None:
        super().advance(texts, loss=loss, accuracy=accuracy)
        if self.reached:
            signal.raise_signal(signal.SIGINT)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("more", "stage", "expected"),
    [
        (
            ["--method", "idspam"],
            "lower layers",
            "interrupted before the first step; to start again: ",
        ),
        ([], "epoch 2/3", "interrupted; to go on: "),
        (
            ["--method", "idspam", "--search", "2"],
            "trial 1/2, lower layers",
            "interrupted; to go on: ",
        ),
        (["--search", "2"], "trial 1/2, epoch 2/3", "interrupted; to go on: "),
    ],
)
def test_ctrl_c_prints_how_to_continue_and_that_works(
    folder: Path,
    bert: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    more: list[str],
    stage: str,
    expected: str,
) -> None:
    argv = _fit("--backbone", str(bert), "--epochs", "3", *more)
    with monkeypatch.context() as patch:
        patch.setattr(fit_command, "progress_of", lambda _: _CtrlC(stage))
        assert main(argv) == 130
    out, err = capsys.readouterr()
    assert out == ""
    *_, line = err.splitlines()
    assert line.startswith(f"{expected}{command_line('train', 'fit', '--train', 'good.csv')} ")
    assert not (folder / "x.safetensors").exists()
    command = line.partition(" -m train ")[2].split()
    assert command[: len(argv)] == argv
    assert main([*command, "--quiet"]) == 0
    left = sorted(path.name for path in folder.iterdir())
    assert left == ["good.csv", "x.md", "x.safetensors", "x.suspects.csv"]


def test_the_state_of_an_older_run_is_not_resumed(
    folder: Path,
    bert: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (folder / "x.safetensors.state").write_bytes(b"older")
    monkeypatch.setattr(fit_command, "progress_of", lambda _: _CtrlC("lower layers"))
    argv = _fit("--backbone", str(bert), "--method", "idspam")
    assert main(argv) == 2
    assert "--resume goes on with that run, --overwrite begins anew" in capsys.readouterr().err
    assert main([*argv, "--overwrite"]) == 130
    *_, replaced, line = capsys.readouterr().err.splitlines()
    assert replaced.startswith("x.safetensors.state: replacing the state of an interrupted run")
    assert line.startswith("interrupted before the first step; to start again: ")
    assert (folder / "x.safetensors.state").read_bytes() == b"older"
