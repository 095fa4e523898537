"""`python -m train fit | evaluate | push`: flags in, files and a closing table out.

Whatever the person at the terminal can put right ends in one line on stderr, `error: ...`, and code
2; Ctrl-C in code 130. torch is imported only once flags and files have been found usable.
"""

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console

from adapters.errors import AdapterError
from train.data import LABEL_COLUMN, TEXT_COLUMN, Dataset, is_hub_name, read_examples
from train.errors import OutputError, TrainingError, UsageError
from train.formats import READERS
from train.progress import BarProgress, LineProgress, SilentProgress, progress_for
from train.report import print_evaluation, print_fit
from train.settings import ComputeType, Entry, FitSettings, entries

PROGRAM = "python -m train"
API_KEY_VARIABLE = "IDSPAM_API_KEY"

FAILED, INTERRUPTED = 2, 130

_DATA = f"a file ({', '.join(READERS)}) or a hub data set, hub:name[:config][@split]"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the process's exit code."""
    given = list(sys.argv[1:] if argv is None else argv)
    try:
        arguments = _parser().parse_args(given)
        arguments.run(arguments, given)
    except KeyboardInterrupt:
        return INTERRUPTED
    except (TrainingError, AdapterError, OSError, MemoryError) as error:
        _complain(str(error) or type(error).__name__)
        return FAILED
    return 0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog=PROGRAM, description="Make, measure and publish ID-SPAM adapters.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_fit(commands.add_parser("fit", help="train an adapter", allow_abbrev=False))
    _add_evaluate(commands.add_parser("evaluate", help="measure an adapter", allow_abbrev=False))
    _add_push(commands.add_parser("push", help="publish on a running service", allow_abbrev=False))
    return parser


def _add_fit(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_fit)
    files = parser.add_argument_group("files")
    files.add_argument("--train", required=True, metavar="F", help=_DATA)
    files.add_argument("--validation", metavar="F", help="the same; default: held out of --train")
    files.add_argument("--test", metavar="F", help="the same; measured once, at the end")
    files.add_argument(
        "--output", required=True, type=Path, metavar="X.safetensors", help="the adapter"
    )
    _add_report(files)
    _add_columns(parser)
    settings = parser.add_argument_group("settings")
    for entry in entries():
        _add_setting(settings, entry)
    _add_showing(parser)


def _add_evaluate(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_evaluate)
    parser.add_argument("--adapter", required=True, type=Path, metavar="X.safetensors")
    parser.add_argument("--data", required=True, metavar="F", help=_DATA)
    _add_report(parser)
    _add_columns(parser)
    for entry in entries():
        if entry.name in ("device", "dtype"):
            _add_setting(parser, entry)
    parser.add_argument(
        "--backbone", metavar="S", help="default: the name that the adapter was trained with"
    )
    _add_showing(parser)


def _add_push(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_push)
    parser.add_argument("--adapter", required=True, type=Path, metavar="X.safetensors")
    parser.add_argument("--name", required=True, help="the name to serve it under")
    parser.add_argument("--url", required=True, help="of the service: http://host:8000")
    parser.add_argument("--api-key", metavar="KEY", help=f"default: ${API_KEY_VARIABLE}")
    parser.add_argument(
        "--if-match", metavar="REVISION", help="publish only if this revision is served now"
    )


