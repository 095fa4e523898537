"""`python -m benchmarks peers | adapters | training | exactness | swap`."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.exactness import exactness
from benchmarks.load import LoadFailed
from benchmarks.peers import adapters, peers
from benchmarks.servers import ServerFailed
from benchmarks.swap import swap
from benchmarks.training import training

RUN: dict[str, Callable[..., None]] = {
    "peers": peers,
    "adapters": adapters,
    "training": training,
    "exactness": exactness,
    "swap": swap,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one benchmark; 2 and one line where it cannot be run."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, summary in (
        ("peers", "this service beside Infinity, CPU"),
        ("adapters", "throughput over the number of adapters"),
        ("training", "an epoch with and without kept lower layers"),
        ("swap", "uploads of alternating adapters while clients predict"),
        ("exactness", "what batching and bfloat16 change in the zoo's answers"),
    ):
        command = commands.add_parser(name, help=summary, description=summary)
        command.add_argument("--json", type=Path, help="write figures and conditions here")
    for name in ("peers", "adapters", "training"):
        commands.choices[name].add_argument("--rounds", type=int, default=3)
    for name in ("peers", "adapters"):
        commands.choices[name].add_argument(
            "--seconds", type=float, default=10, help="of every load"
        )
    for name in ("training", "exactness"):
        commands.choices[name].add_argument("--device", default="auto")
    commands.choices["peers"].add_argument(
        "--infinity-python",
        type=Path,
        required=True,
        help="of an environment with infinity-emb[server,torch]",
    )
    commands.choices["adapters"].add_argument("--counts", type=int, nargs="+", default=[1, 16, 64])
    commands.choices["exactness"].add_argument(
        "--data-root", type=Path, help="holds <task>/test.jsonl.gz"
    )
    commands.choices["exactness"].add_argument("--texts", type=int, default=1000, help="an adapter")
    commands.choices["swap"].add_argument("--uploads", type=int, default=200)
    commands.choices["swap"].add_argument("--clients", type=int, default=16)
    commands.choices["swap"].add_argument(
        "--dtype", choices=["float32", "bfloat16"], default="float32"
    )
    chosen = vars(parser.parse_args(arguments))
    try:
        RUN[chosen.pop("command")](**chosen)
    except (LoadFailed, ServerFailed) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
