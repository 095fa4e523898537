"""Answers of `predict` as lines: JSON, CSV or TSV, with what was asked beside them.

On request an answer has the text itself, the number of its row, and in tables a column for each
label's score. JSON has the scores anyway. `readable` is for people: the text, and what an
explanation says of it.
"""

import os
import sys
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from shutil import get_terminal_size
from typing import Any, TypeAlias

import msgspec

from cli.shell import CommandFailed
from cli.text_files import csv_row
from service.client import Input, Result

# What `--with` may name.
EXTRAS = ("row", "text", "scores")
COLUMNS = (
    *("id", "adapter", "revision", "label", "score"),
    *("labels", "abstained", "tokens", "truncated"),
)

# The format for people.
READABLE = "readable"

_encode = msgspec.json.Encoder().encode


@dataclass(frozen=True, slots=True)
class Answered:
    """A result and what was asked. row: the number of the text, from 1. line: where it begins."""

    row: int
    line: int
    input: str | Input
    result: Result

    @property
    def text(self) -> str:
        return self.input if isinstance(self.input, str) else self.input.text

    @property
    def text_pair(self) -> str | None:
        return None if isinstance(self.input, str) else self.input.text_pair


# An answer as bytes, with the end of its line.
Writer: TypeAlias = Callable[[Answered], bytes]


def json_lines(extras: Collection[str]) -> Writer:
    """The service's answer as it is, with the extras before it."""

    def write(answered: Answered) -> bytes:
        content: dict[str, Any] = {}
        if "row" in extras:
            content["row"] = answered.row
        if "text" in extras:
            content["text"] = answered.text
            if answered.text_pair is not None:
                content["text_pair"] = answered.text_pair
        answer = _encode(answered.result) + b"\n"
        return _encode(content)[:-1] + b"," + answer[1:] if content else answer

    return write


@dataclass(slots=True)
class Table:
    """Rows of one table; the header is written with the first row.

    The columns of scores are the labels of the first answer, in the order of the alphabet.
    """

    extras: Collection[str]
    write_row: Callable[[Sequence[object]], bytes]
    _labels: list[str] | None = field(default=None, init=False)

    def __call__(self, answered: Answered) -> bytes:
        """
        Raises:
            CommandFailed: the labels of this answer have no columns.
        """
        result, head = answered.result, b""
        scores = {score.label: score.score for score in result.scores}
        if self._labels is None:
            self._labels = sorted(scores)
            head = self.write_row(self._columns())
        if "scores" in self.extras and sorted(scores) != self._labels:
            raise CommandFailed(
                f"line {answered.line}: adapter {result.adapter} gives scores of other labels than "
                "the first answer, and a table has columns for these alone: --format jsonl has all"
            )
        return head + self.write_row([_cell(value) for value in self._values(answered, scores)])

    def _columns(self) -> list[str]:
        columns = ["row"] if "row" in self.extras else []
        columns += ["text", "text_pair"] if "text" in self.extras else []
        columns += COLUMNS
        if "scores" in self.extras:
            columns += [f"score {label}" for label in self._labels or ()]
        return columns

    def _values(self, answered: Answered, scores: dict[str, float]) -> list[object]:
        result = answered.result
        values: list[object] = [answered.row] if "row" in self.extras else []
        values += [answered.text, answered.text_pair] if "text" in self.extras else []
        values += [result.id, result.adapter, result.revision, result.label, result.score]
        values += [None if result.labels is None else " ".join(result.labels)]
        values += [result.abstained, result.tokens, result.truncated]
        if "scores" in self.extras:
            values += [scores[label] for label in self._labels or ()]
        return values


def readable(_: Collection[str]) -> Writer:
    """A few lines for each answer, for people, as wide as the terminal."""
    # Only here, because drawing is slow to import.
    from service.commands.explained import described

    columns = get_terminal_size().columns
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")

    def write(answered: Answered) -> bytes:
        lines = described(answered.input, answered.result, columns=columns, colour=colour)
        return lines.encode(sys.stdout.encoding or "utf-8", "backslashreplace")

    return write


def csv_line(values: Iterable[object]) -> bytes:
    return csv_row(values).encode()


def tsv_line(values: Iterable[object]) -> bytes:
    # Nothing is quoted there, so what would end a field is a space.
    cells = ("" if value is None else " ".join(str(value).split()) for value in values)
    return "\t".join(cells).encode() + b"\n"


# By the name of the format.
WRITERS: dict[str, Callable[[Collection[str]], Writer]] = {
    "jsonl": json_lines,
    "csv": lambda extras: Table(extras, csv_line),
    "tsv": lambda extras: Table(extras, tsv_line),
    READABLE: readable,
}


def _cell(value: object) -> object:
    return str(value).lower() if isinstance(value, bool) else value
