"""Lines and tables of text files: UTF-8, plain or gzipped, with the number of every line.

Each caller passes a `Fault`, which makes its own kind of error.
"""

import csv
import gzip
import io
import sys
import zlib
from _csv import Reader
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol, cast

_GZIP_MAGIC = b"\x1f\x8b"
_UTF8_BOM = b"\xef\xbb\xbf"
_LISTED = 20


class Fault(Protocol):
    """Makes the error for a file that cannot be read. line: the line at fault, if it is one."""

    def __call__(self, message: str, *, line: int | None = None) -> Exception: ...


class TextFile:
    """An open file. line: the number of the line that was read last. total: its size in bytes.

    bytes_read: the bytes of the lines so far, unpacked.

    Args:
        compressed: the file is gzipped.
        total: None for pipes and devices.
        max_line_bytes: a longer line is refused instead of held in memory.
    """

    def __init__(
        self,
        file: BinaryIO,
        fault: Fault,
        *,
        compressed: bool = False,
        total: int | None = None,
        max_line_bytes: int | None = None,
    ) -> None:
        self.fault = fault
        self.total = total
        self.max_line_bytes = max_line_bytes
        self.line = 0
        self.bytes_read = 0
        self._file = cast(BinaryIO, gzip.GzipFile(fileobj=file)) if compressed else file
        self._compressed_file = file if compressed else None

    @property
    def position(self) -> int:
        """How many of the `total` bytes have been read; compressed bytes if it is gzipped."""
        return self._compressed_file.tell() if self._compressed_file else self.bytes_read

    def lines(self) -> Iterator[str]:
        """Decoded lines with their endings, read one at a time.

        Raises:
            Exception: `fault`'s, for a line that is too long or not UTF-8, or a file that breaks.
        """
        limit = -1 if self.max_line_bytes is None else self.max_line_bytes + 1
        while True:
            try:
                line = self._file.readline(limit)
            except (gzip.BadGzipFile, EOFError, zlib.error) as error:
                raise self.fault(f"broken gzip after line {self.line}: {error}") from None
            except OSError as error:
                raise self.fault(f"cannot be read: {error.strerror or error}") from None
            if not line:
                return
            self.line += 1
            if len(line) == limit:
                raise self.fault(f"longer than {self.max_line_bytes} bytes", line=self.line)
            self.bytes_read += len(line)
            yield self._decode(line)

    def _decode(self, line: bytes) -> str:
        first = self.line == 1
        try:
            return (line.removeprefix(_UTF8_BOM) if first else line).decode()
        except UnicodeDecodeError as error:
            message = f"not UTF-8: byte 0x{line[error.start]:02x} at position {error.start + 1}"
            if first and line.startswith(_GZIP_MAGIC):
                message = "compressed with gzip: its name must end in .gz"
            raise self.fault(message, line=self.line) from None


@contextmanager
def open_text(
    path: Path | str, fault: Fault, *, max_line_bytes: int | None = None
) -> Iterator[TextFile]:
    """Open a file; a name that ends in `.gz` says that it is gzipped.

    Raises:
        Exception: `fault`'s, if the file cannot be opened.
    """
    path = Path(path)
    try:
        file = path.open("rb")  # closed below
    except OSError as error:
        raise fault(f"cannot be read: {error.strerror or error}") from None
    with file:
        yield TextFile(
            file,
            fault,
            compressed=path.suffix.lower() == ".gz",
            total=path.stat().st_size if path.is_file() else None,
            max_line_bytes=max_line_bytes,
        )


@dataclass(frozen=True, slots=True)
class Columns:
    """The columns that a reader needs, and those that it takes where they exist."""

    required: tuple[str, ...]
    optional: tuple[str, ...] = ()

    def check(self, present: Sequence[str], fault: Fault, *, line: int | None = None) -> None:
        """
        Raises:
            Exception: `fault`'s, if a required column is missing; it names those that exist.
        """
        if missing := [name for name in self.required if name not in present]:
            word = "column" if len(missing) == 1 else "columns"
            raise fault(f"no {word} {_listed(missing)}; there are: {_listed(present)}", line=line)

    def of(self, present: Sequence[str]) -> list[str]:
        """The needed columns among those present."""
        return [name for name in (*self.required, *self.optional) if name in present]


def read_table(
    file: TextFile, columns: Columns, *, delimiter: str
) -> Iterator[tuple[int, dict[str, str]]]:
    """Rows of CSV or TSV by column, each with the line at which it begins; the first is the header.

    CSV: quoted fields may hold delimiters, quotes and newlines. TSV: nothing is quoted, a quote is
    a character. A field may be as long as the file, but no row longer than the file's
    `max_line_bytes`. Empty lines are skipped.

    Raises:
        Exception: `fault`'s, for missing or repeated columns, broken quotes, rows that are too long
            and rows that have more or fewer fields than the header.
    """
    start = row_begin = 0

    def lines() -> Iterator[str]:
        limit = file.max_line_bytes
        for line in file.lines():
            # A quote that is never closed must not collect an endless pipe in memory.
            if limit is not None and file.bytes_read - row_begin > limit:
                raise file.fault(f"row is longer than {limit} bytes", line=start)
            yield line

    rows = csv_reader(lines(), delimiter=delimiter)
    header: list[str] | None = None
    while True:
        start, row_begin = rows.line_num + 1, file.bytes_read
        try:
            fields = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            # csv's own words are about a flag of Python's.
            alone = "a carriage return ends no row: save the file with line feeds"
            what = alone if "new-line character" in str(error) else error
            raise file.fault(f"broken row: {what}", line=start) from None
        if not fields:
            continue
        if header is None:
            header = fields
            columns.check(header, file.fault, line=start)
            if repeated := [name for name in columns.of(header) if header.count(name) > 1]:
                raise file.fault(f"column {_listed(repeated)} appears twice", line=start)
        elif len(fields) != len(header):
            raise file.fault(f"{len(fields)} fields, the header has {len(header)}", line=start)
        else:
            yield start, dict(zip(header, fields, strict=True))


def csv_row(values: Iterable[object]) -> str:
    """A row of CSV with its line feed. A carriage return is quoted, too: outside quotes a reader
    takes it for the end of a row."""
    text = io.StringIO()
    # The writer quotes what is in its own line ending.
    csv.writer(text, lineterminator="\r\n").writerow(values)
    return text.getvalue().removesuffix("\r\n") + "\n"


def csv_reader(lines: Iterable[str], *, delimiter: str) -> Reader:
    """Rows of CSV or TSV, as of `read_table`. The numbers of their lines are in `line_num`."""
    # One limit for the whole process, 131,072 characters at first. It is only ever raised.
    csv.field_size_limit(sys.maxsize)
    return (
        csv.reader(lines, delimiter=delimiter, quoting=csv.QUOTE_NONE, strict=True)
        if delimiter == "\t"
        else csv.reader(lines, delimiter=delimiter, strict=True)
    )


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:_LISTED])
    return shown if len(names) <= _LISTED else f"{shown} and {len(names) - _LISTED} more"
