"""Splits any number of inputs into requests of limited size.

The service counts `inputs.N` in an error from the first input of the request; `renumbered` counts
from the first input of the call.
"""

import re
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import msgspec

from service.client.errors import InvalidCall, Refused
from service.client.types import Answer, Input, Result, Text

T = TypeVar("T")

# Answers of one request, and requests in flight: enough to fill the service's batches (one runs
# while the next waits), and with 256 tokens a text still below what a service lets wait by default.
PER_REQUEST = 128
IN_FLIGHT = 6
# The default deadline of a request: it may have to wait for other requests of the same file.
TIMEOUT_MS = 600_000
# JSON takes at most six bytes a character, and a service accepts bodies of 8 MiB by default.
MAX_CHARACTERS = 2**20
_PLACE = re.compile(r"\binputs\.(\d+)")


@dataclass(frozen=True, slots=True)
class Chunk:
    """The inputs of one request. first: how many inputs came before them."""

    first: int
    inputs: tuple[Text, ...]


class _Chunker:
    """Collects inputs until their answers fill a request.

    Args:
        each: the answers of an input that names no adapter.
    """

    def __init__(self, per_request: int, each: int) -> None:
        self._per_request = per_request
        self._each = each
        self._first = self._characters = self._answers = 0
        self._inputs: list[Text] = []

    def add(self, text: Text) -> Iterator[Chunk]:
        """Take an input; yields the chunks that it completes."""
        size, answers = _characters(text), answers_of(text, self._each)
        if self._inputs and (
            self._characters + size > MAX_CHARACTERS or self._answers + answers > self._per_request
        ):
            yield from self.rest()
        self._inputs.append(text)
        self._characters += size
        self._answers += answers
        if self._answers >= self._per_request:
            yield from self.rest()

    def rest(self) -> Iterator[Chunk]:
        """Yields a chunk of the inputs that are left, if any are."""
        if self._inputs:
            chunk = Chunk(self._first, tuple(self._inputs))
            self._first += len(self._inputs)
            self._characters, self._answers, self._inputs = 0, 0, []
            yield chunk


def answers_of(text: Text, each: int) -> int:
    """How many answers an input gets. each: where it names no adapter of its own."""
    if isinstance(text, str):
        return each
    return (
        len(text.adapters) if text.adapters is not None else 1 if text.adapter is not None else each
    )


def fault_last(items: Iterable[T]) -> Iterator[T | Exception]:
    """The items. An error of theirs comes as the last one, so that what was read before it is
    answered first."""
    try:
        yield from items
    except Exception as error:
        yield error


def chunks_of(
    inputs: Iterable[Text], *, per_request: int, each: int = 1
) -> Iterator[Chunk | Exception]:
    """Reads no more inputs than the next chunk needs. An error of the inputs comes last, as of
    `fault_last`.

    Args:
        per_request: answers, unless a single input has more.
        each: the answers of an input that names no adapter.
    """
    chunker = _Chunker(per_request, each)
    fault: Exception | None = None
    try:
        for text in inputs:
            yield from chunker.add(text)
    except Exception as error:
        fault = error
    yield from chunker.rest()
    if fault is not None:
        yield fault


async def achunks_of(
    inputs: Iterable[Text] | AsyncIterable[Text], *, per_request: int, each: int = 1
) -> AsyncIterator[Chunk | Exception]:
    """As `chunks_of`, for either kind of iterable."""
    chunker = _Chunker(per_request, each)
    fault: Exception | None = None
    try:
        async for text in one_by_one(inputs):
            for chunk in chunker.add(text):
                yield chunk
    except Exception as error:
        fault = error
    for chunk in chunker.rest():
        yield chunk
    if fault is not None:
        yield fault


async def one_by_one(inputs: Iterable[Text] | AsyncIterable[Text]) -> AsyncIterator[Text]:
    """The inputs of either kind of iterable."""
    if isinstance(inputs, AsyncIterable):
        async for text in inputs:
            yield text
    else:
        for text in inputs:
            yield text


def check_many(inputs: Iterable[Text] | AsyncIterable[Text]) -> None:
    """
    Raises:
        InvalidCall: a single text.
    """
    if isinstance(inputs, (str, Input)):
        raise InvalidCall("inputs: one text; this takes many, predict takes one")


def check_sizes(
    inputs: Iterable[Text] | AsyncIterable[Text],
    *,
    per_request: int,
    in_flight: int,
    connections: int,
) -> None:
    """
    Raises:
        InvalidCall: a single text, or numbers that are out of range.
    """
    check_many(inputs)
    if per_request < 1:
        raise InvalidCall(f"per_request is {per_request}, expected 1 or more")
    if not 1 <= in_flight <= connections:
        raise InvalidCall(
            f"in_flight is {in_flight}, expected 1 to {connections}, the client's connections"
        )


def results_of(answer: Answer, first: int) -> Iterator[Result]:
    """The results of a chunk, with their inputs counted from the first of the call."""
    for result in answer:
        if result.input is not None and first:
            result = msgspec.structs.replace(result, input=first + result.input)
        yield result


def renumbered(error: Refused, first: int) -> Refused:
    """The same error, with its inputs counted from the first of the call."""

    def shift(text: str) -> str:
        return _PLACE.sub(lambda place: f"inputs.{first + int(place[1])}", text)

    return type(error)(
        error.status,
        type=error.type,
        message=shift(error.message),
        details=[shift(detail) for detail in error.details],
        request_id=error.request_id,
        retry_after=error.retry_after,
    )


def _characters(text: Text) -> int:
    match text:
        case str():
            return len(text)
        case Input():
            return len(text.text) + len(text.text_pair or "")
        case _:
            raise InvalidCall(f"{type(text).__name__} among the inputs, expected str or Input")
