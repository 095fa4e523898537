"""What every benchmark prints and writes: a table, its figures and their conditions."""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

import torch

_PACKAGES = ("torch", "transformers", "tokenizers", "peft", "fastapi", "uvicorn", "pydantic")


class BenchmarkFailed(Exception):
    """There are no figures: something is missing, or what was measured did not work correctly."""


@dataclass(frozen=True, slots=True)
class Report:
    """One benchmark's table, and what is written to its JSON file.

    conditions: what was run, by name. figures: every number of the table, and more. problem: why
    the command fails although it has something to show; empty if it does not.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    figures: Any
    conditions: Mapping[str, Any] = field(default_factory=dict)
    problem: str = ""


def machine() -> dict[str, Any]:
    """The machine of the figures."""
    # Some builds of torch do not have it.
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return {
        "cpu": capabilities.get("cpu_name") or _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "avx512_bf16": bool(capabilities.get("avx512_bf16")),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cuda": torch.version.cuda,
    }


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that are installed."""
    installed = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            installed[name] = version(name)
        except PackageNotFoundError:
            continue
    return installed


def commit() -> str | None:
    """The commit of the code that runs, with "changed" if files differ from it.

    A copy of the tree without git takes it from the variable BENCH_COMMIT; without that it is None.
    """
    git = ["git", "-C", str(Path(__file__).resolve().parent)]
    try:
        head = _output([*git, "rev-parse", "--short=12", "HEAD"])
        changes = _output([*git, "status", "--porcelain", "--untracked-files=no"])
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("BENCH_COMMIT") or None
    return f"{head}, changed" if changes else head


def show(report: Report) -> None:
    """Print the table, and below it the conditions, the machine and the versions."""
    sys.stdout.write(f"\n{report.title}\n{_table(report.columns, report.rows)}\n")
    for name, value in report.conditions.items():
        sys.stdout.write(f"  {name}: {value}\n")
    for part in (machine(), versions()):
        sys.stdout.write("  " + ", ".join(f"{name} {value}" for name, value in part.items()) + "\n")
    sys.stdout.flush()


def write(path: Path, report: Report, command: Sequence[str]) -> None:
    """Write the report as one JSON object. command: the benchmark and its arguments."""
    content = {
        "title": report.title,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": ["python", "-m", "benchmarks", *command],
        "commit": commit(),
        "machine": machine(),
        "versions": versions(),
        "conditions": dict(report.conditions),
        "figures": report.figures,
        "table": {"columns": list(report.columns), "rows": [list(row) for row in report.rows]},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n")


def progress(line: str) -> None:
    """Print a line on stderr, so that a benchmark of minutes is seen to move."""
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and range; the range shows how noisy the machine was."""
    return {"median": median(values), "least": min(values), "most": max(values)}


def rate_cells(rate: Mapping[str, float]) -> tuple[str, str]:
    """Two cells of a table, the median and the range of a `spread`."""
    return f"{rate['median']:,.0f}", f"{rate['least']:,.0f}..{rate['most']:,.0f}"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    aligned = []
    for line in lines:
        cells = [line[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
        aligned.append("  ".join(cells))
    return "\n".join([aligned[0], "-" * len(aligned[0]), *aligned[1:]])


def _output(command: Sequence[str]) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())
