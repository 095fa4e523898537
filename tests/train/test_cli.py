"""The command line: mistakes are one line and code 2; success is files and a table."""

import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from adapters.format.files import load_adapter
from tests.support.families import save
from train.cli import main
from train.config.settings import entries

ROOT = Path(__file__).resolve().parents[2]
GOOD = "".join(
    json.dumps({"text": f"{words} {index}", "label": label}) + "\n"
    for index in range(100)
    for words, label in (("win a free call now", "spam"), ("hello my good card", "ham"))
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with one good file."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "good.jsonl").write_text(GOOD)
    return tmp_path


@pytest.fixture(scope="module")
def backbone_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random BERT as `save_pretrained` writes it."""
    folder = tmp_path_factory.mktemp("bert")
    save("bert", folder)
    return folder


def _refusal(argv: Sequence[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Run, expect code 2 and one line on stderr; returns the text after `error: `."""
    before = sorted(path.name for path in Path().iterdir())
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert sorted(path.name for path in Path().iterdir()) == before, "something was written"
    *progress, line = err.splitlines()
    known = ("rows", "loading the backbone")
    assert all(any(words in earlier for words in known) for earlier in progress), err
    assert line.startswith("error: ")
    return line.removeprefix("error: ")


def _fit(*more: str, train: str = "good.jsonl") -> list[str]:
    return ["fit", "--train", train, "--output", "x.safetensors", *more]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", "bad.jsonl: the file is empty"),
        ("\n\n", "bad.jsonl: holds no rows"),
        ('{"body": "a", "label": "x"}\n', "bad.jsonl:1: no column 'text'; there are: 'body', "),
        ('{"text": "a", "label": "x"}\n' * 3, "bad.jsonl: all 3 rows have the label 'x'; at least"),
        ('{"text": "a", "label": "x"}\n{oops\n', "bad.jsonl:2: not JSON: "),
        ('{"text": "a", "label": null}\n', "bad.jsonl:1: 'label' is missing (null)"),
    ],
)
def test_fit_refuses_bad_data_in_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str], content: str, expected: str
) -> None:
    (folder / "bad.jsonl").write_text(content)
    assert _refusal(_fit(train="bad.jsonl"), capsys).startswith(expected)


@pytest.mark.parametrize("flag", ["--validation", "--test"])
def test_bad_validation_and_test_data_are_refused_before_training(
    folder: Path, capsys: pytest.CaptureFixture[str], flag: str
) -> None:
    (folder / "other.jsonl").write_text('{"text": "a", "label": "eggs"}\n')
    message = _refusal(_fit(flag, "other.jsonl"), capsys)
    assert message == "other.jsonl: labels that good.jsonl does not have: 'eggs'"
    assert _refusal(_fit(flag, "none.csv"), capsys) == "none.csv: no such file"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["--epochs", "0"], "--epochs must be at least 1, not 0"),
        (["--lr", "0"], "--lr must be greater than 0, not 0.0"),
        (["--lr", "nan"], "--lr must be a finite number, not nan"),
        (["--dropout", "1"], "--dropout must be less than 1, not 1.0"),
        (["--epochs", "0", "--seed", "-1"], "--epochs must be at least 1, not 0; --seed must be"),
        (["--epochs", "many"], "argument --epochs: invalid int value: 'many'"),
        (["--cache", "tape"], "argument --cache: invalid choice: 'tape' (choose from"),
        (["--epoch", "3"], "unrecognized arguments: --epoch 3"),
        (["--quiet", "--no-progress"], "argument --no-progress: not allowed with argument --quiet"),
        (["--report", "good.jsonl"], "--report good.jsonl: must end in .json"),
        (["--report", "no/r.json"], "--report no/r.json: there is no folder no"),
        (["--output", "x.bin"], "--output x.bin: must end in .safetensors"),
        (["--output", "no/x.safetensors"], "--output no/x.safetensors: there is no folder no"),
        (["--output", "a.safetensors"], "--output a.safetensors: is a folder"),
        (["--device", "tpu"], "device 'tpu': expected auto, cpu, cuda or cuda:N"),
        (["--backbone", "./nowhere"], "cannot load the config of the backbone './nowhere': "),
        (["--label-column", "text"], "good.jsonl: the same column is asked for twice: text, text"),
    ],
)
def test_fit_refuses_bad_settings_in_one_line(
    folder: Path,
    backbone_folder: Path,
    capsys: pytest.CaptureFixture[str],
    more: list[str],
    expected: str,
) -> None:
    (folder / "a.safetensors").mkdir()
    assert _refusal(_fit("--backbone", str(backbone_folder), *more), capsys).startswith(expected)


def test_resume_needs_an_interrupted_run(
    folder: Path, backbone_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert folder.is_dir()
    message = _refusal(_fit("--backbone", str(backbone_folder), "--resume", "--quiet"), capsys)
    assert message == "x.safetensors.state: there is no interrupted run to resume"


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["train"], "argument COMMAND: invalid choice: 'train' (choose from"),
        (["fit"], "the following arguments are required: --train, --output"),
        (
            ["evaluate", "--adapter", "none.safetensors", "--data", "good.jsonl"],
            "none.safetensors: No such file or directory",
        ),
        (["evaluate", "--adapter", "good.jsonl", "--data", "good.jsonl"], "not a valid adapter: "),
        (["push", "--adapter", "x"], "the following arguments are required: --name"),
    ],
)
def test_every_command_refuses_in_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str], argv: list[str], expected: str
) -> None:
    assert folder.is_dir()
    assert _refusal(argv, capsys).startswith(expected)


