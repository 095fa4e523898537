"""Flags that several commands have: data, settings, progress; and the values they give."""

import logging
import sys
import tempfile
from argparse import SUPPRESS, BooleanOptionalAction, Namespace, _ActionsContainer
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from adapters.errors import UnusableBackbone
from cli.hints import command_line, portable
from train.config.settings import ComputeType, Entry, FitSettings, entries
from train.data.dataset import (
    LABEL_COLUMN,
    TEXT_COLUMN,
    TEXT_PAIR_COLUMN,
    Dataset,
    check_trainable,
    is_hub_name,
    read_examples,
)
from train.data.readers import READERS
from train.errors import DataError, OutputError
from train.loop.launch import Launch
from train.loop.progress import Progress
from train.report.progress import LineProgress, progress_for

MODULE = "train"
# From this size on, reading a file takes so long that it is announced.
_LARGE_BYTES = 16 * 2**20
DATA = f"a file ({', '.join(READERS)}) or a hub data set, hub:name[:config][@split]"


def add_report(parser: _ActionsContainer) -> None:
    """`--report`."""
    parser.add_argument("--report", type=Path, metavar="R.json", help="all figures as JSON")


def add_adapter_and_data(parser: _ActionsContainer) -> None:
    """`--adapter` and `--data`: an adapter's file, and rows that it is run on."""
    parser.add_argument("--adapter", required=True, type=Path, metavar="X.safetensors")
    parser.add_argument("--data", required=True, metavar="F", help=DATA)


def add_own_backbone(parser: _ActionsContainer) -> None:
    """`--backbone` of commands that run an adapter which knows its own."""
    parser.add_argument(
        "--backbone", metavar="S", help="default: the name that the adapter was trained with"
    )


def add_columns(parser: _ActionsContainer) -> None:
    """The names of the columns with texts and labels."""
    columns = parser.add_argument_group("columns")
    columns.add_argument("--text-column", default=TEXT_COLUMN, metavar="C", help="%(default)s")
    columns.add_argument(
        "--text-pair-column", metavar="C", help="the second text; default: text_pair if it is there"
    )
    columns.add_argument("--label-column", default=LABEL_COLUMN, metavar="C", help="%(default)s")
    add_label_separator(columns)


def add_label_separator(parser: _ActionsContainer) -> None:
    """`--label-separator`."""
    parser.add_argument(
        "--label-separator",
        metavar="S",
        help="the character between the labels of a text, for several labels in a column of CSV "
        "or TSV; lists in JSONL and Parquet need none",
    )


def add_progress(parser: _ActionsContainer) -> None:
    """`--no-progress` and `--quiet`."""
    amount = parser.add_mutually_exclusive_group()
    amount.add_argument("--no-progress", action="store_true", help="lines instead of a bar")
    amount.add_argument("--quiet", action="store_true", help="the closing table only")


def add_settings(parser: _ActionsContainer, names: Collection[str] | None = None) -> None:
    """Flags for the named settings of `FitSettings`, or for all of them."""
    for entry in entries():
        if names is None or entry.name in names:
            _add_setting(parser, entry)


def settings_of(arguments: Namespace) -> FitSettings:
    """The settings that the flags of `add_settings` give.

    Raises:
        SettingsError: values out of range.
    """
    values: dict[str, Any] = {
        entry.name: entry.kind(value)
        for entry in entries()
        if (value := getattr(arguments, entry.name, None)) is not None
    }
    return FitSettings(**values, command=portable(MODULE, *arguments.argv), given=tuple(values))


@dataclass(frozen=True, slots=True)
class Computation:
    """What an adapter that is not trained is run with. backbone: None is the adapter's own."""

    backbone: str | None
    device: str
    dtype: ComputeType | None


def computation_of(arguments: Namespace) -> Computation:
    """What the flags of `add_own_backbone`, `--device` and `--dtype` of `add_settings` give."""
    dtype = getattr(arguments, "dtype", None)
    return Computation(
        backbone=arguments.backbone,
        device=getattr(arguments, "device", FitSettings().device),
        dtype=None if dtype is None else ComputeType(dtype),
    )


