"""`python -m train` as it is typed: what it lists, what it never overwrites, what it says first."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from adapters.backbone.loading import int8_lack
from adapters.format.files import load_adapter
from tests.support.families import save
from tests.support.training import Interrupt
from train.cli import COMMANDS, main
from train.commands import fit as fit_command
from train.fit import fit as fit_module
from train.report.data_checks import REPEATS_HEAD, SUSPECTS_HEAD

ROOT = Path(__file__).resolve().parents[2]
ROWS = "".join(
    json.dumps({"text": f"{words} {index}", "label": label}) + "\n"
    for index in range(60)
    for words, label in (("win a free call now", "spam"), ("hello my good card", "ham"))
)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bert")
    save("bert", folder)
    return folder


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text(ROWS)
    return tmp_path


def _fit(bert: Path, *more: str) -> list[str]:
    flags = ["--backbone", str(bert), "--epochs", "2", "--device", "cpu"]
    return ["fit", "--train", "rows.jsonl", "--output", "x.safetensors", *flags, *more]


def test_without_a_command_they_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    out, err = capsys.readouterr()
    assert [line.split()[0] for line in out.splitlines()] == list(COMMANDS)
    assert err.startswith("error: which command? (see ")


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    "argv",
    [
        ["fit", "--train", "rows.jsonl", "--output", "x.safetensors"],
        ["compare", "--tasks", "rows.jsonl", "--output", "out"],
    ],
    ids=lambda argv: argv[0],
)
@pytest.mark.parametrize("dtype", ["int8", "float8"])
def test_types_without_gradients_are_refused_where_adapters_are_trained(
    argv: list[str], dtype: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*argv, "--dtype", dtype]) == 2
    words = f"--dtype {dtype} cannot train: its products have no gradients"
    assert words in capsys.readouterr().err


@pytest.mark.slow
def test_fit_overwrites_nothing_unless_it_is_told_to(
    folder: Path, bert: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(_fit(bert, "--quiet", "--report", "r.json")) == 0
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    capsys.readouterr()
    for more, named in (
        ([], "x.safetensors and x.md exist"),
        (["--report", "r.json"], "x.safetensors and x.md and r.json exist"),
        (["--resume"], "x.safetensors and x.md exist"),
    ):
        assert main(_fit(bert, *more)) == 2
        out, err = capsys.readouterr()
        assert (out, err) == ("", f"error: {named}; --overwrite replaces them\n")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert main(_fit(bert, "--quiet", "--overwrite", "--seed", "7")) == 0
    assert (folder / "x.safetensors").read_bytes() != before["x.safetensors"]


@pytest.mark.slow
def test_resume_with_other_settings_names_them_before_anything_is_loaded(
    folder: Path,
    bert: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    parsed = [json.loads(row) for row in ROWS.splitlines()]
    rows = "".join(json.dumps({**row, "other": row["text"][::-1]}) + "\n" for row in parsed)
    (folder / "rows.jsonl").write_text(rows)
    with monkeypatch.context() as patch:
        patch.setattr(fit_command, "progress_of", lambda _: Interrupt(2))
        assert main(_fit(bert)) == 130

    def load(_: object) -> None:
        raise AssertionError("the backbone is loaded")

    with monkeypatch.context() as patch:
        patch.setattr(fit_module, "load_backbone_for", load)
        for more, expected in (
            (["--epochs", "5"], "--epochs was 2 and is 5"),
            (["--lr", "0.5", "--seed", "3"], "--lr was "),
            (["--lr", "0.5"], " and is 0.5"),
            (["--prompt-length", "3"], "--prompt-length was 5 and is 3"),
            (["--method", "vectors"], "--method was idspam+vectors and is vectors"),
        ):
            assert main([*_fit(bert, *more), "--resume", "--quiet"]) == 2
            err = capsys.readouterr().err
            assert "x.safetensors.state: belongs to a run with other data, settings" in err
            assert expected in err
        assert main([*_fit(bert, "--dtype", "bfloat16"), "--resume", "--quiet"]) == 2
        assert "--dtype was open and is bfloat16" in capsys.readouterr().err
        # The same file, and another task.
        assert main([*_fit(bert, "--text-column", "other"), "--resume", "--quiet"]) == 2
        assert "other rows in train" in capsys.readouterr().err
        (folder / "rows.jsonl").write_text(rows * 2)
        assert main([*_fit(bert), "--resume", "--quiet"]) == 2
        err = capsys.readouterr().err
        assert "other rows in train" in err
        # What follows from the number of rows is told as well.
        assert "--epochs" not in err
    (folder / "rows.jsonl").write_text(rows)
    assert main([*_fit(bert), "--resume", "--quiet"]) == 0
    assert (folder / "x.safetensors").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("folder")
def test_evaluate_says_what_a_card_says_as_tables_and_as_json(
    bert: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(_fit(bert, "--quiet")) == 0
    capsys.readouterr()
    argv = ["evaluate", "--adapter", "x.safetensors", "--data", "rows.jsonl", "--device", "cpu"]
    assert main([*argv, "--quiet"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    for words in ("95 % interval", "Matthews", "label, and what was answered", "mean score"):
        assert words in out
    assert "at temperature " in out
    assert "calibration error" in out
    assert "revision " in out.splitlines()[-1]
    if int8_lack() is None:
        assert main([*argv, "--json", "--dtype", "int8"]) == 0
        assert json.loads(capsys.readouterr().out)["adapter"] == "x.safetensors"
    assert main([*argv, "--json"]) == 0
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert report["adapter"] == "x.safetensors"
    assert len(report["assessment"]["scaled"]["bins"]) > 1
    assert report["assessment"]["matrix"]
    assert "loading the backbone" in err


@pytest.mark.slow
def test_something_is_said_before_torch_is_imported(folder: Path) -> None:
    commands = (
        ["compare", "--tasks", "rows.jsonl", "--output", "out"],
        ["import-peft", str(folder), "--labels", "a", "--output", "y.safetensors"],
        ["export-peft", "x.safetensors", "out"],
        ["push", "--adapter", "x.safetensors", "--name", "a"],
        ["fit", "--train", "rows.jsonl", "--output", "y.safetensors"],
    )
    for argv in commands:
        program = (
            f"import sys\nsys.modules['torch'] = None\nfrom train.cli import main\nmain({argv!r})"
        )
        done = subprocess.run(
            [sys.executable, "-c", program],
            cwd=folder,
            env={"PYTHONPATH": str(ROOT), "PATH": ""},
            capture_output=True,
            text=True,
            check=False,
        )
        first = done.stderr.splitlines()[0]
        assert not first.startswith("Traceback"), (argv, done.stderr)
        assert done.stdout == ""


def test_import_peft_does_not_overwrite_either(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "y.safetensors").write_bytes(b"mine")
    argv = ["import-peft", str(folder), "--labels", "a", "b", "--output", "y.safetensors"]
    assert main(argv) == 2
    assert "y.safetensors exists; --overwrite replaces it" in capsys.readouterr().err
    assert (folder / "y.safetensors").read_bytes() == b"mine"


@pytest.mark.slow
def test_what_fit_prints_at_its_end_can_be_typed(folder: Path, bert: Path) -> None:
    """The service that it names starts, and takes the adapter."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("ID")}
    environment = kept | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "IDSPAM_PORT": "0"}
    output = ["--output", "my adapter.safetensors"]
    fit = [sys.executable, "-m", "train", *_fit(bert, "--quiet"), *output]
    done = subprocess.run(
        fit, cwd=folder, env=environment, capture_output=True, text=True, check=True
    )
    *_, serve, publish = done.stdout.splitlines()
    serve, publish = serve.partition(": ")[2], publish.partition(": ")[2]
    assert serve.startswith(f"IDSPAM_BACKBONE={bert} ")
    with subprocess.Popen(
        ["bash", "-c", serve.replace(sys.executable, f"exec {sys.executable}")],
        cwd=folder,
        env=environment | {"IDSPAM_ZOO_DIR": "off"},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as service:
        try:
            assert service.stdout is not None
            url = service.stdout.readline().split()[1]
            pushed = subprocess.run(
                ["bash", "-c", publish],
                cwd=folder,
                env=environment | {"ID_SPAM_URL": url},
                capture_output=True,
                text=True,
                check=False,
            )
        finally:
            service.terminate()
            assert service.wait(30) == 0
    assert pushed.returncode == 0, pushed.stderr
    assert pushed.stdout.startswith("my-adapter ")
    assert pushed.stdout.endswith(" created\n")


@pytest.mark.slow
def test_the_published_card_has_no_path_of_this_machine(
    folder: Path, bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hints for the user name his interpreter; what others read does not."""
    monkeypatch.setattr(sys, "orig_argv", ["/secret/bin/python", "-m", "train"])
    assert main(_fit(bert, "--quiet")) == 0
    assert "/secret" not in (folder / "x.md").read_text()
    command = load_adapter(folder / "x.safetensors").spec.provenance.command
    assert command is not None
    assert command.startswith("python -m train fit --train rows.jsonl ")


@pytest.mark.parametrize("written", ["x.suspects.csv", "x.repeats.csv", "other.csv"])
def test_a_run_does_not_replace_the_file_that_it_reads(
    written: str, folder: Path, bert: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Such as the list of suspects, after a person has corrected its labels."""
    rows = [json.loads(row) for row in ROWS.splitlines()]
    head = SUSPECTS_HEAD if "suspects" in written else REPEATS_HEAD
    names = list(dict.fromkeys([*head, "text", "label"]))
    lines = [",".join(names)]
    lines += [",".join(str(row.get(name, "")) for name in names) for row in rows]
    (folder / written).write_text("\n".join(lines) + "\n")
    before = (folder / written).read_bytes()
    command = [item if item != "rows.jsonl" else written for item in _fit(bert)]
    code = main([*command, "--overwrite", "--quiet"])
    said = capsys.readouterr().err
    if written == "other.csv":
        assert code == 0, said
    else:
        assert (code, "is the file of --train" in said) == (2, True), said
    assert (folder / written).read_bytes() == before
