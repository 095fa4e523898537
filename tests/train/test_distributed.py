"""Several processes under a launcher, on CPUs: they train like one, and none is left over.

Dropout is off: each process would draw its own masks.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from adapters.errors import UnusableBackbone
from adapters.format.files import load_adapter
from tests.support import families
from tests.support.training import Interrupt
from train.cli import main
from train.config.settings import FitSettings, StorageType
from train.data.dataset import read_examples
from train.errors import SettingsError
from train.fit.fit import fit
from train.loop.checkpoint import checkpoint_path
from train.loop.distributed import process_group
from train.loop.launch import Launch, is_first_to_fail
from train.loop.progress import Progress
from train.report.report import FitReport

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
LAUNCHER = (
    *(sys.executable, "-m", "accelerate.commands.launch"),
    # On CPUs as well: without it `accelerate launch` starts one process there.
    *("--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--main_process_port", "0"),
    *("--mixed_precision", "no", "--dynamo_backend", "no", "--module", "train"),
)
EPOCHS = 8
# The last step of an epoch has one row: one of the processes has none.
ROWS, BATCH = 97, 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny random backbone and texts with the word good or bad among others."""
    folder = tmp_path_factory.mktemp("run")
    families.save("bert", folder / "bert")
    rng = random.Random(1)
    for name, rows in (("train", ROWS), ("validation", 40)):
        lines = []
        for _ in range(rows):
            label = rng.choice(("good", "bad"))
            words = rng.choices(("the", "card", "my", "call", "you", "now"), k=rng.randint(1, 8))
            words.insert(rng.randint(0, len(words)), label)
            lines.append(json.dumps({"text": " ".join(words), "label": label}) + "\n")
        (folder / f"{name}.jsonl").write_text("".join(lines))
    return folder


@pytest.fixture(scope="module")
def whole(folder: Path) -> FitReport:
    """One process from the first step to the last."""
    return _alone(folder, "whole.safetensors")


def _alone(
    folder: Path,
    output: str,
    *,
    epochs: int = EPOCHS,
    resume: bool = False,
    progress: Progress | None = None,
) -> FitReport:
    """The run of `_flags`, in this process alone."""
    settings = FitSettings(
        backbone=str(folder / "bert"),
        device="cpu",
        epochs=epochs,
        patience=epochs,
        batch_size=BATCH,
        learning_rate=1e-3,
        dropout=0.0,
        hidden_dropout=0.0,
        storage_dtype=StorageType.FLOAT32,
        resume=resume,
    )
    train, validation = (
        read_examples(str(folder / f"{name}.jsonl")) for name in ("train", "validation")
    )
    shown = progress or Progress()
    return fit(train, validation, None, settings, folder / output, shown)


def _flags(output: str, *more: str, epochs: int = EPOCHS) -> list[str]:
    files = ["--train", "train.jsonl", "--validation", "validation.jsonl", "--output", output]
    length = ["--epochs", f"{epochs}", "--patience", f"{epochs}", "--batch-size", f"{BATCH}"]
    others = [
        "--lr",
        "1e-3",
        "--dropout",
        "0",
        "--hidden-dropout",
        "0",
        "--storage-dtype",
        "float32",
        "--device",
        "cpu",
    ]
    return ["fit", *files, "--backbone", "bert", *length, *others, "--no-progress", *more]


