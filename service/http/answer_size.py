"""An answer that would be too large is refused before anything is computed.

A request of one kilobyte can ask for gigabytes: 256 empty texts times 4,096 labels of 256 letters.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import orjson

from adapters.format.spec import AdapterSpec
from service.errors import TooLarge

# Of a label in JSON, where a character takes up to six bytes, with its quotes.
_LONGEST_LABEL = 6 * 256 + 2
# Name, revision, numbers and the JSON between them.
_EACH_TEXT = 400


class HasSpec(Protocol):
    @property
    def spec(self) -> AdapterSpec: ...


@dataclass(frozen=True, slots=True)
class AnswerShape:
    """What a protocol writes for every text.

    score: bytes beside the label for each score. labels: whether each score names its label.
    top_k: only so many scores. advice: what makes the answer smaller.
    """

    score: int
    labels: bool
    top_k: int | None = None
    advice: str = "send fewer inputs"


def refuse_large_answer(texts: Sequence[HasSpec], shape: AnswerShape, limit: int) -> None:
    """
    Raises:
        TooLarge: the answer may have more than `limit` bytes.
    """
    # Far too much, but enough for nearly every request, and it takes a microsecond.
    label = _LONGEST_LABEL * (2 if shape.labels else 0) + shape.score
    most = max((len(text.spec.labels) for text in texts), default=0)
    if len(texts) * (_EACH_TEXT + _LONGEST_LABEL + most * label) <= limit:
        return
    sizes: dict[int, int] = {}
    total = 0
    for text in texts:
        size = sizes.get(id(text.spec))
        if size is None:
            size = sizes[id(text.spec)] = _size(text.spec, shape)
        total += size
    refuse_above(total, limit, shape.advice)


def refuse_above(total: int, limit: int, advice: str) -> None:
    """
    Raises:
        TooLarge: the answer would have more bytes than its limit.
    """
    if total > limit:
        raise TooLarge(
            f"the answer would have about {total} bytes, at most {limit} are allowed: {advice}"
        )


def _size(spec: AdapterSpec, shape: AnswerShape) -> int:
    """Most bytes of one text's answer."""
    labels = sorted((len(orjson.dumps(label)) for label in spec.labels), reverse=True)
    shown = labels[: shape.top_k]
    total = _EACH_TEXT + labels[0] + len(shown) * shape.score
    if shape.labels:
        total += sum(shown)
        # And the labels whose scores reach their thresholds.
        total += sum(labels) if spec.multi_label else 0
    return total
