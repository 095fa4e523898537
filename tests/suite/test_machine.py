"""Tests that are marked `alone` have the machine for themselves."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Each test writes when it began and ended.
TESTS = """
import time
from pathlib import Path
import pytest

LOG = Path({log!r})

def note(name, seconds):
    began = time.monotonic()
    time.sleep(seconds)
    with LOG.open("a") as file:
        file.write(f"{{name}} {{began}} {{time.monotonic()}}\\n")

{marker}
@pytest.mark.parametrize("number", range(8))
def test_{name}(number):
    note("{name}", 0.1)
"""


@pytest.mark.slow
def test_nothing_runs_beside_a_test_that_measures_and_the_others_run_side_by_side(
    tmp_path: Path,
) -> None:
    log = tmp_path / "log"
    for name in ("one", "two", "alone"):
        marker = "@pytest.mark.alone" if name == "alone" else ""
        source = TESTS.format(log=str(log), marker=marker, name=name)
        (tmp_path / f"test_{name}.py").write_text(source)
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")
    } | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-n", "3", "--dist", "loadfile"),
            *("-p", "tests.support.machine", "-c", str(ROOT / "pyproject.toml")),
            *("--rootdir", str(tmp_path), str(tmp_path)),
        ],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert re.search(r"24 passed", done.stdout), done.stdout + done.stderr
    runs = [line.split() for line in log.read_text().splitlines()]
    spans = [(name, float(began), float(ended)) for name, began, ended in runs]
    beside = {
        (name, other)
        for name, began, ended in spans
        for other, other_began, other_ended in spans
        if name != other and began < other_ended and other_began < ended
    }
    assert beside == {("one", "two"), ("two", "one")}