def _add_report(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("--report", type=Path, metavar="R.json", help="all figures as JSON")


def _add_columns(parser: argparse.ArgumentParser) -> None:
    columns = parser.add_argument_group("columns")
    columns.add_argument("--text-column", default=TEXT_COLUMN, metavar="C", help="%(default)s")
    columns.add_argument(
        "--text-pair-column", metavar="C", help="the second text; default: text_pair if it is there"
    )
    columns.add_argument("--label-column", default=LABEL_COLUMN, metavar="C", help="%(default)s")


def _add_showing(parser: argparse.ArgumentParser) -> None:
    showing = parser.add_mutually_exclusive_group()
    showing.add_argument("--no-progress", action="store_true", help="lines instead of a bar")
    showing.add_argument("--quiet", action="store_true", help="the closing table only")


def _add_setting(parser: argparse._ActionsContainer, entry: Entry) -> None:
    default = entry.setting.otherwise if entry.default is None else str(entry.default)
    help = f"{entry.setting.help} (default: {default})".replace("%", "%%")
    if entry.kind is bool:
        parser.add_argument(
            entry.flag,
            dest=entry.name,
            default=entry.default,
            action=argparse.BooleanOptionalAction,
            help=help,
        )
        return
    choices = [str(member) for member in getattr(entry.kind, "__members__", {}).values()]
    parser.add_argument(
        entry.flag,
        dest=entry.name,
        default=entry.default,
        type=str if choices else entry.kind,
        choices=choices or None,
        metavar=None if choices else {int: "N", float: "X"}.get(entry.kind, "S"),
        help=help,
    )


def _fit(arguments: argparse.Namespace, given: Sequence[str]) -> None:
    settings = FitSettings(
        **{entry.name: _value(entry, arguments) for entry in entries()},
        command=f"{PROGRAM} {shlex.join(given)}",
    )
    _check_output(arguments.output, "--output", ".safetensors")
    _check_output(arguments.report, "--report", ".json")
    with _progress(arguments) as progress:
        sets = {
            split: _read(source, split, arguments, progress)
            for split in ("train", "validation", "test")
            if (source := getattr(arguments, split)) is not None
        }
        from adapters.durable import write_atomically
        from train.state import state_path
        from train.trainer import fit

        try:
            report = fit(
                sets["train"],
                sets.get("validation"),
                sets.get("test"),
                settings,
                arguments.output,
                progress,
            )
        except KeyboardInterrupt:
            if state_path(arguments.output).exists():
                command = shlex.join([*given, *([] if settings.resume else ["--resume"])])
                progress.note(f"interrupted; to go on: {PROGRAM} {command}")
            raise
    if arguments.report is not None:
        write_atomically(arguments.report, report.to_json().encode())
    print_fit(report, _stdout())


def _evaluate(arguments: argparse.Namespace, _: Sequence[str]) -> None:
    _check_output(arguments.report, "--report", ".json")
    with _progress(arguments) as progress:
        data = _read(arguments.data, "test", arguments, progress)
        from adapters.durable import write_atomically
        from train.evaluation import evaluate

        report = evaluate(
            arguments.adapter,
            data,
            backbone=arguments.backbone,
            device=arguments.device,
            dtype=ComputeType(arguments.dtype),
            progress=progress,
        )
    if arguments.report is not None:
        write_atomically(arguments.report, report.to_json().encode())
    print_evaluation(report, _stdout())


def _push(arguments: argparse.Namespace, _: Sequence[str]) -> None:
    from train.push import push

    pushed = push(
        arguments.adapter,
        arguments.name,
        arguments.url,
        api_key=arguments.api_key or os.environ.get(API_KEY_VARIABLE) or None,
        if_match=arguments.if_match,
        note=lambda message: LineProgress(sys.stderr).note(message),
    )
    sys.stdout.write(f"{pushed.name} {pushed.revision} {pushed.outcome}\n")


def _value(entry: Entry, arguments: argparse.Namespace) -> Any:
    value = getattr(arguments, entry.name)
    return None if value is None else entry.kind(value)


def _read(
    source: str,
    split: str,
    arguments: argparse.Namespace,
    progress: BarProgress | LineProgress | SilentProgress,
) -> Dataset:
    if is_hub_name(source):
        progress.note(f"{source}: asking the hub")
    dataset = read_examples(
        source,
        text_column=arguments.text_column,
        text_pair_column=arguments.text_pair_column,
        label_column=arguments.label_column,
        split=split,
    )
    progress.note(f"{source}: {len(dataset):,} rows, {len(dataset.labels):,} labels")
    return dataset


def _check_output(path: Path | None, flag: str, suffix: str) -> None:
    """Find out before the training what would be found out after it."""
    if path is None:
        return
    if path.suffix != suffix:
        raise OutputError(f"{flag} {path}: must end in {suffix}")
    if path.is_dir():
        raise OutputError(f"{flag} {path}: is a folder")
    if not path.parent.is_dir():
        raise OutputError(f"{flag} {path}: there is no folder {path.parent}")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise OutputError(f"{flag} {path}: the folder {path.parent} cannot be written to")


def _progress(arguments: argparse.Namespace) -> BarProgress | LineProgress | SilentProgress:
    if arguments.quiet:
        return SilentProgress()
    return LineProgress(sys.stderr) if arguments.no_progress else progress_for(sys.stderr)


def _stdout() -> Console:
    return Console(file=sys.stdout)


def _complain(message: str) -> None:
    """One line, whatever an error's text holds; control characters stay out of the terminal."""
    line = " ".join(message.split())
    printable = "".join(character if character.isprintable() else "?" for character in line)
    sys.stderr.write(f"error: {printable}\n")
