"""The short run of every fault, and of the soak: real services, real faults."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from chaos.faults import FAULTS
from chaos.soak import Line
from tests.support.service_process import TREE
from tests.support.tiny_models import save_backbone


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_backbone(tmp_path_factory.mktemp("backbone"))


def run(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.run(command, cwd=TREE, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("workers", [0, 2])
def test_no_fault_makes_an_answer_wrong_or_loses_one(
    folder: Path, tmp_path: Path, workers: int
) -> None:
    output = tmp_path / "rows.json"
    arguments = ["--quick", "--workers", str(workers), "--output", str(output)]
    ended = run("chaos", "--backbone", str(folder), *arguments)
    assert ended.returncode == 0, ended.stderr
    rows = {row["fault"]: row for row in json.loads(output.read_text())}
    expected = {
        fault.name
        for fault in FAULTS
        if workers in fault.quick and workers in fault.workers and fault.devices == 1
    }
    assert expected <= set(rows)
    for row in rows.values():
        assert row["skipped"] or row["times"] > 0
        assert row["skipped"] or row["counts"]["right"] > 0
        assert not {"wrong", "lost"} & set(row["counts"])


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_short_soak_prints_its_table_and_draws_its_plot(folder: Path, tmp_path: Path) -> None:
    plot = tmp_path / "soak.svg"
    sizes = ["--seconds", "4", "--uploads", "10", "--predictions", "320", "--workers", "0"]
    ended = run("chaos.soak", "--backbone", str(folder), *sizes, "--plot", str(plot))
    assert " 0 faults." in ended.stdout, ended.stdout + ended.stderr
    assert "| memory of service |" in ended.stdout
    assert "| latency p50 |" in ended.stdout
    assert plot.read_text().lstrip().startswith("<?xml")


def test_a_line_that_grows_is_not_flat() -> None:
    steady = Line("a", "threads", [(float(t), 20 + t % 2) for t in range(100)])
    growing = Line("b", "threads", [(float(t), 20 + t / 10) for t in range(100)])
    # What happens while caches fill does not count.
    filling = Line("c", "threads", [(float(t), min(20.0, float(t))) for t in range(100)])
    assert steady.flat
    assert filling.flat
    assert not growing.flat
    assert growing.growth() == pytest.approx(7.4, abs=0.2)
