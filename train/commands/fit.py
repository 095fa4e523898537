"""`python -m train fit`: train an adapter, write it with its model card, print its scores."""

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path

from cli.imports import importing
from cli.shell import Command
from train.commands.flags import (
    DATA,
    add_columns,
    add_overwrite,
    add_progress,
    add_report,
    add_settings,
    check_new,
    check_output,
    naming_the_local_way,
    progress_of,
    read,
    settings_of,
    stdout,
    typed,
)
from train.errors import ResumeError
from train.loop.launch import Launch
from train.report.card_file import card_path, is_card
from train.report.report import print_fit


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
        help="the adapter; its model card is written to X.md, what was found about the rows to "
        "X.repeats.csv and X.suspects.csv",
    )
    add_report(files)
    add_overwrite(files)
    add_columns(parser)
    add_settings(parser.add_argument_group("settings"))
    add_progress(parser)


def run(arguments: Namespace) -> int:
    settings = settings_of(arguments)
    output = arguments.output
    check_output(output, "--output", ".safetensors")
    check_output(arguments.report, "--report", ".json")
    card = card_path(output)
    # Another file in its place is refused later, whatever the flags say.
    ours = card if card.is_file() and is_card(card) else None
    check_new([output, ours, arguments.report], overwrite=arguments.overwrite)
    if not (settings.resume or arguments.overwrite):
        _check_no_state(output)
    with progress_of(arguments) as progress:
        sets = {
            split: read(source, split, arguments, progress)
            for split in ("train", "validation", "test")
            if (source := getattr(arguments, split)) is not None
        }
        with importing():
            from adapters.format.durable import write_atomically
            from train.fit.fit import fit
            from train.fit.search import search_path
            from train.loop.checkpoint import checkpoint_path

        states = (checkpoint_path(output), search_path(output))
        before = [_version(path) for path in states]
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
            after = [_version(path) for path in states]
            # Without --resume, a state that has not changed belongs to an earlier run.
            resumable = any(after) if settings.resume else after != before
            progress.note(
                _how_to_continue(arguments.argv, resume=resumable, resumed=settings.resume)
            )
            raise
    if not Launch.from_environment().is_main_process:
        return 0
    if arguments.report is not None:
        write_atomically(arguments.report, report.to_json().encode())
    print_fit(report, stdout())
    return 0


COMMAND = Command("train an adapter from labelled texts", run, add_arguments)


def _version(path: Path) -> tuple[int, int] | None:
    """Changes with every write; None if there is no file."""
    if not path.exists():
        return None
    status = path.stat()
    return status.st_ino, status.st_mtime_ns


def _check_no_state(output: Path) -> None:
    """
    Raises:
        ResumeError: an interrupted run has left its state, which a new run would replace.
    """
    # As `checkpoint_path` and `search_path`, whose modules import torch.
    for suffix in (".state", ".search"):
        state = output.with_name(output.name + suffix)
        if state.exists():
            raise ResumeError(
                f"{state} is what an interrupted run left: --resume goes on with that run, "
                "--overwrite begins anew"
            )


def _how_to_continue(argv: Sequence[str], *, resume: bool, resumed: bool) -> str:
    if Launch.from_environment().world_size > 1:
        again = "the same command with --resume goes on" if resume else "nothing is left of it"
        return f"interrupted; {again}"
    if not resume:
        return f"interrupted before the first step; to start again: {typed(*argv)}"
    return f"interrupted; to go on: {typed(*argv, *([] if resumed else ['--resume']))}"