def test_a_message_with_control_characters_stays_one_harmless_line(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "bad.csv").write_text('"a\nb\x1b[31m",label\nx,y\n')
    message = _refusal(_fit(train="bad.csv"), capsys)
    assert "no column 'text'" in message
    assert "\x1b" not in message
    assert _refusal(_fit(train="a\x1b[31m\nb.csv"), capsys) == "a?[31m b.csv: no such file"


@pytest.mark.slow
def test_bad_data_ends_a_real_process_with_code_2_before_torch_is_imported(folder: Path) -> None:
    (folder / "bad.jsonl").write_text('{"text": "a", "label": "x"}\n\xff')
    script = (
        "import sys; from train.cli import main; code = main(sys.argv[1:]);"
        "assert 'torch' not in sys.modules; sys.exit(code)"
    )
    (folder / "bad.csv").write_bytes(b"text,label\n\xff,x\n")
    for command in (["-c", script], ["-m", "train"]):
        done = subprocess.run(
            [sys.executable, *command, *_fit(train="bad.csv")],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 2
        assert done.stderr == "error: bad.csv:2: not UTF-8: byte 0xff at position 1\n"
        assert done.stdout == ""
    assert not (folder / "x.safetensors").exists()


@pytest.mark.slow
def test_an_unreachable_hub_is_refused_naming_the_local_way(folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "train", *_fit(train="nobody/nothing")],
        env=os.environ
        | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hf")},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    *_, line = done.stderr.splitlines()
    assert line.startswith("error: nobody/nothing: neither a file nor a hub data set")
    assert line.endswith("give a local .jsonl, .csv, .tsv or .parquet file instead")
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_fit_and_evaluate_write_what_they_print(
    folder: Path, backbone_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "test.csv").write_text("text,label\nwin free 3,spam\nhello good 4,ham\n")
    argv = _fit("--backbone", str(backbone_folder), "--epochs", "2", "--test", "test.csv")
    assert main([*argv, "--report", "r.json", "--data-licence", "CC0"]) == 0
    fitted, err = capsys.readouterr()
    report = json.loads((folder / "r.json").read_text())
    for split in ("validation", "test"):
        assert set(report[split]) == {"accuracy", "macro_f1", "matthews"}
        assert f"{report[split]['accuracy']:.4f}" in fitted
    for key in ("majority", "head_only", "trainable_parameters", "seconds", "seconds_per_epoch"):
        assert isinstance(report[key], int | float)
    assert report["majority"] == 0.5
    assert report["baselines"]["majority"]["test"]["accuracy"] == report["majority"]
    assert [epoch["epoch"] for epoch in report["epochs"]] == [1, 2]
    assert report["data"]["test"]["rows"] == 2
    assert report["data"]["train"]["labels"] == {"ham": 90, "spam": 90}
    assert report["command"].startswith("python -m train fit --train good.jsonl")
    assert {"python", "torch", "transformers"} <= set(report["versions"])
    for shown in ("this adapter", "head only", "majority class", "x.safetensors", "push --adapter"):
        assert shown in fitted
    assert "epoch 2: loss " in err
    assert "\x1b" not in err
    assert "\r" not in err
    provenance = load_adapter("x.safetensors").spec.provenance
    assert provenance.data_licence == "CC0"
    assert provenance.data_sha256 == report["data"]["train"]["sha256"]
    evaluation = ["evaluate", "--adapter", "x.safetensors", "--data", "test.csv"]
    assert main([*evaluation, "--quiet", "--report", "e.json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads((folder / "e.json").read_text())["accuracy"] == report["test"]["accuracy"]
    assert f"{report['test']['accuracy']:.4f}" in out
    left = sorted(path.name for path in folder.iterdir() if path.name.startswith((".", "x")))
    assert left == ["x.md", "x.safetensors", "x.suspects.csv"]
    assert "written: x.safetensors, and its model card: x.md" in fitted


@pytest.mark.slow
def test_settings_of_the_command_line_are_not_searched_even_if_they_are_defaults(
    folder: Path, backbone_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--search", "2", "--dropout", "0.1", "--insertion-layer", "1", "--epochs", "1"]
    argv = _fit("--backbone", str(backbone_folder), *flags, "--report", "r.json", "--quiet")
    assert main(argv) == 0
    trials = json.loads((folder / "r.json").read_text())["trials"]
    assert {*trials[1]["settings"]} == {"learning_rate", "weight_decay", "batch_size"}
    assert "search: trial " in capsys.readouterr().out


@pytest.mark.slow
def test_ctrl_c_keeps_the_state_and_prints_a_command_that_continues(
    folder: Path, backbone_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = _fit("--backbone", str(backbone_folder), "--epochs", "15", "--patience", "15")
    with subprocess.Popen(
        [sys.executable, "-m", "train", *argv],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr is not None
        try:
            while not (line := process.stderr.readline()).startswith("epoch 1:"):
                assert line, "the process ended before its first epoch"
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130, err
    assert out == ""
    assert "Traceback" not in err
    hint = shlex.join([sys.executable, "-m", "train", "fit", "--train"])
    assert err.splitlines()[-1].startswith(f"interrupted; to go on: {hint} ")
    assert err.rstrip().endswith("--resume")
    assert not (folder / "x.safetensors").exists()
    assert (folder / "x.safetensors.state").exists()
    assert main([*argv, "--resume"]) == 0
    assert "epoch 1:" not in capsys.readouterr().err
    assert (folder / "x.safetensors").exists()
    assert not (folder / "x.safetensors.state").exists()


def test_every_setting_has_a_flag_with_its_default_in_the_help(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["fit", "--help"])
    assert ended.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    for entry in entries():
        assert f" {entry.flag}" in shown
        default = entry.setting.otherwise if entry.default is None else str(entry.default)
        assert f"{entry.setting.help} (default: {default})" in shown
