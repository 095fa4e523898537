"""Fault points: inert by default, and each action does what the page of the module says."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from adapters import faults
from adapters.faults import act, fault_point

ROOT = Path(__file__).resolve().parents[2]
PASSES = """
from adapters.faults import fault_point
for number in range(3):
    print(number, fault_point("here"), fault_point("there"), flush=True)
"""


def passing(tmp_path: Path, lines: str | None) -> "subprocess.CompletedProcess[str]":
    """A process that passes two points three times, with a file of these lines."""
    file = tmp_path / "faults"
    if lines is not None:
        file.write_text(lines)
    return subprocess.run(
        [sys.executable, "-c", PASSES],
        cwd=ROOT,
        env=os.environ | {faults.VARIABLE: str(file)},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_points_do_nothing_in_a_process_without_the_variable() -> None:
    assert not faults.installed()
    assert not fault_point("anything")


def test_points_do_nothing_while_the_file_does_not_exist(tmp_path: Path) -> None:
    done = passing(tmp_path, None)
    assert done.returncode == 0
    assert done.stdout == "0 False False\n1 False False\n2 False False\n"


def test_a_line_with_a_count_acts_at_that_passing_alone(tmp_path: Path) -> None:
    done = passing(tmp_path, "there yes 2\nhere yes\n")
    assert done.stdout == "0 True False\n1 True True\n2 True False\n"


def test_a_kill_ends_the_process_as_kill_9_does(tmp_path: Path) -> None:
    done = passing(tmp_path, "there kill 3\n")
    assert done.returncode == -signal.SIGKILL
    assert done.stdout == "0 False False\n1 False False\n"


def test_an_error_number_is_raised_as_an_os_error() -> None:
    with pytest.raises(OSError, match="No space left"):
        act("ENOSPC")
    with pytest.raises(OSError, match="Read-only"):
        act("EROFS")


def test_a_test_can_install_a_function_of_its_own() -> None:
    passed: list[str] = []

    def handler(name: str) -> bool:
        passed.append(name)
        return name == "b"

    faults.install(handler)
    try:
        assert [fault_point(name) for name in "abc"] == [False, True, False]
    finally:
        faults.install(None)
    assert passed == ["a", "b", "c"]
    assert not fault_point("b")
