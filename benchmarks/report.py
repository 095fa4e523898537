"""What every benchmark prints and writes: figures, with the conditions that they need."""

import json
import os
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

_PACKAGES = ("torch", "transformers", "tokenizers", "fastapi", "uvicorn", "pydantic")


def conditions() -> dict[str, Any]:
    """The machine and the versions."""
    capabilities = torch.cpu.get_capabilities()
    return {
        "cpu": capabilities.get("cpu_name") or platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "avx512_bf16": bool(capabilities.get("avx512_bf16")),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in _PACKAGES},
    }


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A small table on stdout."""
    table = Table(title=title, title_justify="left", title_style="")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right")
    for row in rows:
        table.add_row(*row)
    console = Console()
    # A log file is no reason to squeeze figures into 80 columns.
    console.print(table, width=None if console.is_terminal else 120)


def write(path: Path | None, figures: Mapping[str, Any]) -> None:
    """Figures and conditions as one JSON object, where a path is given."""
    if path is not None:
        content = {"conditions": conditions()} | dict(figures)
        path.write_text(json.dumps(content, indent=2) + "\n")


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, and the range that shows how noisy the machine was."""
    return {"median": median(values), "least": min(values), "most": max(values)}
