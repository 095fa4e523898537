"""`python -m train fit`: train an adapter, write it with its card, print what it reaches."""

import shlex
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path

from train.commands.flags import (
    DATA,
    PROGRAM,
    add_columns,
    add_report,
    add_settings,
    add_showing,
    check_output,
    naming_the_local_way,
    progress_of,
    read,
    settings_of,
    stdout,
)
from train.loop.launch import Launch
from train.report.report import print_fit

HELP = "train an adapter"


def add_arguments(parser: ArgumentParser) -> None:
    files = parser.add_argument_group("files")
    files.add_argument("--train", required=True, metavar="F", help=DATA)
    files.add_argument("--validation", metavar="F", help="the same; default: held out of --train")
    files.add_argument("--test", metavar="F", help="the same; measured once, at the end")
    files.add_argument(
        "--output",
        required=True,
        type=Path,
        metavar="X.safetensors",
        help="the adapter; its model card, X.md, is written beside it",
    )
    add_report(files)
    add_columns(parser)
    add_settings(parser.add_argument_group("settings"))
    add_showing(parser)


def run(arguments: Namespace, given: Sequence[str]) -> int:
    settings = settings_of(arguments, given)
    output = arguments.output
    check_output(output, "--output", ".safetensors")
    check_output(arguments.report, "--report", ".json")
    with progress_of(arguments) as progress:
        sets = {
            split: read(source, split, arguments, progress)
            for split in ("train", "validation", "test")
            if (source := getattr(arguments, split)) is not None
        }
        from adapters.format.durable import write_atomically
        from train.fit.fit import fit
        from train.fit.search import search_path
        from train.loop.checkpoint import state_path

        kept = (state_path(output), search_path(output))
        before = [_version(path) for path in kept]
        try:
            with naming_the_local_way(settings.backbone):
                report = fit(
                    sets["train"],
                    sets.get("validation"),
                    sets.get("test"),
                    settings,
                    output,
                    progress,
                )
        except KeyboardInterrupt:
            after = [_version(path) for path in kept]
            # What lay there before and was not asked for is another run's.
            goes_on = any(after) if settings.resume else after != before
            progress.note(_way_on(given, resume=goes_on, resumed=settings.resume))
            raise
    if not Launch.of_environment().leads:
        return 0
    if arguments.report is not None:
        write_atomically(arguments.report, report.to_json().encode())
    print_fit(report, stdout())
    return 0


def _version(path: Path) -> tuple[int, int] | None:
    """Another one after every write; None where there is no file."""
    if not path.exists():
        return None
    found = path.stat()
    return found.st_ino, found.st_mtime_ns


def _way_on(given: Sequence[str], *, resume: bool, resumed: bool) -> str:
    if not resume:
        return f"interrupted before the first step; to start again: {PROGRAM} {shlex.join(given)}"
    command = shlex.join([*given, *([] if resumed else ["--resume"])])
    return f"interrupted; to go on: {PROGRAM} {command}"