@contextmanager
def _launched(folder: Path, flags: list[str]) -> Iterator[subprocess.Popen[str]]:
    """A launcher with two processes; at the end of the block they are killed if they still run."""
    own = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    own |= dict.fromkeys(("TMPDIR", "HF_HOME"), str(folder))
    with subprocess.Popen(
        [*LAUNCHER, *flags],
        cwd=folder,
        env=os.environ | own,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as launcher:
        try:
            yield launcher
        finally:
            if launcher.poll() is None:
                for pid in (*_processes(launcher.pid), launcher.pid):
                    os.kill(pid, signal.SIGKILL)


def _processes(launcher: int) -> list[int]:
    """The running processes of a launcher, by rank."""
    by_rank = {}
    for children in Path(f"/proc/{launcher}/task").glob("*/children"):
        for pid in map(int, children.read_text().split()):
            for entry in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                if entry.startswith(b"RANK="):
                    by_rank[int(entry.removeprefix(b"RANK="))] = pid
    return [by_rank[rank] for rank in sorted(by_rank)]


def _wait_for(launcher: subprocess.Popen[str], start: str) -> str:
    """Read stderr up to a line that starts like this."""
    assert launcher.stderr is not None
    seen = []
    for line in launcher.stderr:
        seen.append(line)
        if line.startswith(start):
            return "".join(seen)
    raise AssertionError("".join(seen))


def _ended(launcher: subprocess.Popen[str]) -> tuple[str, str]:
    """stdout and the rest of stderr of a run that ends by itself.

    All processes have ended then: each keeps these pipes open until it does.
    """
    return launcher.communicate(timeout=60)


def _largest_difference(folder: Path, output: str) -> float:
    """The largest difference between its weights and those of the whole run in one process."""
    expected, trained = (load_adapter(folder / name) for name in ("whole.safetensors", output))
    assert trained.tensors.keys() == expected.tensors.keys()
    return max(
        float((tensor - trained.tensors[name]).abs().max())
        for name, tensor in expected.tensors.items()
    )


def test_two_processes_train_as_one_does_and_one_of_them_reports(
    folder: Path, whole: FitReport
) -> None:
    with _launched(folder, _flags("two.safetensors", "--report", "two.json")) as launcher:
        out, err = _ended(launcher)
    assert launcher.returncode == 0, err
    report = json.loads((folder / "two.json").read_text())
    assert report["settings"]["processes"] == 2
    for epoch, expected in zip(report["epochs"], whole.epochs, strict=True):
        assert epoch["loss"] == pytest.approx(expected.loss, rel=1e-5)
        assert epoch["accuracy"] == expected.accuracy
    assert whole.epochs[-1].loss < whole.epochs[0].loss - 0.1, (
        "a loss that hardly falls proves nothing"
    )
    assert _largest_difference(folder, "two.safetensors") < 1e-5
    assert (out.count("this adapter"), out.count("two.safetensors")) == (1, 2)
    assert (err.count("train.jsonl: 97 rows"), err.count("epoch 8:")) == (1, 1)
    assert not checkpoint_path(folder / "two.safetensors").exists()


def test_two_processes_resume_the_checkpoint_of_one_and_one_theirs(
    folder: Path, whole: FitReport
) -> None:
    output, steps = "cut.safetensors", -(-ROWS // BATCH)
    with pytest.raises(KeyboardInterrupt):
        _alone(folder, output, progress=Interrupt(steps + 3))
    with _launched(folder, _flags(output, "--resume")) as launcher:
        assert "epoch 1:" not in _wait_for(launcher, "epoch 2:")
        # Only one process gets the signal, not the launcher: both stop together all the same.
        os.kill(_processes(launcher.pid)[1], signal.SIGTERM)
        _, err = _ended(launcher)
    assert err.count("interrupted; the same command with --resume goes on") == 1
    assert "error: " not in err
    assert not (folder / output).exists()
    report = _alone(folder, output, resume=True)
    assert _largest_difference(folder, output) < 1e-5
    assert [epoch.loss for epoch in report.epochs] == pytest.approx(
        [epoch.loss for epoch in whole.epochs], rel=1e-5
    )


def test_the_death_of_one_process_ends_the_run_and_leaves_a_checkpoint(folder: Path) -> None:
    with _launched(folder, _flags("dead.safetensors", epochs=1000)) as launcher:
        _wait_for(launcher, "epoch 1:")
        os.kill(_processes(launcher.pid)[1], signal.SIGKILL)
        started = time.monotonic()
        _, err = _ended(launcher)
    assert time.monotonic() - started < 20, "the launcher had to use force"
    assert launcher.returncode == 1
    assert err.count("error: another process of this run is gone: ") == 1
    assert checkpoint_path(folder / "dead.safetensors").exists()
    with pytest.raises(KeyboardInterrupt):
        _alone(folder, "dead.safetensors", epochs=1000, resume=True, progress=Interrupt(1))


def test_an_error_of_all_processes_is_shown_once(folder: Path) -> None:
    (folder / "bad.jsonl").write_text("\n")
    with _launched(folder, _flags("none.safetensors", "--train", "bad.jsonl")) as launcher:
        _, err = _ended(launcher)
    assert err.count("error: ") == 1
    assert "error: bad.jsonl: holds no rows\n" in err
    assert launcher.returncode == 1


def test_the_first_process_to_fail_is_one_of_this_start_of_this_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    assert [is_first_to_fail(), is_first_to_fail()] == [True, True], "there is no other process"
    for attempt in ("attempt_0", "attempt_1"):
        first_to_fail = []
        for rank in ("1", "0", "2"):
            folder = tmp_path / attempt / rank
            folder.mkdir(parents=True)
            monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(folder / "error.json"))
            first_to_fail.append(is_first_to_fail())
        assert first_to_fail == [True, False, False]
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "gone" / "0" / "error.json"))
    assert is_first_to_fail(), "an error shown twice is better than none"


@pytest.mark.parametrize("command", ["evaluate", "push"])
def test_other_commands_refuse_several_processes(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = {
        "evaluate": ["--adapter", "x", "--data", "y"],
        "push": ["--adapter", "x", "--name", "x", "--url", "http://x"],
    }
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main([command, *argv[command]]) == 2
    assert capsys.readouterr().err.startswith(f"error: {command} cannot run under a launcher ")


def test_a_launcher_that_starts_one_process_instead_of_several_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    assert Launch.from_environment() == Launch(), "only one process was requested"
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    assert main(["fit", "--train", "x", "--output", "x.safetensors"]) == 2
    assert "accelerate launch --cpu starts one process" in capsys.readouterr().err


def test_one_device_for_all_processes_is_refused() -> None:
    launch = Launch(rank=1, world_size=2, local_rank=1)
    with (
        pytest.raises(SettingsError, match="--device cuda:1: a launcher gives each process"),
        process_group(launch, "cuda:1"),
    ):
        pass
    with pytest.raises(UnusableBackbone, match="'tpu'"), process_group(launch, "tpu"):
        pass
    if not torch.cuda.is_available():
        with pytest.raises(UnusableBackbone, match="'cuda'"), process_group(launch, "cuda"):
            pass
