"""`python -m train evaluate`: measure an adapter file on labelled texts."""

import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path

from cli.imports import importing
from cli.shell import Command
from train.commands.flags import (
    add_adapter_and_data,
    add_columns,
    add_own_backbone,
    add_progress,
    add_report,
    add_settings,
    check_output,
    computation_of,
    naming_the_local_way,
    progress_of,
    read,
    stdout,
)
from train.errors import OutputError
from train.report.report import print_evaluation, print_line

ROW_FORMATS = (".csv", ".jsonl")


def add_arguments(parser: ArgumentParser) -> None:
    add_adapter_and_data(parser)
    add_report(parser)
    parser.add_argument("--json", action="store_true", help="print all figures as JSON")
    parser.add_argument(
        "--rows",
        type=Path,
        metavar="F",
        help="a row for every text: label, answer, scores; .csv, or .jsonl with all scores",
    )
    add_columns(parser)
    add_settings(parser, ("device", "dtype"))
    add_own_backbone(parser)
    add_progress(parser)


def run(arguments: Namespace) -> int:
    check_output(arguments.report, "--report", ".json")
    _check_rows_file(arguments.rows, arguments.data)
    computation = computation_of(arguments)
    with progress_of(arguments) as progress:
        data = read(arguments.data, "test", arguments, progress)
        with importing():
            from adapters.format.durable import write_atomically
            from train.report.answer_rows import write_rows
            from train.report.evaluation import evaluate

        with naming_the_local_way(computation.backbone):
            evaluation = evaluate(
                arguments.adapter,
                data,
                backbone=computation.backbone,
                device=computation.device,
                dtype=computation.dtype,
                progress=progress,
            )
    if arguments.report is not None:
        write_atomically(arguments.report, evaluation.report.to_json().encode())
    if arguments.rows is not None:
        write_rows(arguments.rows, evaluation)
    if arguments.json:
        sys.stdout.write(evaluation.report.to_json())
        return 0
    print_evaluation(evaluation.report, stdout())
    if arguments.rows is not None:
        print_line(stdout(), f"written: {arguments.rows}")
    return 0


def _check_rows_file(path: Path | None, data: str) -> None:
    """
    Raises:
        OutputError: it could not be written, is neither CSV nor JSONL, or is the data itself.
    """
    if path is None:
        return
    if path.suffix not in ROW_FORMATS:
        raise OutputError(f"--rows {path}: must end in {' or '.join(ROW_FORMATS)}")
    check_output(path, "--rows", path.suffix)
    if path.exists() and Path(data).exists() and path.samefile(data):
        raise OutputError(f"--rows {path}: this is the file that is read")


COMMAND = Command("measure an adapter on labelled texts", run, add_arguments)
