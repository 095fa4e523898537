"""`python -m service drift NAME`: how far an adapter's texts are from those of its training."""

import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Literal

import msgspec

from cli.shell import Command, CommandFailed
from service.client import Drift, DriftQuantity
from service.commands.flags import add_service, client_of

# Bins that are shown of a quantity that has moved, unless all are asked for.
_SHOWN = 5
_SHORT = 12
# Of a bin's name: a line fits 40 columns.
_WIDTH = 20
_FORMATS = (".csv", ".jsonl")


def add_arguments(parser: ArgumentParser) -> None:
    parser.description = (
        "How far the last texts of an adapter are from those of its training: the population "
        "stability index of labels, confidence, length and unknown tokens. docs/drift.md explains "
        "it."
    )
    add_service(parser)
    parser.add_argument("name")
    parser.add_argument(
        "--revision", metavar="R", help="one that is tried, by its first characters"
    )
    parser.add_argument("--all", action="store_true", help="every bin, of every quantity")
    parser.add_argument("--json", action="store_true", help="print the service's answer")
    texts = parser.add_mutually_exclusive_group()
    texts.add_argument(
        "--uncertain",
        type=Path,
        metavar="F",
        help="write the texts of which it is least certain, to be labelled: .csv or .jsonl",
    )
    texts.add_argument("--forget", action="store_true", help="have the service forget these texts")


def run(arguments: Namespace) -> int:
    path: Path | None = arguments.uncertain
    if path is not None:
        _check(path)
    with client_of(arguments) as client:
        if path is not None:
            format: Literal["jsonl", "csv"] = "csv" if path.suffix == ".csv" else "jsonl"
            _save(path, client.uncertain_file(arguments.name, format))
        elif arguments.forget:
            client.forget_uncertain(arguments.name)
            _print(f"{arguments.name}: the texts are forgotten")
        else:
            drift = client.drift(arguments.name, arguments.revision)
            if arguments.json:
                _print(msgspec.json.encode(drift).decode())
            else:
                for line in described(drift, every=arguments.all):
                    _print(line)
    return 0


COMMAND = Command("how far an adapter's texts are from its training", run, add_arguments)


def described(drift: Drift, *, every: bool) -> list[str]:
    """The lines for people. every: show all bins of all quantities."""
    lines = [f"{drift.adapter} {drift.revision[:_SHORT]}"]
    since = "" if drift.since is None else f" since {_minute(drift.since)}"
    lines.append(f"{drift.texts:,} texts{since}")
    if drift.counting_since is not None:
        lines.append(f"the engine began {_minute(drift.counting_since)}")
    if drift.reference_texts:
        lines.append(f"compared with {drift.reference_texts:,} of its training")
    if drift.note is not None:
        lines.append(drift.note)
    if drift.quantities:
        lines += ["", f"{'quantity':<12}{'index':>7}{'chance':>8}  level"]
    for quantity in drift.quantities:
        lines.append(
            f"{quantity.quantity:<12}{quantity.psi:>7.3f}{quantity.chance:>8.3f}  {quantity.level}"
        )
    for quantity in drift.quantities:
        if every or quantity.level != "stable":
            lines += ["", *_moved(quantity, every=every)]
    return lines


def _minute(time: str) -> str:
    """A time of the service for people: it is in UTC."""
    return f"{time[:16].replace('T', ' ')} UTC"


def _moved(quantity: DriftQuantity, *, every: bool) -> list[str]:
    """The bins of a quantity, in their order; of many those that have changed most."""
    bins = list(quantity.bins)
    if not every and len(bins) > _SHOWN and quantity.quantity == "label":
        bins = sorted(bins, key=lambda each: -abs(each.seen - each.reference))[:_SHOWN]
    more = len(quantity.bins) - len(bins)
    width = min(_WIDTH, max(len(each.bin) for each in bins))
    lines = [f"{quantity.quantity:<{width}}  training     now"]
    for each in bins:
        name = each.bin if len(each.bin) <= width else each.bin[: width - 3] + "..."
        lines.append(f"{name:<{width}}  {each.reference:>7.1%} {each.seen:>7.1%}")
    if more:
        lines.append(f"and {more} more: --all")
    return lines


def _check(path: Path) -> None:
    """
    Raises:
        CommandFailed: it could not be written, or would replace a file.
    """
    if path.suffix not in _FORMATS:
        raise CommandFailed(f"--uncertain {path}: must end in {' or '.join(_FORMATS)}")
    if path.exists():
        raise CommandFailed(f"--uncertain {path}: exists, and may have labels by now")
    if not path.parent.is_dir():
        raise CommandFailed(f"--uncertain {path}: there is no folder {path.parent}")


def _save(path: Path, content: bytes) -> None:
    """
    Raises:
        CommandFailed: it cannot be written.
    """
    from adapters.format.durable import write_atomically

    try:
        write_atomically(path, content)
    except OSError as error:
        raise CommandFailed(f"{path}: cannot be written: {error.strerror or error}") from None
    _print(f"written: {path}")


def _print(line: str) -> None:
    sys.stdout.write(f"{line}\n")
