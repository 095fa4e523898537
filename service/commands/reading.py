"""Texts of a file or of standard input, one after the other, with the line that each begins at.

Plain text: a line is a text, an empty one too. `.jsonl`: objects with `text`, and if wanted
`text_pair`, `adapter`, `id`, or strings; blank lines are left out. `.csv`, `.tsv`: the same as
columns. Each also gzipped. Knows no service.
"""

import csv
import gzip
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import BinaryIO, TypeAlias, cast

import msgspec

from service.client import Input
from service.commands import CommandFailed

STDIN = "-"
# No service takes a longer text: its bodies are limited, by default to this.
MAX_LINE_BYTES = 8 * 2**20
_GZIP_MAGIC = b"\x1f\x8b"
_UTF8_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class Record:
    """One input, the line that it begins at, and how many bytes of the source end with it."""

    line: int
    position: int
    input: str | Input


@dataclass(frozen=True, slots=True)
class Columns:
    """What the columns of a CSV file are called; None: `text_pair`, if it is there."""

    text: str = "text"
    text_pair: str | None = None


class Source:
    """An open file. total: its bytes, where that is known."""

    def __init__(self, name: str, file: BinaryIO, raw: BinaryIO, total: int | None) -> None:
        self.name = "standard input" if name == STDIN else name
        self.total = total
        self.line = 0
        self._file = file
        # In a compressed file the place is the compressed one: that is what its size counts.
        self._raw = None if raw is file else raw
        self._read = 0

    @property
    def position(self) -> int:
        return self._read if self._raw is None else self._raw.tell()

    def lines(self) -> Iterator[str]:
        """Decoded, with their endings.

        Raises:
            CommandFailed: a line that cannot be read, with its number.
        """
        while True:
            self.line += 1
            try:
                line = self._file.readline(MAX_LINE_BYTES + 1)
            except (gzip.BadGzipFile, EOFError, zlib.error) as error:
                raise self.fault(f"broken gzip: {error}") from None
            except OSError as error:
                raise self.fault(f"cannot be read: {error.strerror or error}") from None
            if not line:
                return
            if len(line) > MAX_LINE_BYTES:
                raise self.fault(f"longer than {MAX_LINE_BYTES} bytes")
            self._read += len(line)
            yield self._decode(line)

    def fault(self, what: str, line: int | None = None) -> CommandFailed:
        return CommandFailed(f"{self.name}, line {line or self.line}: {what}")

    def _decode(self, line: bytes) -> str:
        first = self.line == 1
        try:
            return (line.removeprefix(_UTF8_BOM) if first else line).decode()
        except UnicodeDecodeError as error:
            if first and line.startswith(_GZIP_MAGIC):
                raise self.fault("compressed with gzip: its name must end in .gz") from None
            raise self.fault(
                f"not UTF-8: byte 0x{line[error.start]:02x} at position {error.start + 1}"
            ) from None


Reader: TypeAlias = Callable[[Source, Columns], Iterator[Record]]


@contextmanager
def opened(name: str) -> Iterator[Source]:
    """A file by its path, or `-`.

    Raises:
        CommandFailed: it cannot be opened.
    """
    if name == STDIN:
        yield Source(name, sys.stdin.buffer, sys.stdin.buffer, None)
        return
    try:
        raw = Path(name).open("rb")  # noqa: SIM115  # closed below
    except OSError as error:
        raise CommandFailed(f"{name}: cannot be read: {error.strerror or error}") from None
    with raw:
        # A pipe or a device has no size that would mean anything.
        total = Path(name).stat().st_size if Path(name).is_file() else None
        compressed = name.lower().endswith(".gz")
        file = cast(BinaryIO, gzip.GzipFile(fileobj=raw)) if compressed else raw
        yield Source(name, file, raw, total)


def format_of(name: str) -> str:
    """What a file's name says that it is; of what it does not say, plain text."""
    suffix = Path(name.lower().removesuffix(".gz")).suffix.removeprefix(".")
    return suffix if suffix in READERS else TEXT


def read_text(source: Source, _: Columns) -> Iterator[Record]:
    for line in source.lines():
        yield Record(source.line, source.position, line.removesuffix("\n").removesuffix("\r"))


def read_jsonl(source: Source, _: Columns) -> Iterator[Record]:
    decoder: msgspec.json.Decoder[str | Input] = msgspec.json.Decoder(str | Input)
    for line in source.lines():
        if line.isspace():
            continue
        try:
            found = decoder.decode(line)
        except msgspec.ValidationError as error:
            raise source.fault(str(error)) from None
        except msgspec.DecodeError as error:
            raise source.fault(f"not JSON: {error}") from None
        yield Record(source.line, source.position, found)


def read_csv(source: Source, columns: Columns) -> Iterator[Record]:
    return _delimited(source, columns, ",")


def read_tsv(source: Source, columns: Columns) -> Iterator[Record]:
    return _delimited(source, columns, "\t")


TEXT = "text"
READERS: Mapping[str, Reader] = MappingProxyType(
    {TEXT: read_text, "jsonl": read_jsonl, "csv": read_csv, "tsv": read_tsv}
)


def _delimited(source: Source, columns: Columns, delimiter: str) -> Iterator[Record]:
    rows = csv.reader(source.lines(), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    while True:
        start = rows.line_num + 1
        try:
            fields = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            raise source.fault(f"broken row: {error}", start) from None
        if not fields:
            continue
        if header is None:
            header = fields
            found = _places(source, header, columns)
        elif len(fields) != len(header):
            raise source.fault(f"{len(fields)} fields, the header has {len(header)}", start)
        else:
            values = {name: fields[place] for name, place in found.items()}
            # An empty cell names nothing; an empty second text is a text.
            named = {key: values.get(key) or None for key in ("adapter", "id")}
            made = Input(values["text"], values.get("text_pair"), **named)
            yield Record(start, source.position, made)


def _places(source: Source, header: Sequence[str], columns: Columns) -> dict[str, int]:
    """Where the fields of an input stand in a row."""
    names = {
        "text": columns.text,
        "text_pair": columns.text_pair or "text_pair",
        "adapter": "adapter",
        "id": "id",
    }
    for field, name in names.items():
        needed = field == "text" or (field == "text_pair" and columns.text_pair is not None)
        if needed and name not in header:
            there = ", ".join(repr(item) for item in header[:20])
            raise source.fault(f"no column {name!r}; there are: {there}")
        if header.count(name) > 1:
            raise source.fault(f"column {name!r} appears twice")
    return {field: header.index(name) for field, name in names.items() if name in header}
