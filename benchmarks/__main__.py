"""`python -m benchmarks COMMAND ...`: each command is the module of its name."""

import argparse
import signal
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from types import FrameType
from typing import Any

from adapters.errors import AdapterError
from benchmarks.report import BenchmarkFailed, show, write
from service.errors import ServiceError

COMMANDS = {
    "engine": "texts/s over the number of adapters, beside padded transformers and PEFT LoRA",
    "latency": "round trip of small requests on an idle engine",
    "adapters": "thousands of stored adapters, few slots, Zipf traffic",
    "http": "the service over HTTP, on one machine with its clients",
    "peers": "the service beside Infinity and LitServe, CPU",
    "swap": "uploads of alternating adapters while clients predict",
    "training": "an epoch beside PEFT's prompt tuning and LoRA, and its memory",
    "shell": "`python -m service predict` on a file, beside the engine alone",
    "exactness": "what batching and bfloat16 change in the zoo's answers",
    "sets": "all commands of a machine, one after the other: `sets cpu`, `sets gpu`",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one benchmark; 2 and one line where it cannot be run."""
    listing = "\n".join(f"  {name:<10} {summary}" for name, summary in COMMANDS.items())
    top = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=f"Commands (each has --help):\n{listing}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("command", choices=list(COMMANDS), metavar="command")
    top.add_argument("arguments", nargs=argparse.REMAINDER, help="of the command")
    chosen = top.parse_args(arguments)
    options = parse(chosen.command, chosen.arguments)
    path = options.pop("json")
    try:
        report = _module(chosen.command).run(**options)
    except (BenchmarkFailed, AdapterError, ServiceError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    show(report)
    write(path, report)
    return 0


def parse(command: str, arguments: Sequence[str]) -> dict[str, Any]:
    """The options of a command, by name."""
    module = _module(command)
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks {command}", description=module.__doc__
    )
    parser.add_argument("--json", type=Path, help="write figures and conditions here")
    module.add_arguments(parser)
    return vars(parser.parse_args(arguments))


def _module(command: str) -> Any:
    """Imported only now: a machine needs nothing but what the command that runs there imports."""
    return import_module(f"benchmarks.{command}")


def _exit(number: int, _: FrameType | None) -> None:
    sys.exit(128 + number)


if __name__ == "__main__":
    # The servers that a benchmark started must end with it.
    signal.signal(signal.SIGTERM, _exit)
    sys.exit(main())
