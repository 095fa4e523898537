"""The output of a job: an answer for each input, in order, and so the record of how far it is.

A run that was stopped, in whatever way, has written whole answers and perhaps a part of one. The
next run cuts that part off, passes as many inputs as there are answers, and appends.
"""

import csv
import fcntl
import io
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import BinaryIO, TypeAlias, cast

import msgspec

from cli.shell import CommandFailed
from cli.text_files import csv_reader
from service.client import ErrorContent, Input, Result, Unanswered
from service.commands.reading import BadLine, Record
from service.commands.writing import csv_line, tsv_line

STDOUT = "-"
_READ_BYTES = 1024 * 1024
# The columns of tables.
COLUMNS = (
    *("line", "id", "adapter", "revision", "label", "score", "labels", "abstained"),
    *("tokens", "truncated", "error"),
)


class FailedLine(msgspec.Struct, frozen=True):
    """In place of an answer. line: of the input."""

    id: str | None
    line: int
    error: ErrorContent


class _Known(msgspec.Struct):
    """What is read of an earlier answer."""

    id: str | None = None
    line: int | None = None
    error: object = None


Answer: TypeAlias = Result | FailedLine
# An answer as it is written; the input's line is in tables only.
Write: TypeAlias = Callable[[Answer, int], bytes]


@dataclass(frozen=True, slots=True)
class Format:
    """How answers are written and read again. quoted: a line may end within quotes. head: what a
    file begins with."""

    write: Write
    read: Callable[[Iterable[bytes]], Iterator[_Known]]
    quoted: bool
    head: bytes = b""


@dataclass(slots=True)
class Journal:
    """An output that was opened. done: answers that it has. failed: the errors among them."""

    file: BinaryIO
    done: int = 0
    failed: int = 0

    def write(self, content: bytes) -> None:
        """All of it: a file without a buffer may take a part."""
        view = memoryview(content)
        while view:
            view = view[self.file.write(view) :]
        self.file.flush()


def format_of(name: str) -> str:
    """The format that an output's name tells; JSON lines if it tells none."""
    suffix = Path(name.lower()).suffix.removeprefix(".")
    if suffix == "gz":
        raise CommandFailed(f"{name}: answers are not compressed: a job could not go on there")
    return suffix if suffix in FORMATS else "jsonl"


@contextmanager
def open_journal(
    name: str, form: Format, records: Iterator[Record | BadLine], *, anew: bool
) -> Iterator[Journal]:
    """The output, at the place where it goes on; `records` then gives the inputs from there.

    Args:
        anew: what is there is discarded.

    Raises:
        CommandFailed: it cannot be written, another run writes to it, or it is not the output of
            this job.
    """
    if name == STDOUT:
        import sys

        journal = Journal(sys.stdout.buffer)
        journal.write(form.head)
        yield journal
        return
    try:
        file = cast(BinaryIO, open(name, "a+b", buffering=0))  # noqa: SIM115  # closed below
    except OSError as error:
        raise CommandFailed(f"{name}: {error.strerror or error}") from None
    with file:
        if not os.path.isfile(name):
            # A pipe or a device.
            journal = Journal(file)
            journal.write(form.head)
            yield journal
            return
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise CommandFailed(f"{name}: another run writes to it") from None
        if anew:
            file.truncate(0)
        journal = Journal(file)
        end = _end_of_last(file, quoted=form.quoted)
        file.truncate(end)
        if end:
            _pass(name, form, file, end, records, journal)
        if not end:
            journal.write(form.head)
        yield journal
        os.fsync(file.fileno())


def _end_of_last(file: BinaryIO, *, quoted: bool) -> int:
    """Where the last complete line ends; in CSV a quoted field may have several lines."""
    file.seek(0)
    end = position = 0
    inside = False
    while part := file.read(_READ_BYTES):
        if not quoted:
            if (last := part.rfind(b"\n")) >= 0:
                end = position + last + 1
        else:
            start = 0
            for piece in part.split(b'"'):
                if not inside and (last := piece.rfind(b"\n")) >= 0:
                    end = position + start + last + 1
                start += len(piece) + 1
                inside = not inside
            # The last piece is not followed by a quote.
            inside = not inside
        position += len(part)
    return end


