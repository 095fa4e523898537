"""Hints run as they are printed: with the interpreter that was typed, quoted for a shell."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from cli import hints
from cli.hints import as_typed, command_line, option, portable


def test_the_interpreter_is_the_one_that_was_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    typed = [".venv/bin/python", "-X", "dev", "-u", "-m", "train", "fit"]
    monkeypatch.setattr(sys, "orig_argv", typed)
    assert command_line("service", "serve") == ".venv/bin/python -X dev -u -m service serve"
    assert as_typed(portable("train", "fit")) == ".venv/bin/python -X dev -u -m train fit"
    assert as_typed("make it") == "make it"


@pytest.mark.parametrize("typed", [[], ["pytest", "tests"], ["-c"], ["/usr/bin/python", "x.py"]])
def test_without_a_typed_module_it_is_this_interpreter(
    typed: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "orig_argv", typed)
    monkeypatch.chdir(tmp_path)
    assert shlex.split(command_line("service"))[0] == sys.executable
    for place, shown in (("python", "./python"), (".venv/bin/python", ".venv/bin/python")):
        monkeypatch.setattr(sys, "executable", str(Path.cwd() / place))
        assert shlex.split(command_line("service"))[0] == shown


def test_words_survive_the_shell_and_the_parser() -> None:
    words = ["--adapter", "my file's.safetensors", *option("--name", "-x"), *option("--url", "a b")]
    assert shlex.split(command_line("train", "push", *words))[-6:] == [
        *("push", "--adapter", "my file's.safetensors", "--name=-x"),
        *("--url", "a b"),
    ]


def test_what_is_printed_can_be_typed(tmp_path: Path) -> None:
    """From a folder with a space in its name, by a relative path to the interpreter."""
    root = Path(hints.__file__).parents[1]
    folder = tmp_path / "my tree"
    folder.mkdir()
    for name in ("adapters", "cli", "service", "train"):
        (folder / name).symlink_to(root / name)
    (folder / "py thon").symlink_to(sys.executable)
    environment = {key: value for key, value in os.environ.items() if not key.startswith("ID")}

    def run(line: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            ["bash", "-c", line],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    site = next(path for path in sys.path if path.endswith("site-packages"))
    environment["PYTHONPATH"] = site
    missing = run("'./py thon' -m service predict --top-k x")
    assert missing.returncode == 2
    hint = missing.stderr.partition("(see ")[2].rstrip(")\n")
    assert hint == "'./py thon' -m service predict --help"
    shown = run(hint)
    assert shown.returncode == 0
    assert shown.stdout.startswith("usage: python -m service predict")
