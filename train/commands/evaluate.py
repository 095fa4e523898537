"""`python -m train evaluate`: measure an adapter file on labelled texts."""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from cli.shell import Command
from train.commands.flags import (
    DATA,
    add_columns,
    add_progress,
    add_report,
    add_settings,
    check_output,
    naming_the_local_way,
    progress_of,
    read,
    settings_of,
    stdout,
)
from train.report.report import print_evaluation


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--adapter", required=True, type=Path, metavar="X.safetensors")
    parser.add_argument("--data", required=True, metavar="F", help=DATA)
    add_report(parser)
    add_columns(parser)
    add_settings(parser, ("device", "dtype"))
    parser.add_argument(
        "--backbone", metavar="S", help="default: the name that the adapter was trained with"
    )
    add_progress(parser)


def run(arguments: Namespace) -> int:
    check_output(arguments.report, "--report", ".json")
    settings = settings_of(arguments)
    with progress_of(arguments) as progress:
        data = read(arguments.data, "test", arguments, progress)
        from adapters.format.durable import write_atomically
        from train.report.evaluation import evaluate

        with naming_the_local_way(settings.backbone):
            report = evaluate(
                arguments.adapter,
                data,
                backbone=settings.backbone,
                device=settings.device,
                dtype=settings.dtype,
                progress=progress,
            )
    if arguments.report is not None:
        write_atomically(arguments.report, report.to_json().encode())
    print_evaluation(report, stdout())
    return 0


COMMAND = Command("measure an adapter", run, add_arguments)
