"""Rows of a file, one after the other, whatever its format. Knows no labels, only columns.

The extension decides the format. Every row comes with the number it is found by: the line that it
begins at, or in Parquet the row's own.
"""

import csv
import gzip
import json
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeAlias, cast

from adapters.errors import listing
from train.errors import DataError

_GZIP_MAGIC = b"\x1f\x8b"
_UTF8_BOM = b"\xef\xbb\xbf"
_PARQUET_BATCH_ROWS = 8192


@dataclass(frozen=True, slots=True)
class Columns:
    """Which columns a reader needs: it refuses a file without a required one."""

    required: tuple[str, ...]
    optional: tuple[str, ...]

    def check(self, present: Sequence[str], *, source: Path | str, line: int | None = None) -> None:
        """
        Raises:
            DataError: a required column is missing; names it and those that exist.
        """
        missing = [repr(name) for name in self.required if name not in present]
        if missing:
            word = "column" if len(missing) == 1 else "columns"
            raise DataError(
                f"no {word} {listing(missing)}; there are: {listing([repr(n) for n in present])}",
                source=source,
                line=line,
            )

    def of(self, present: Sequence[str]) -> list[str]:
        """The needed columns among those present."""
        return [name for name in (*self.required, *self.optional) if name in present]


Row: TypeAlias = tuple[int, Mapping[str, object]]
Reader: TypeAlias = Callable[[Path, Columns], Iterator[Row]]


def reader_of(path: Path) -> Reader:
    """The reader of a file's format.

    Raises:
        DataError: no format has this extension.
    """
    for extension, reader in READERS.items():
        if path.name.lower().endswith(extension):
            return reader
    raise DataError(
        f"unknown extension {path.suffix!r}; supported: {', '.join(READERS)}", source=path
    )


def read_jsonl(path: Path, columns: Columns) -> Iterator[Row]:
    """One JSON object a line; blank lines are skipped.

    Raises:
        DataError: with the line.
    """
    for number, line in _lines(path):
        if line.isspace():
            continue
        try:
            row = json.loads(line.rstrip("\r\n"))
        except json.JSONDecodeError as error:
            raise DataError(
                f"not JSON: {error.msg} at column {error.colno}", source=path, line=number
            ) from None
        except (ValueError, RecursionError) as error:
            raise DataError(f"not JSON: {error}", source=path, line=number) from None
        if not isinstance(row, dict):
            raise DataError(
                f"a JSON {type(row).__name__}, expected an object", source=path, line=number
            )
        columns.check(list(row), source=path, line=number)
        yield number, row


def read_csv(path: Path, columns: Columns) -> Iterator[Row]:
    """Comma-separated with a header; quoted fields may hold commas, quotes and newlines.

    Raises:
        DataError: with the line that the row begins at.
    """
    return _delimited(path, columns, ",")


def read_tsv(path: Path, columns: Columns) -> Iterator[Row]:
    """As CSV, separated by tabs."""
    return _delimited(path, columns, "\t")


def _delimited(path: Path, columns: Columns, delimiter: str) -> Iterator[Row]:
    rows = csv.reader((line for _, line in _lines(path)), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    while True:
        start = rows.line_num + 1
        try:
            fields = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            raise DataError(f"broken row: {error}", source=path, line=start) from None
        if not fields:
            continue
        if header is None:
            header = fields
            columns.check(header, source=path)
            if repeated := [repr(name) for name in columns.of(header) if header.count(name) > 1]:
                raise DataError(
                    f"column {listing(repeated)} appears twice", source=path, line=start
                )
        elif len(fields) != len(header):
            raise DataError(
                f"{len(fields)} fields, the header has {len(header)}", source=path, line=start
            )
        else:
            yield start, dict(zip(header, fields, strict=True))


def read_parquet(path: Path, columns: Columns) -> Iterator[Row]:
    """Apache Parquet; only the needed columns are read.

    Raises:
        DataError: with the row's number, counted from 1.
    """
    import pyarrow as pa  # only Parquet needs it, and it takes a while to import
    from pyarrow import parquet

    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            present = file.schema_arrow.names
            columns.check(present, source=path)
            for batch in file.iter_batches(_PARQUET_BATCH_ROWS, columns=columns.of(present)):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(
            f"unreadable Parquet after row {number}: {_first_line(error)}", source=path
        ) from None


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Decoded lines with their endings, numbered from 1; plain or gzip."""
    number = 0
    try:
        with closing(_open(path)) as file:
            for number, line in enumerate(file, start=1):
                yield number, _decode(line, path, number)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"broken gzip after line {number}: {error}", source=path) from None
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror or error}", source=path) from None


def _open(path: Path) -> BinaryIO:
    if path.suffix.lower() == ".gz":
        return cast(BinaryIO, gzip.open(path, "rb"))
    return path.open("rb")


def _decode(line: bytes, path: Path, number: int) -> str:
    try:
        return line.removeprefix(_UTF8_BOM).decode() if number == 1 else line.decode()
    except UnicodeDecodeError as error:
        what = f"not UTF-8: byte 0x{line[error.start]:02x} at position {error.start + 1}"
        if number == 1 and line.startswith(_GZIP_MAGIC):
            what = "compressed with gzip: its name must end in .gz"
        raise DataError(what, source=path, line=number) from None


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


READERS: dict[str, Reader] = {
    ".jsonl": read_jsonl,
    ".jsonl.gz": read_jsonl,
    ".csv": read_csv,
    ".csv.gz": read_csv,
    ".tsv": read_tsv,
    ".tsv.gz": read_tsv,
    ".parquet": read_parquet,
}
