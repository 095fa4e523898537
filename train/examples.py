"""One labelled text, and how a row of columns becomes one. Knows no file."""

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass

from train.errors import DataError

# As `adapters.spec.Label` bounds it: told at the row that breaks it, not after the training.
MAX_LABEL_LENGTH = 256


@dataclass(frozen=True, slots=True)
class Example:
    """One labelled text, or pair of texts."""

    text: str
    text_pair: str | None
    label: str


class Converter:
    """Rows to examples; refuses the first row that cannot be one.

    Args:
        source: path or hub name, for messages.
        text, pair, label: names of the columns; `pair` is None for single texts.
        paired: whether rows have a second text; None: all are as the first one is.
    """

    def __init__(
        self, source: str, *, text: str, pair: str | None, label: str, paired: bool | None
    ) -> None:
        self._source = source
        self._text, self._pair, self._label = text, pair, label
        self._paired = paired

    def __call__(self, line: int, values: Mapping[str, object]) -> Example:
        text = self._string(line, self._text, values[self._text])
        return Example(text, self._pair_of(line, values), self._label_of(line, values[self._label]))

    def _pair_of(self, line: int, values: Mapping[str, object]) -> str | None:
        if self._pair is None:
            return None
        pair = values.get(self._pair)
        # CSV has no null: an empty second text is none.
        given = not _is_missing(pair) and pair != ""
        if self._paired is None:
            self._paired = given
        if self._paired and not given:
            raise self._error(f"{self._pair!r} is missing or empty, but other rows have one", line)
        if given and not self._paired:
            raise self._error(f"{self._pair!r} is given, but the rows before have none", line)
        return self._string(line, self._pair, pair) if given else None

    def _label_of(self, line: int, value: object) -> str:
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, int):
            value = str(value)
        if isinstance(value, float) and math.isfinite(value):
            raise self._error(
                f"{self._label!r} is {value!r}: labels are names or whole numbers", line
            )
        label = self._string(line, self._label, value)
        if not label.strip():
            raise self._error(f"{self._label!r} is empty", line)
        if len(label) > MAX_LABEL_LENGTH:
            raise self._error(
                f"{self._label!r} has {len(label):,} characters, at most {MAX_LABEL_LENGTH} are "
                "possible: is this the right column?",
                line,
            )
        # A million rows share a handful of label objects.
        return sys.intern(label)

    def _string(self, line: int, column: str, value: object) -> str:
        if _is_missing(value):
            raise self._error(f"{column!r} is missing (null)", line)
        if not isinstance(value, str):
            raise self._error(
                f"{column!r} is of type {type(value).__name__}, expected a string", line
            )
        if not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError:
                raise self._error(f"{column!r} holds half of a surrogate pair", line) from None
        return value

    def _error(self, message: str, line: int) -> DataError:
        return DataError(message, source=self._source, line=line)


def _is_missing(value: object) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))
