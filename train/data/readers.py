"""Rows of a data file; its extension says which format it has.

Every row comes with a number: the line at which it begins, or in Parquet the row's own.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TypeAlias

from cli.text_files import Columns, open_text, read_table
from train.errors import DataError

_PARQUET_BATCH_ROWS = 8192

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
    with open_text(path, partial(DataError, source=path)) as file:
        for line in file.lines():
            if not line.isspace():
                row = _json_object(line.rstrip("\r\n"), partial(file.fault, line=file.line))
                columns.check(list(row), file.fault, line=file.line)
                yield file.line, row


def _json_object(line: str, fault: Callable[[str], Exception]) -> dict[str, object]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise fault(f"not JSON: {error.msg} at column {error.colno}") from None
    except (ValueError, RecursionError) as error:
        raise fault(f"not JSON: {error}") from None
    if not isinstance(row, dict):
        raise fault(f"a JSON {type(row).__name__}, expected an object")
    return row


def read_separated(path: Path, columns: Columns, *, delimiter: str) -> Iterator[Row]:
    """A table with a header; CSV may be quoted, TSV is not.

    Raises:
        DataError: with the line at which the row begins.
    """
    with open_text(path, partial(DataError, source=path)) as file:
        yield from read_table(file, columns, delimiter=delimiter)


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
            columns.check(present, partial(DataError, source=path))
            for batch in file.iter_batches(_PARQUET_BATCH_ROWS, columns=columns.of(present)):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (pa.ArrowException, OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(f"unreadable Parquet after row {number}: {reason}", source=path) from None


_TEXT_READERS: dict[str, Reader] = {
    ".jsonl": read_jsonl,
    ".csv": partial(read_separated, delimiter=","),
    ".tsv": partial(read_separated, delimiter="\t"),
}
READERS: dict[str, Reader] = {
    f"{extension}{packed}": reader
    for extension, reader in _TEXT_READERS.items()
    for packed in ("", ".gz")
} | {".parquet": read_parquet}
