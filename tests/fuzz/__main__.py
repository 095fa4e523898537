"""Fuzz one reader: `python -m tests.fuzz adapter_file --runs 1000000`. Needs atheris.

New inputs that reach new code are kept in `runs/fuzz/NAME`; a finding is written beside them as
`crash-...`. `--merge` copies the smallest set of them that covers the same code to the corpus.
"""

import argparse
import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["adapters", "service", "json"]):
    from tests.fuzz.harnesses import HARNESSES

CORPUS = Path(__file__).parent / "corpus"


def main() -> None:
    """Run libFuzzer, which ends the process."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("name", choices=HARNESSES)
    parser.add_argument("--runs", type=int, default=1_000_000)
    parser.add_argument("--merge", action="store_true")
    # To merge, libFuzzer starts this again in a shell, with more flags.
    args, inner = parser.parse_known_args()

    found = Path("runs/fuzz") / args.name
    found.mkdir(parents=True, exist_ok=True)
    own = CORPUS / args.name
    words = CORPUS.parent / "words.dict"
    flags = [
        f"-artifact_prefix={found}/",
        f"-dict={words}",
        "-max_len=4096",
        "-timeout=10",
        "-rss_limit_mb=4096",
        "-print_final_stats=1",
    ]
    if inner:
        flags += inner
    elif args.merge:
        flags += ["-merge=1", str(own), str(found)]
    else:
        flags += [f"-runs={args.runs}", str(found), str(own)]

    def test_one_input(data: bytes) -> None:
        HARNESSES[args.name](data)

    command = f"{sys.executable} -m tests.fuzz {args.name}"
    atheris.Setup([command, *flags], test_one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
