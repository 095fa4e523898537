"""The words of a text that a model read, put together from tokens, with their places in the text.

A tokenizer divides a text into pieces of words, and some pieces are not even whole characters. What
is shown to people are words: slices of the text as it was sent, in its own code points. A word is
what its tokens cover together:

- Tokens that share a character belong to one word: a piece of a character says nothing.
- Neighbours belong to one word if the text between them goes on: letters and digits with their
  marks, an apostrophe between letters, a point between digits, a run of one sign. So every
  tokenizer has the same words for most texts.
- Scripts that write no spaces between words (Chinese, Japanese, Thai, ...) have the tokens as
  their words.
- White space belongs to the word after it, at the end of a text to the one before it.

Tokens that belong to no word are those without a character that can be seen: the special tokens,
and all tokens of a text of nothing but white space.
"""

import unicodedata
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from adapters.long_text import Spans

# Marks that a tokenizer may leave out after a letter; more of them are not looked at.
_MOST_MARKS = 64
_APOSTROPHES = "'\u2019\u02bc"
_POINTS = ".,"
_JOINER = "\u200d"
# Scripts without spaces between words: first and last code point.
_UNSPACED = (
    (0x0E00, 0x0EFF),  # Thai, Lao
    (0x0F00, 0x109F),  # Tibetan, Myanmar
    (0x1780, 0x17FF),  # Khmer
    (0x1950, 0x19DF),  # Tai Le, New Tai Lue
    (0x2E80, 0x2FDF),  # radicals
    (0x3005, 0x3007),
    (0x3021, 0x3029),
    (0x3040, 0x30FF),  # kana
    (0x3100, 0x312F),  # bopomofo
    (0x31A0, 0x31FF),
    (0x3400, 0x4DBF),
    (0x4E00, 0x9FFF),
    (0xF900, 0xFAFF),
    (0xFF66, 0xFF9F),  # half-width kana
    (0x1B000, 0x1B16F),
    (0x20000, 0x3FFFF),
)
_UNSPACED_STARTS = [first for first, _ in _UNSPACED]


class Word(NamedTuple):
    """text[start:end], which begins and ends with a character that can be seen.

    tokens: the indices of its tokens in the encoding. unknown: one of them stands for something
    that the vocabulary lacks.
    """

    start: int
    end: int
    tokens: tuple[int, ...]
    unknown: bool


@dataclass(frozen=True, slots=True, eq=False)
class LocatedField:
    """Where the tokens of a text, or of one text of a pair, are in it.

    first: the index of its first token in the encoding. spans: int32 [tokens, 2]. read: how many
    of its characters are read; less than its length if tokens were left out.
    """

    first: int
    spans: Spans
    read: int


def words_of(text: str, field: LocatedField, unknown: npt.NDArray[np.bool_]) -> list[Word]:
    """The words of one text, in order and without overlaps.

    Args:
        unknown: bool [tokens of the encoding].
    """
    made = _Words(text)
    spans: Sequence[tuple[int, int]] = field.spans.tolist()
    unknowns = unknown[field.first : field.first + len(spans)].tolist()
    for index, ((start, end), is_unknown) in enumerate(zip(spans, unknowns, strict=True)):
        made.add(field.first + index, start, end, is_unknown)
    return made.finished()


class _Words:
    """Takes the tokens of a text in their order."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._words: list[tuple[int, int, list[int], bool]] = []
        # Tokens of white space, which wait for the word after them.
        self._blank: list[int] = []

    def add(self, token: int, start: int, end: int, unknown: bool) -> None:
        piece = self._text[start:end]
        left = piece.lstrip()
        if not left:
            self._blank.append(token)
            return
        start, end = end - len(left), end - len(piece) + len(piece.rstrip())
        tokens, self._blank = [*self._blank, token], []
        # A normaliser may exchange neighbours: then a token begins before several words.
        while self._words and self._continues(start):
            before = self._words.pop()
            start, end = min(start, before[0]), max(end, before[1])
            before[2].extend(tokens)
            tokens, unknown = before[2], unknown or before[3]
        self._words.append((start, end, tokens, unknown))

    def finished(self) -> list[Word]:
        if not self._words:
            return []
        self._words[-1][2].extend(self._blank)
        ends = [start for start, _, _, _ in self._words[1:]] + [len(self._text)]
        return [
            Word(start, _with_marks(self._text, end, limit), tuple(tokens), unknown)
            for (start, end, tokens, unknown), limit in zip(self._words, ends, strict=True)
        ]

    def _continues(self, start: int) -> bool:
        """Whether the last word goes on with what begins here."""
        end = self._words[-1][1]
        if start < end:
            return True
        end = _with_marks(self._text, end, start)
        return start == end and _is_inside(self._text, start)


def _with_marks(text: str, end: int, limit: int) -> int:
    """The end of a word with the marks after it that no token covers."""
    limit = min(limit, end + _MOST_MARKS)
    while end < limit and _is_mark(text[end]):
        end += 1
    return end


def _is_inside(text: str, at: int) -> bool:
    """Whether what is on both sides of a place between two characters is one word."""
    left, right = text[at - 1], text[at]
    if _is_mark(right) or left == _JOINER:
        return True
    if left == right and not left.isalnum():
        return True
    if _is_half_of_flag(left) and _is_half_of_flag(right):
        return True
    if _is_unspaced(left) or _is_unspaced(right):
        return False
    if _is_letter(left) and _is_letter(right):
        return True
    # One character further: the middle of `don't` and of `1.5`.
    before, after = text[at - 2 : at - 1], text[at + 1 : at + 2]
    if right in _APOSTROPHES:
        return left.isalpha() and after.isalpha()
    if left in _APOSTROPHES:
        return before.isalpha() and right.isalpha()
    if right in _POINTS:
        return left.isdigit() and after.isdigit()
    return left in _POINTS and before.isdigit() and right.isdigit()


def _is_mark(character: str) -> bool:
    """Whether a character only changes the one before it: an accent, the colour of an emoji."""
    if character < "\u0300":
        return character == "\u00ad"
    return (
        unicodedata.category(character)[0] == "M"
        or character in "\u200c\u200d"
        or "\U0001f3fb" <= character <= "\U0001f3ff"
    )


def _is_half_of_flag(character: str) -> bool:
    return "\U0001f1e6" <= character <= "\U0001f1ff"


def _is_letter(character: str) -> bool:
    # Numbers and `_` too; Indic vowels are marks.
    return unicodedata.category(character)[0] in "LNM" or character == "_"


def _is_unspaced(character: str) -> bool:
    code = ord(character)
    if code < _UNSPACED_STARTS[0]:
        return False
    return code <= _UNSPACED[bisect_right(_UNSPACED_STARTS, code) - 1][1]
