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
from cli.shell import exit_code
from service.errors import ServiceError

COMMANDS = {
    "engine": "texts/s over the number of adapters, beside padded transformers and PEFT LoRA",
    "kinds": "texts/s by the kind of adapter: prompts, vectors, LoRA, heads, all mixed",
    "types": "texts/s, latency and scores by the type that the backbone computes in",
    "sharing": "one text for several adapters, over as many different texts",
    "latency": "round trip of small requests on an idle engine",
    "adapters": "thousands of stored adapters, few slots, Zipf traffic",
    "http": "the service over HTTP, on one machine with its clients",
    "devices": "the service on one device and on several, with the same load",
    "access": "what checking a request's key costs, over the number of keys",
    "peers": "the service beside Infinity and LitServe, on a CPU",
    "vllm": "the service beside vLLM's LoRA adapters of a BERT classifier, on a CPU",
    "swap": "uploads of alternating adapters while clients predict",
    "replicas": "roll-outs on 1, 2, 4 replicas under load, on a folder and on S3; 1,000 simulated",
    "training": "an epoch beside PEFT's prompt tuning and LoRA, and its memory",
    "shell": "`python -m service predict` on a file, beside the engine alone",
    "explain": "deletion test: whether the words that explanations name matter to the answer",
    "exactness": "how batching and bfloat16 change the scores of the zoo",
    "tables": "writes the tables of a set's JSON files into docs/benchmarks.md",
    "sets": "all commands for a machine, one after the other: `sets cpu`, `sets gpu`",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one benchmark. One line on stderr if it cannot be run: 2; if something is missing: 1."""
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
    try:
        report = _module(chosen.command).run(options)
    except BrokenPipeError:
        # Of `| head`: not an error of the benchmark.
        raise
    except (BenchmarkFailed, AdapterError, ServiceError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    show(report)
    if options.json is not None:
        write(options.json, report, [chosen.command, *chosen.arguments])
    if report.problem:
        sys.stderr.write(f"error: {report.problem}\n")
        return 1
    return 0


def parse(command: str, arguments: Sequence[str]) -> argparse.Namespace:
    """The options of a command."""
    module = _module(command)
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks {command}", description=module.__doc__
    )
    parser.add_argument("--json", type=Path, help="write figures and conditions to this file")
    module.add_arguments(parser)
    return parser.parse_args(arguments)


def _module(command: str) -> Any:
    """Imported late: a machine needs only the packages of the command that it runs."""
    return import_module(f"benchmarks.{command}")


def _exit(number: int, _: FrameType | None) -> None:
    sys.exit(128 + number)


if __name__ == "__main__":
    # Ends the servers that a benchmark has started, too.
    signal.signal(signal.SIGTERM, _exit)
    sys.exit(exit_code(main, explain=lambda _: None, prefix="error"))