def read(source: str, split: str, arguments: Namespace, progress: Progress) -> Dataset:
    """Read labelled texts from the columns of `add_columns`, and report how many there are.

    Raises:
        DataError: they cannot be read, or all of them are blank.
    """
    if is_hub_name(source):
        progress.note(f"{source}: asking the hub")
    elif (size := _size_of(source)) >= _LARGE_BYTES:
        progress.note(f"{source}: reading {size / 2**20:,.0f} MiB")
    dataset = read_examples(
        source,
        text_column=arguments.text_column,
        text_pair_column=arguments.text_pair_column,
        label_column=arguments.label_column,
        label_separator=arguments.label_separator,
        split=split,
    )
    if split == "train":
        check_trainable(dataset, label_separator=arguments.label_separator)
    rows = f"{source}: {len(dataset):,} rows"
    labels = f"{len(dataset.labels):,} labels"
    if dataset.multi_label:
        mean = sum(len(example.labels) for example in dataset.examples) / len(dataset)
        without = sum(not example.labels for example in dataset.examples)
        labels += f", {mean:.2f} a text, {without:,} texts without one"
    progress.note(f"{rows}, {labels}")
    blank = sum(
        _is_blank(example.text) and _is_blank(example.text_pair or "")
        for example in dataset.examples
    )
    columns = repr(arguments.text_column)
    if dataset.paired:
        columns += f" and {arguments.text_pair_column or TEXT_PAIR_COLUMN!r}"
    if blank == len(dataset):
        raise DataError(f"no row has any text in {columns}", source=source)
    if blank:
        progress.note(f"{rows}, {blank:,} of them without any text in {columns}")
    return dataset


def check_output(path: Path | None, flag: str, suffix: str) -> None:
    """Refuse an output file before the work, not after it.

    Raises:
        OutputError: the file could not be written.
    """
    if path is None:
        return
    if path.suffix != suffix:
        raise OutputError(f"{flag} {path}: must end in {suffix}")
    if path.is_dir():
        raise OutputError(f"{flag} {path}: is a folder")
    if not path.parent.is_dir():
        raise OutputError(f"{flag} {path}: there is no folder {path.parent}")
    try:
        # The longest name of a file that a run writes next to the output.
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.search.best."):
            pass
    except OSError as error:
        raise OutputError(
            f"{flag} {path}: the folder {path.parent} cannot be written to ({error.strerror})"
        ) from None


def check_new(paths: Sequence[Path | None], *, overwrite: bool) -> None:
    """Refuse to replace files.

    Raises:
        OutputError: they exist, and nobody has said that they may be replaced.
    """
    existing = [str(path) for path in paths if path is not None and path.exists()]
    if existing and not overwrite:
        several = len(existing) > 1
        end = "exist; --overwrite replaces them" if several else "exists; --overwrite replaces it"
        raise OutputError(f"{' and '.join(existing)} {end}")


def add_overwrite(parser: _ActionsContainer) -> None:
    """`--overwrite`."""
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace the output of an earlier run; begin anew where one was interrupted",
    )


def announce(text: str, arguments: Namespace) -> None:
    """A first line on stderr, before imports that take seconds."""
    if not getattr(arguments, "quiet", False) and Launch.from_environment().is_main_process:
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()


def typed(*words: str) -> str:
    """A command of this program as the user would type it."""
    return command_line(MODULE, *words)


@contextmanager
def naming_the_local_way(backbone: str | None) -> Iterator[None]:
    """If the hub does not provide the backbone, add to the error that a folder works as well."""
    # The hub's library logs every retry; the error says how they ended.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        yield
    except UnusableBackbone as error:
        if isinstance(error.__cause__, OSError) and not Path(backbone or "").is_dir():
            reason = str(error).rstrip(".")
            raise UnusableBackbone(
                f"{reason}; --backbone takes a folder with the model's files as well"
            ) from None
        raise


def progress_of(arguments: Namespace) -> Progress:
    """The display that `add_progress` asks for; with several processes, the first one shows it."""
    if arguments.quiet or not Launch.from_environment().is_main_process:
        return Progress()
    return LineProgress(sys.stderr) if arguments.no_progress else progress_for(sys.stderr)


def stdout() -> Console:
    """A console for results."""
    return Console(file=sys.stdout)


def _add_setting(parser: _ActionsContainer, entry: Entry) -> None:
    """A flag without a default: `settings_of` must know which flags were given."""
    default = entry.setting.otherwise if entry.default is None else str(entry.default)
    help = f"{entry.setting.help} (default: {default})".replace("%", "%%")
    if entry.kind is bool:
        parser.add_argument(
            entry.flag, dest=entry.name, default=SUPPRESS, action=BooleanOptionalAction, help=help
        )
        return
    choices = [str(member) for member in getattr(entry.kind, "__members__", {}).values()]
    parser.add_argument(
        entry.flag,
        dest=entry.name,
        default=SUPPRESS,
        type=str if choices else entry.kind,
        choices=choices or None,
        metavar=None if choices else {int: "N", float: "X"}.get(entry.kind, "S"),
        help=help,
    )


def _size_of(source: str) -> int:
    try:
        return Path(source).stat().st_size
    except OSError:
        return 0


def _is_blank(text: str) -> bool:
    """Whether a person would see nothing."""
    return not any(character.isprintable() and not character.isspace() for character in text)
