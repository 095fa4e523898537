"""README.md fits on three screens, and what it says to type exists."""

import re
import shlex
from pathlib import Path

from cli.shell import parser_of
from service.commands.main import parser
from train.cli import COMMANDS

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()


def test_it_fits_on_three_screens() -> None:
    assert len(README.splitlines()) <= 120
    assert len(README.split()) < 900


def test_it_shows_a_picture_and_says_when_to_use_it_before_it_starts() -> None:
    order = ["![", "## When to use it, and when not", "## Three figures", "## Start"]
    assert [README.index(part) for part in order] == sorted(README.index(part) for part in order)


def test_its_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"\bmake ([a-z-]+)", README)) - {"first"}
    assert {"serve", "test", "docs"} <= named <= targets


def test_its_commands_can_be_typed() -> None:
    parsers = {
        "service": parser(),
        "train": parser_of(COMMANDS, module="train", description=""),
    }
    typed = re.findall(r"^\.venv/bin/python -m (train|service) (.*)$", README, re.MULTILINE)
    assert len(typed) >= 2
    for program, arguments in typed:
        assert parsers[program].parse_args(shlex.split(arguments)).command


def test_the_file_that_it_trains_on_is_there() -> None:
    (path,) = re.findall(r"--train (\S+)", README)
    lines = (ROOT / path).read_text().splitlines()
    assert lines[0] == "text,label"
    assert f"{len(lines) - 1} reports" in README
