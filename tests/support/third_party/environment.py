"""Runs programs in the environment of other projects' clients, which `make clients` makes."""

import json
import subprocess
from pathlib import Path
from typing import Any

from tests.support.unavailable import unavailable

HERE = Path(__file__).resolve().parent
ENVIRONMENT = HERE.parents[2] / "runs" / "clients"


def python(*arguments: str) -> str:
    """What a Python program prints there; without the environment the test is skipped."""
    __tracebackhide__ = True
    if not (ENVIRONMENT / "ready").exists():
        unavailable("the environment of other projects' clients is missing: make clients")
    # Isolated (-I): this tree has packages with generic names.
    command = [str(ENVIRONMENT / "bin" / "python"), "-I", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=90, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def run_client(script: str, *arguments: str) -> dict[str, Any]:
    """The JSON object that a script of this folder prints."""
    __tracebackhide__ = True
    answers: dict[str, Any] = json.loads(python(str(HERE / script), *arguments))
    return answers