def _pass(
    name: str,
    form: Format,
    file: BinaryIO,
    end: int,
    records: Iterator[Record | BadLine],
    journal: Journal,
) -> None:
    """Pass the inputs that are answered.

    Raises:
        CommandFailed: the answers are not those of these inputs.
    """
    file.seek(0)
    lines = io.BufferedReader(cast(io.RawIOBase, file), _READ_BYTES)
    hint = "it is the output of another job? --overwrite begins anew"
    try:
        for known in form.read(_upto(lines, end)):
            record = next(records, None)
            if record is None:
                raise CommandFailed(f"{name} has more answers than there are inputs: {hint}")
            wanted = _id_of(record)
            same_line = known.line is None or known.line == record.line
            # Tables have neither empty ids nor tabs in them.
            if (known.id or "").split() != (wanted or "").split() or not same_line:
                raise CommandFailed(
                    f"{name}, answer {journal.done + 1}: its id is {known.id!r}, but line "
                    f"{record.line} of the input has {wanted!r}: {hint}"
                )
            journal.done += 1
            journal.failed += known.error is not None
    except (msgspec.MsgspecError, csv.Error, UnicodeDecodeError, ValueError) as error:
        place = f"{name}, answer {journal.done + 1}"
        raise CommandFailed(f"{place}: this is no answer ({error}): {hint}") from None
    finally:
        # The file stays open.
        lines.detach()


def _upto(lines: Iterable[bytes], end: int) -> Iterator[bytes]:
    position = 0
    for line in lines:
        position += len(line)
        yield line
        if position >= end:
            return


def _id_of(record: Record | BadLine) -> str | None:
    known = isinstance(record, Record) and isinstance(record.input, Input)
    return record.input.id if known else None  # type: ignore[union-attr]  # as `known` says


_encode = msgspec.json.Encoder().encode


def _write_json(answer: Answer, _: int) -> bytes:
    return _encode(answer) + b"\n"


def _read_json(lines: Iterable[bytes]) -> Iterator[_Known]:
    decoder = msgspec.json.Decoder(_Known)
    return (decoder.decode(line) for line in lines)


def _row(answer: Answer, line: int) -> list[object]:
    if isinstance(answer, FailedLine):
        details = [item for item in answer.error.details if item not in answer.error.message]
        error = "; ".join([f"{answer.error.type}: {answer.error.message}", *details])
        return [line, answer.id, *[None] * (len(COLUMNS) - 3), " ".join(error.split())]
    labels = None if answer.labels is None else " ".join(answer.labels)
    values = [answer.id, answer.adapter, answer.revision, answer.label, answer.score, labels]
    flags = (answer.abstained, answer.tokens, answer.truncated)
    return [line, *values, *(str(x).lower() if isinstance(x, bool) else x for x in flags), None]


def _write_csv(answer: Answer, line: int) -> bytes:
    return csv_line(_row(answer, line))


def _write_tsv(answer: Answer, line: int) -> bytes:
    return tsv_line(_row(answer, line))


def _read_table(lines: Iterable[bytes], *, delimiter: str) -> Iterator[_Known]:
    texts = (line.decode() for line in lines)
    for number, row in enumerate(csv_reader(texts, delimiter=delimiter)):
        if number == 0:
            if tuple(row) != COLUMNS:
                raise ValueError("other columns")
            continue
        if len(row) != len(COLUMNS):
            raise ValueError(f"{len(row)} columns")
        yield _Known(row[1] or None, int(row[0]), row[-1] or None)


FORMATS: Mapping[str, Format] = MappingProxyType(
    {
        "jsonl": Format(_write_json, _read_json, quoted=False),
        "csv": Format(
            _write_csv,
            lambda lines: _read_table(lines, delimiter=","),
            quoted=True,
            head=csv_line(COLUMNS),
        ),
        "tsv": Format(
            _write_tsv,
            lambda lines: _read_table(lines, delimiter="\t"),
            quoted=False,
            head=tsv_line(COLUMNS),
        ),
    }
)


def failed_line(unanswered: Unanswered, line: int) -> FailedLine:
    return FailedLine(unanswered.id, line, unanswered.error)
