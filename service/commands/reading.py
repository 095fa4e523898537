"""The inputs of a file or of standard input, each with the line at which it begins.

Plain text: every line is a text, even an empty one. `.jsonl`: strings, or objects with `text` and
optionally `text_pair`, `adapter` and `id`; other fields are ignored, blank lines are skipped.
`.csv` and `.tsv`: the same fields as columns; only CSV is quoted. All of them may be gzipped. The
texts may be in fields or columns of other names.
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeAlias

import msgspec

from cli.shell import CommandFailed
from cli.text_files import Columns, TextFile, open_text, read_table
from service.client import Input

STDIN = "-"
TEXT = "text"
# No service accepts a longer text: this is the default limit of a request's body.
MAX_LINE_BYTES = 8 * 2**20


@dataclass(frozen=True, slots=True)
class Record:
    """One input, the line at which it begins, and how many bytes of the file end with it."""

    line: int
    position: int
    input: str | Input


@dataclass(frozen=True, slots=True)
class BadLine:
    """A line that is no input, where reading goes on; as in `Record`. message: why it is none."""

    line: int
    position: int
    message: str


# What an input may have beside its text; the last one in JSON only.
_OTHERS = ("text_pair", "adapter", "id", "adapters")


@dataclass(frozen=True, slots=True)
class TextColumns:
    """The names of the columns that hold the texts; None: `text_pair`, if it exists.

    Raises:
        CommandFailed: both are the same.
    """

    text: str = "text"
    text_pair: str | None = None

    def __post_init__(self) -> None:
        if self.text == self.text_pair:
            raise CommandFailed(f"{self.text!r} is named for the text and for the second text")

    @property
    def required(self) -> tuple[str, ...]:
        """Fields of `Input` that every input must have."""
        return ("text",) if self.text_pair is None else ("text", "text_pair")

    @property
    def names(self) -> Mapping[str, str]:
        """The column of each field of `Input`. One that holds a text is nothing else."""
        named = {"text": self.text}
        if self.text_pair is not None:
            named["text_pair"] = self.text_pair
        others = {name: name for name in _OTHERS if name not in named.values()}
        return named | {name: column for name, column in others.items() if name not in named}


Reader: TypeAlias = Callable[[TextFile, TextColumns], Iterator[Record]]


@contextmanager
def open_inputs(name: str) -> Iterator[TextFile]:
    """Open a file by its path, or standard input as `-`.

    Raises:
        CommandFailed: it cannot be opened.
    """
    shown = name_of(name)

    def fault(message: str, *, line: int | None = None) -> CommandFailed:
        return CommandFailed(f"{shown if line is None else f'{shown}, line {line}'}: {message}")

    if name == STDIN:
        yield TextFile(sys.stdin.buffer, fault, max_line_bytes=MAX_LINE_BYTES)
        return
    with open_text(name, fault, max_line_bytes=MAX_LINE_BYTES) as file:
        yield file


def name_of(name: str) -> str:
    """What messages call a file."""
    return "standard input" if name == STDIN else name


def format_of(name: str) -> str:
    """The format that a file's name tells; plain text if it tells none."""
    suffix = Path(name.lower().removesuffix(".gz")).suffix.removeprefix(".")
    return suffix if suffix in READERS else TEXT


def read_text(file: TextFile, _: TextColumns) -> Iterator[Record]:
    for line in file.lines():
        yield Record(file.line, file.position, line.removesuffix("\n").removesuffix("\r"))


def reader_of(form: str, *, guessed: bool) -> Reader:
    """The reader of a format. guessed: nobody has named it, so texts that look like JSON are
    refused: they would be classified with their braces."""
    return _read_guessed_text if form == TEXT and guessed else READERS[form]


def _read_guessed_text(file: TextFile, texts: TextColumns) -> Iterator[Record]:
    for record in read_text(file, texts):
        if record.line == 1 and isinstance(record.input, str) and _is_json(record.input):
            raise file.fault(
                "this looks like JSON: --input-format jsonl reads it as such, and --input-format "
                "text as a text",
                line=1,
            )
        yield record


def _is_json(line: str) -> bool:
    if not line.lstrip().startswith("{"):
        return False
    try:
        msgspec.json.decode(line)
    except (msgspec.MsgspecError, UnicodeEncodeError):
        return False
    return True


def tell_terminal() -> None:
    """Say what standard input is read for, if it is a terminal, which would just stand still."""
    if sys.stdin.isatty():
        sys.stderr.write("texts, one a line; Ctrl-D ends them\n")
        sys.stderr.flush()


def read_jsonl(file: TextFile, texts: TextColumns) -> Iterator[Record]:
    for record in read_jsonl_on(file, texts):
        if isinstance(record, BadLine):
            raise file.fault(record.message, line=record.line)
        yield record


def read_jsonl_on(file: TextFile, texts: TextColumns) -> Iterator[Record | BadLine]:
    """Goes on after a line that is no input."""
    decode = _decoder_of(texts)
    for line in file.lines():
        if line.isspace():
            continue
        try:
            yield Record(file.line, file.position, decode(line))
        except msgspec.ValidationError as error:
            yield BadLine(file.line, file.position, str(error))
        except msgspec.DecodeError as error:
            yield BadLine(file.line, file.position, f"not JSON: {error}")


def _decoder_of(texts: TextColumns) -> Callable[[str], str | Input]:
    """Reads a line of JSON. Raises msgspec's errors."""
    if texts == TextColumns():
        return msgspec.json.Decoder(str | Input).decode
    decoder = msgspec.json.Decoder(str | dict[str, Any])
    kinds = {field.name: field.type for field in msgspec.structs.fields(Input)}
    kinds |= dict.fromkeys(texts.required, str)
    names = texts.names

    def decode(line: str) -> str | Input:
        found = decoder.decode(line)
        if isinstance(found, str):
            return found
        values = {}
        for name, column in names.items():
            if column in found:
                try:
                    values[name] = msgspec.convert(found[column], kinds[name])
                except msgspec.ValidationError as error:
                    raise msgspec.ValidationError(f"{error} - at `$.{column}`") from None
            elif name in texts.required:
                raise msgspec.ValidationError(f"Object missing required field `{column}`")
        return Input(**values)

    return decode


def read_separated(file: TextFile, texts: TextColumns, *, delimiter: str) -> Iterator[Record]:
    names = {name: column for name, column in texts.names.items() if name != "adapters"}
    columns = Columns(
        tuple(names[name] for name in texts.required),
        tuple(column for name, column in names.items() if name not in texts.required),
    )
    for line, row in read_table(file, columns, delimiter=delimiter):
        found = {name: row[column] for name, column in names.items() if column in row}
        # An empty cell names no adapter and no id, but an empty second text is a text.
        adapter, id = (found.get(name) or None for name in ("adapter", "id"))
        yield Record(line, file.position, Input(found["text"], found.get("text_pair"), adapter, id))


READERS: Mapping[str, Reader] = MappingProxyType(
    {
        TEXT: read_text,
        "jsonl": read_jsonl,
        "csv": partial(read_separated, delimiter=","),
        "tsv": partial(read_separated, delimiter="\t"),
    }
)
