"""`python -m benchmarks peers | adapters | training`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.load import LoadFailed
from benchmarks.peers import adapters, peers
from benchmarks.servers import ServerFailed
from benchmarks.training import training


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one benchmark; 2 and one line where it cannot be run."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, summary in (
        ("peers", "this service beside Infinity, CPU"),
        ("adapters", "throughput over the number of adapters"),
        ("training", "an epoch with and without kept lower layers"),
    ):
        command = commands.add_parser(name, help=summary, description=summary)
        command.add_argument("--json", type=Path, help="write figures and conditions here")
        command.add_argument("--rounds", type=int, default=3)
    for name in ("peers", "adapters"):
        commands.choices[name].add_argument("--seconds", type=float, default=10, help="of every load")
    commands.choices["peers"].add_argument(
        "--infinity-python", type=Path, required=True, help="of an environment with infinity-emb[server,torch]"
    )
    commands.choices["adapters"].add_argument("--counts", type=int, nargs="+", default=[1, 16, 64])
    commands.choices["training"].add_argument("--device", default="auto")
    chosen = vars(parser.parse_args(arguments))
    try:
        {"peers": peers, "adapters": adapters, "training": training}[chosen.pop("command")](**chosen)
    except (LoadFailed, ServerFailed) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
