"""All commands for a machine, in a row: `sets cpu` on two cores, `sets gpu` on one H100.

Every step is a command with a time limit; if one fails, the others still run. Each prints its table
and writes FOLDER/<cpu or gpu>/<step>.json.
"""

import shlex
import subprocess
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping
from pathlib import Path
from time import perf_counter
from types import MappingProxyType

from benchmarks.report import Report, progress

_BASE = "--backbone roberta-base --device cuda --dtype bfloat16"
_LARGE = "--backbone roberta-large --device cuda --dtype bfloat16"

# The command of each step, without its --json.
SETS: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        "cpu": {
            "engine": "engine --device cpu --adapters 1,64 --seconds 4 --rounds 2",
            "kinds": "kinds --device cpu --adapters 64 --seconds 4 --rounds 2",
            "latency": "latency --device cpu --calls 500 --sizes 1 8",
            "http": "http --device cpu --adapters 64 --seconds 5",
            "adapters": "adapters --device cpu --stored 1000 --slots 64 --per-request 8 --cold 50 "
            "--seconds 5 --rounds 2",
            "swap": "swap --device cpu --uploads 100 --quiet 8",
            "peers": "peers --seconds 5 --rounds 2",
            "training": "training --device cpu --rounds 2",
        },
        "gpu": {
            "engine-base": f"engine {_BASE} --adapters 1,64,256,1024",
            "kinds-base": f"kinds {_BASE} --adapters 256",
            "latency-base": f"latency {_BASE}",
            "http-base": f"http {_BASE} --workers 12 --adapters 256 --clients 3 --connections 64 "
            "--bulk-connections 64",
            "adapters-base": f"adapters {_BASE} --stored 10000 --slots 512",
            "swap-base": f"swap {_BASE} --workers 4 --uploads 1000",
            "engine-large": f"engine {_LARGE} --adapters 1,64,256,1024",
            "latency-large": f"latency {_LARGE}",
            "training-base": "training --backbone roberta-base --device cuda",
        },
    }
)
# Limit of one step, so that a set ends even if something hangs.
STEP_SECONDS = 400.0


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("which", choices=list(SETS))
    parser.add_argument("--only", nargs="+", metavar="STEP", help="only these steps")
    parser.add_argument("--folder", type=Path, default=Path("runs/benchmarks"))
    parser.add_argument(
        "--list", dest="listed", action="store_true", help="print the commands, run nothing"
    )


def run(options: Namespace) -> Report:
    steps = {
        name: f"{command} --json {options.folder / options.which / name}.json"
        for name, command in SETS[options.which].items()
        if options.only is None or name in options.only
    }
    rows, figures = [], {}
    for name, command in steps.items():
        outcome, seconds = (command, 0.0) if options.listed else _step(name, command)
        rows.append([f"{name}:", f"{seconds:.0f} s", outcome])
        figures[name] = {"outcome": outcome, "seconds": seconds, "command": command}
    return Report(f"set {options.which}", ("step", "took", "outcome"), rows, figures)


def _step(name: str, command: str) -> tuple[str, float]:
    progress(f"== {name}: {command}")
    begun = perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "benchmarks", *shlex.split(command)])
    try:
        code = process.wait(timeout=STEP_SECONDS)
        outcome = "done" if code == 0 else f"failed ({code})"
    except subprocess.TimeoutExpired:
        outcome = "too slow"
    finally:
        # On SIGTERM it ends its servers itself.
        process.terminate()
        try:
            process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
    return outcome, perf_counter() - begun
