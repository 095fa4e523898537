"""Lines that are answered together: what each of them asks for, and its answer.

A portion is one request to the engine. Its lines have the same options, and each has its own fault
or its own answer.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import orjson

from service.client.types import Explain
from service.errors import InvalidRequest, RequestError, TooLarge, without_frames
from service.http.bodies import parse_json, validated
from service.http.classify import Answers
from service.http.errors import refusal_of
from service.http.explanation import HIDDEN_WORDS
from service.http.openapi.schemas import StreamLine, StreamQuery
from service.http.predict import result_of
from service.http.stream.lines import Line

# What is sent at once, at least.
PIECE_BYTES = 32 * 1024
# A valid line has so many fields.
_FIELDS = len(StreamLine.model_fields)
# A text without letters has special tokens; letters of most languages are four to a token.
_LEAST_TOKENS = 8
_LETTERS = 4
_MOST_LETTERS = 2048
_LETTERS_A_WORD = 5
# Of a portion: small enough that making one does not delay other requests, large enough that the
# engine's work for a request does not count.
PORTION_LINES = 64
PORTION_BYTES = 32 * 1024


class Options(NamedTuple):
    """Of a line; as of `schemas.PredictRequest`."""

    top_k: int | None
    truncate: bool
    explain: Explain | None
    abstain_below: float | None
    timeout_ms: int


@dataclass(slots=True, eq=False)
class Item:
    """A line. adapter: its reference. answer: once there is one, of which its index is the place.

    input: None if there is a fault from the beginning.
    """

    number: int
    size: int
    input: StreamLine | None = None
    adapter: str = ""
    fault: Exception | None = None
    answer: Answers | None = None
    index: int = 0

    @property
    def tokens(self) -> int:
        """A guess, before it is tokenised."""
        if self.input is None:
            return 0
        return _LEAST_TOKENS + min(self._letters, _MOST_LETTERS) // _LETTERS

    @property
    def words(self) -> int:
        """A guess of how many would be hidden to explain the answer."""
        return min(HIDDEN_WORDS, self._letters // _LETTERS_A_WORD)

    @property
    def _letters(self) -> int:
        return 0 if self.input is None else len(self.input.text) + len(self.input.text_pair or "")


@dataclass(slots=True, eq=False)
class Portion:
    """Neighbouring lines with the same options. since: when they were read, of `time.monotonic`.

    size: of its lines in bytes. tokens: a guess.
    """

    options: Options
    since: float
    items: list[Item] = field(default_factory=list)
    size: int = 0
    tokens: int = 0

    @property
    def deadline(self) -> float:
        return self.since + self.options.timeout_ms / 1000

    @property
    def most_items(self) -> int:
        """What makes a portion large enough."""
        return 1 if self.options.explain == "occlusion" else PORTION_LINES

    def add(self, item: Item) -> None:
        self.items.append(item)
        self.size += item.size
        rows = item.words + 1 if self.options.explain == "occlusion" else 1
        self.tokens += item.tokens * rows

    def rendered(self) -> Iterator[bytes]:
        """The lines of the answer, in pieces. Made when they are sent: one answer may be as large
        as thousands of texts."""
        pieces: list[bytes] = []
        size = 0
        for item in self.items:
            content = self._content(item)
            pieces += (content, b"\n")
            size += len(content)
            if size >= PIECE_BYTES:
                yield b"".join(pieces)
                pieces, size = [], 0
        if pieces:
            yield b"".join(pieces)

    def _content(self, item: Item) -> bytes:
        id = None if item.input is None else item.input.id
        if item.answer is None:
            assert item.fault is not None
            return error_line(item.fault, number=item.number, id=id)
        return orjson.dumps(result_of(item.answer, item.index, id, self.options.top_k))


class LineReader:
    """Reads lines as inputs with options.

    Args:
        query: what holds for lines that do not say otherwise.
        timeout_ms: of lines, if nothing says otherwise.
        max_bytes: of a line.
    """

    def __init__(self, query: StreamQuery, *, timeout_ms: int, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._adapter = query.adapter
        self.defaults = Options(
            query.top_k,
            query.truncate,
            query.explain or None,
            query.abstain_below,
            query.timeout_ms or timeout_ms,
        )

    def read(self, line: Line) -> tuple[Item, Options]:
        """A line's item, with its fault if it has one."""
        item = Item(line.number, line.size if line.content is not None else 0)
        try:
            if line.content is None:
                raise TooLarge(f"the line is longer than {self._max_bytes} bytes")
            content = parse_json(line.content, "line")
            if isinstance(content, str):
                content = {"text": content}
            elif not isinstance(content, dict):
                raise InvalidRequest(["line: expected a string or an object with `text`"])
            elif len(content) > 10 * _FIELDS:
                raise InvalidRequest([f"line: {len(content)} fields, far more than there are"])
            parsed = validated(StreamLine, content)
            adapter = parsed.adapter or self._adapter
            if adapter is None:
                raise InvalidRequest(["adapter: missing, and the URL names none"])
        except RequestError as error:
            item.fault = without_frames(error)
            return item, self.defaults
        item.input, item.adapter = parsed, adapter
        return item, self._options(parsed)

    def _options(self, line: StreamLine) -> Options:
        defaults = self.defaults
        return Options(
            line.top_k or defaults.top_k,
            defaults.truncate if line.truncate is None else line.truncate,
            defaults.explain if line.explain is None else line.explain or None,
            defaults.abstain_below if line.abstain_below is None else line.abstain_below,
            line.timeout_ms or defaults.timeout_ms,
        )


def error_line(error: Exception, *, number: int | None, id: str | None = None) -> bytes:
    """The shape of `schemas.StreamError`."""
    refusal = refusal_of(error)
    content = {
        "type": refusal.kind.type,
        "message": refusal.message,
        "details": list(refusal.details),
    }
    return orjson.dumps({"id": id, "line": number, "error": content})


def unanswered(items: Sequence[Item]) -> list[Item]:
    """Those that have neither an answer nor a fault."""
    return [item for item in items if item.answer is None and item.fault is None]
