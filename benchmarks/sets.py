"""All commands for a machine, in a row: `sets cpu` on two cores, `sets gpu` on one H100.

Every step is a command with a time limit; if one fails, the others still run. Each prints its table
and writes FOLDER/<cpu or gpu>/<step>.json; the whole set writes set.json beside them, with what
each step took. A set that exceeds its minutes is stopped, and says which steps have no figures.
"""

import shlex
import subprocess
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping
from pathlib import Path
from time import perf_counter
from types import MappingProxyType

from benchmarks.arguments import time_of
from benchmarks.report import BenchmarkFailed, Report, progress

_BASE = "--backbone roberta-base --device cuda --dtype bfloat16"
_LARGE = "--backbone roberta-large --device cuda --dtype bfloat16"

# The command of each step, without its --json.
SETS: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        "cpu": {
            "engine": "engine --device cpu --adapters 1,64 --seconds 4 --rounds 2",
            "kinds": "kinds --device cpu --adapters 64 --seconds 4 --rounds 2",
            "sharing": "sharing --device cpu --tokens 39 --calls 15 --seconds 1.5",
            "latency": "latency --device cpu --calls 500 --sizes 1 8",
            "http": "http --device cpu --adapters 64 --seconds 5",
            "adapters": "adapters --device cpu --stored 1000 --slots 64 --per-request 8 --cold 50 "
            "--in-flight 3 --seconds 5 --rounds 2",
            "swap": "swap --device cpu --uploads 100 --quiet 8",
            "peers": "peers --seconds 5 --rounds 2",
            "training": "training --device cpu --rounds 2",
        },
        "gpu": {
            "engine-base": f"engine {_BASE} --adapters 1,64,256,1024 --seconds 1.5 --rounds 2",
            "sharing-base": f"sharing {_BASE} --calls 100 --seconds 0.7",
            "types-base": "types --backbone roberta-base --device cuda --seconds 1 --rounds 2",
            "http-base": f"http {_BASE} --workers 12 --adapters 256 --clients 3 --connections 64 "
            "--bulk-connections 64 --seconds 5",
            "adapters-base": f"adapters {_BASE} --stored 10000 --slots 512 --in-flight 3,6 "
            "--cold 60 --rounds 2 --seconds 4",
            "latency-base": f"latency {_BASE}",
            "kinds-base": f"kinds {_BASE} --adapters 256 --seconds 1 --rounds 2",
            "types-large": "types --backbone roberta-large --device cuda --seconds 1 --rounds 2",
            "engine-large": f"engine {_LARGE} --adapters 1,256,1024 --rivals 0 --seconds 1.5 "
            "--rounds 2",
            "latency-large": f"latency {_LARGE}",
            "swap-base": f"swap {_BASE} --workers 4 --uploads 500",
            "training-base": "training --backbone roberta-base --device cuda --rounds 2",
        },
    }
)
# A set that takes longer is stopped: it is for a machine that does nothing else.
SET_MINUTES: Mapping[str, float] = MappingProxyType({"cpu": 12.0, "gpu": 25.0})
# Limit of one step, so that a set ends even if something hangs.
STEP_SECONDS = 400.0
# The set's own file: what each step took.
OWN = "set"
_TOO_SLOW = f"stopped: it took longer than {STEP_SECONDS:g} s"
_OUT_OF_TIME = "stopped: the set's time was over"
_NOT_RUN = "not run: the set's time was over"


def add_arguments(parser: ArgumentParser) -> None:
    expected = ", ".join(f"{which} {minutes:g}" for which, minutes in SET_MINUTES.items())
    parser.add_argument("which", choices=list(SETS))
    parser.add_argument("--only", nargs="+", metavar="STEP", help="only these steps")
    parser.add_argument("--folder", type=Path, default=Path("runs/benchmarks"))
    parser.add_argument(
        "--minutes",
        type=time_of("minutes", most=600),
        help=f"stop the set after these; by default {expected}",
    )
    parser.add_argument(
        "--list", dest="listed", action="store_true", help="print the commands, run nothing"
    )


def run(options: Namespace) -> Report:
    """
    Raises:
        BenchmarkFailed: the set has no such step.
    """
    commands, folder = SETS[options.which], options.folder / options.which
    if unknown := set(options.only or ()) - set(commands):
        names = ", ".join(sorted(unknown))
        raise BenchmarkFailed(
            f"set {options.which} has no step {names}; it has {', '.join(commands)}"
        )
    minutes = options.minutes or SET_MINUTES[options.which]
    steps = {
        name: f"{command} --json {shlex.quote(str(folder / name))}.json"
        for name, command in commands.items()
        if options.only is None or name in options.only
    }
    title = f"set {options.which}: {len(steps)} steps, at most {minutes:g} minutes"
    columns = ("step", "took", "outcome")
    if options.listed:
        return Report(title, columns, [[name, "-", steps[name]] for name in steps], dict(steps))
    progress(title)
    if options.only is None:
        options.json = options.json or folder / f"{OWN}.json"
    outcomes = _outcomes(steps, folder, minutes)
    return Report(
        title,
        columns,
        [[name, f"{seconds:.0f} s", outcome] for name, (outcome, seconds) in outcomes.items()],
        {
            name: {"outcome": outcome, "seconds": seconds, "command": steps[name]}
            for name, (outcome, seconds) in outcomes.items()
        },
        problem=_problem({name: outcome for name, (outcome, _) in outcomes.items()}, minutes),
    )


def _outcomes(
    steps: Mapping[str, str], folder: Path, minutes: float
) -> dict[str, tuple[str, float]]:
    """How each step ended, and its seconds."""
    begun, outcomes = perf_counter(), {}
    for number, (name, command) in enumerate(steps.items(), start=1):
        # Whatever happens now, figures of an earlier run are not those of this one.
        (folder / f"{name}.json").unlink(missing_ok=True)
        gone = perf_counter() - begun
        left = minutes * 60 - gone
        if left <= 0:
            outcomes[name] = (_NOT_RUN, 0.0)
            continue
        progress(
            f"== {name} ({number} of {len(steps)}; {gone / 60:.1f} of {minutes:g} minutes gone): "
            f"{command}"
        )
        outcomes[name] = _step(command, min(STEP_SECONDS, left))
    return outcomes


def _step(command: str, limit: float) -> tuple[str, float]:
    begun = perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "benchmarks", *shlex.split(command)])
    try:
        code = process.wait(timeout=limit)
        outcome = "done" if code == 0 else f"failed ({code})"
    except subprocess.TimeoutExpired:
        outcome = _TOO_SLOW if limit == STEP_SECONDS else _OUT_OF_TIME
    finally:
        # On SIGTERM it ends its servers itself.
        process.terminate()
        try:
            process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
    return outcome, perf_counter() - begun


def _problem(outcomes: Mapping[str, str], minutes: float) -> str:
    """What is missing and how to get it; empty if nothing is."""
    missing = [name for name, outcome in outcomes.items() if outcome != "done"]
    if not missing:
        return ""
    if any(outcomes[name] in (_OUT_OF_TIME, _NOT_RUN) for name in missing):
        return (
            f"stopped after {minutes:g} minutes, without figures of {', '.join(missing)}: run the "
            "set on a machine that does nothing else, give it more --minutes, or run them alone: "
            f"--only {' '.join(missing)}"
        )
    return f"no figures of {', '.join(missing)}: what they wrote above says why"
