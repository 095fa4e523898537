"""A comparison that is killed, then interrupted, then left to finish."""

import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest

from tests.support.experiments import LONG, Watch, compare_long
from train.errors import OutputError

ROOT = Path(__file__).resolve().parents[2]
Result = TypeVar("Result")


SCRIPT = """
import sys
from pathlib import Path
from tests.support.experiments import compare_long

if __name__ == "__main__":
    compare_long(Path(sys.argv[1]), Path(sys.argv[2]))
"""


@pytest.mark.slow
def test_a_killed_comparison_continues_with_its_finished_cells(
    workspace: Path, tmp_path: Path
) -> None:
    script, output = tmp_path / "script.py", tmp_path / "output"
    script.write_text(SCRIPT)
    parent = subprocess.Popen(
        [sys.executable, str(script), str(workspace), str(output)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    try:
        finished = _wait_for(lambda: list((output / "cells").glob("*.json")), parent)
        with pytest.raises(OutputError, match=f"another process works here .id {parent.pid}."):
            compare_long(workspace, output)
        workers = _children(parent.pid)
    finally:
        parent.kill()
        parent.wait()
    assert workers
    _wait_for(lambda: not any(_is_running(pid) for pid in workers))
    (first,) = finished
    written = first.stat().st_mtime_ns

    def interrupt(stage: str) -> None:
        if stage.startswith("epoch 2/"):
            raise KeyboardInterrupt

    watch = Watch(progressed=interrupt)
    with pytest.raises(KeyboardInterrupt):
        compare_long(workspace, output, watch)
    assert watch.notes[-1].endswith("to go on: the command")
    (cell,) = watch.started_cells
    assert (output / "cells" / f"{cell.key}.state").exists(), "the running cell is saved"
    assert "1 are not run yet" in (output / "report.md").read_text()
    assert not multiprocessing.active_children()

    watch = Watch()
    findings = compare_long(workspace, output, watch)
    assert not findings.failed
    assert len(findings.outcomes) == 2
    assert watch.started_cells == [cell]
    epochs = [stage for stage in watch.stages if stage.startswith("epoch")]
    assert epochs[0] != f"epoch 1/{LONG}", "it continues where it was"
    report = findings.outcomes[cell.key].report
    assert report is not None
    assert len(report.epochs) == LONG
    assert first.stat().st_mtime_ns == written, "a finished cell is not computed again"


def _wait_for(
    condition: Callable[[], Result], process: subprocess.Popen[bytes] | None = None
) -> Result:
    """The first result of `condition` that is true."""
    end = time.monotonic() + 60
    while not (result := condition()):
        assert time.monotonic() < end, "timeout"
        assert process is None or process.poll() is None, "the process has ended"
        time.sleep(0.02)
    return result


def _children(pid: int) -> list[int]:
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(child) for child in text.split()]


def _is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"
