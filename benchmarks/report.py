"""What every benchmark prints and writes: figures, with the conditions that they need."""

import json
import os
import platform
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
    """There are no figures: something is missing, or what ran did not do what it must."""


@dataclass(frozen=True, slots=True)
class Report:
    """One benchmark's table, and everything that is written beside it.

    conditions: what was run on what, by name. figures: every number of the table and more.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    figures: Any
    conditions: Mapping[str, Any] = field(default_factory=dict)


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    # Some builds of torch do not tell.
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
    """Python's and the packages', of those that are installed."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def show(report: Report) -> None:
    """A small table on stdout, and below it where and how it was measured."""
    sys.stdout.write(f"\n{report.title}\n{_table(report.columns, report.rows)}\n")
    for name, value in report.conditions.items():
        sys.stdout.write(f"  {name}: {value}\n")
    for part in (machine(), versions()):
        sys.stdout.write("  " + ", ".join(f"{name} {value}" for name, value in part.items()) + "\n")
    sys.stdout.flush()


def write(path: Path | None, report: Report) -> None:
    """The report as one JSON object, where a path is given."""
    if path is not None:
        content = {
            "title": report.title,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": sys.argv,
            "machine": machine(),
            "versions": versions(),
            "conditions": dict(report.conditions),
            "figures": report.figures,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=2) + "\n")


def progress(line: str) -> None:
    """One line on stderr: a benchmark of minutes must be seen to move."""
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, and the range that shows how noisy the machine was."""
    return {"median": median(values), "least": min(values), "most": max(values)}


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, *rows]
    widths = [max(len(line[index]) for line in lines) for index in range(len(columns))]
    shown = []
    for line in lines:
        cells = [line[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
        shown.append("  ".join(cells))
    return "\n".join([shown[0], "-" * len(shown[0]), *shown[1:]])


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())
