"""Any number of inputs cut into requests: bounded in texts and characters. Does no input or output.

`inputs.N` in an error of the service counts within its request; `counted_on` counts from the first
input of all.
"""

import re
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator
from dataclasses import dataclass

from service.client.errors import InvalidCall, Refused
from service.client.types import Input, Text

# Texts of one request, and requests in flight: forward passes are full, one runs and one waits
# behind it, and texts of 256 tokens each are still less than a service lets wait by default.
PER_REQUEST = 128
IN_FLIGHT = 6
# Deadline of a request where the caller names none: what waits behind other requests of the same
# file is not late.
TIMEOUT_MS = 600_000
# As JSON a character takes six bytes at most, and a service takes bodies of 8 MiB by default.
MAX_CHARACTERS = 2**20
_PLACE = re.compile(r"\binputs\.(\d+)")


@dataclass(frozen=True, slots=True)
class Portion:
    """The inputs of one request. first: how many came before them."""

    first: int
    inputs: tuple[Text, ...]


class Portions:
    """Collects inputs until they are a request's worth."""

    def __init__(self, per_request: int) -> None:
        self._per_request = per_request
        self._first = self._characters = 0
        self._inputs: list[Text] = []

    def add(self, item: Text) -> Iterator[Portion]:
        """Take an input; yields what is full then."""
        size = _characters(item)
        if self._inputs and self._characters + size > MAX_CHARACTERS:
            yield from self.rest()
        self._inputs.append(item)
        self._characters += size
        if len(self._inputs) == self._per_request:
            yield from self.rest()

    def rest(self) -> Iterator[Portion]:
        """Yields what has been taken and was not yielded."""
        if self._inputs:
            portion = Portion(self._first, tuple(self._inputs))
            self._first += len(self._inputs)
            self._characters, self._inputs = 0, []
            yield portion


def portions_of(inputs: Iterable[Text], *, per_request: int) -> Iterator[Portion]:
    """Looks at no more inputs than the next portion needs."""
    portions = Portions(per_request)
    for item in inputs:
        yield from portions.add(item)
    yield from portions.rest()


async def aportions_of(
    inputs: Iterable[Text] | AsyncIterable[Text], *, per_request: int
) -> AsyncIterator[Portion]:
    """As `portions_of`, of either kind of iterable."""
    portions = Portions(per_request)
    if isinstance(inputs, AsyncIterable):
        async for item in inputs:
            for portion in portions.add(item):
                yield portion
    else:
        for item in inputs:
            for portion in portions.add(item):
                yield portion
    for portion in portions.rest():
        yield portion


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
    if isinstance(inputs, (str, Input)):
        raise InvalidCall("inputs: one text; classify takes many, predict takes one")
    if per_request < 1:
        raise InvalidCall(f"per_request is {per_request}, expected 1 or more")
    if not 1 <= in_flight <= connections:
        raise InvalidCall(
            f"in_flight is {in_flight}, expected 1 to {connections}, the client's connections"
        )


def counted_on(error: Refused, first: int) -> Refused:
    """The same error; its inputs are counted from the first of all."""

    def moved(text: str) -> str:
        return _PLACE.sub(lambda found: f"inputs.{first + int(found[1])}", text)

    return type(error)(
        error.status,
        type=error.type,
        message=moved(error.message),
        details=[moved(item) for item in error.details],
        request_id=error.request_id,
        retry_after=error.retry_after,
    )


def _characters(item: Text) -> int:
    match item:
        case str():
            return len(item)
        case Input():
            return len(item.text) + len(item.text_pair or "")
        case _:
            raise InvalidCall(f"{type(item).__name__} among the inputs, expected str or Input")
