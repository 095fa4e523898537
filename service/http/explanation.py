"""What a result says about itself: which words of its text it comes from.

`attention` costs nothing: the weights from which the adapter's prompt was made. `occlusion` costs a
row for every word: how much the score of the label falls if the model does not see that word. These
rows are entries like any other, of the same request: admitted, queued and packed with everything
else. So neither changes the answer itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from adapters.format.spec import (
    AttentionPrompt,
    FirstTokenPrompt,
    GeneratorPooling,
    Prompt,
    RoutedPrompt,
)
from adapters.tokenizer import Encoding, Steps, TextEncoder
from adapters.words import LocatedField, Word
from service.client.types import Explain
from service.engine.interface import Entry, RowResult, cost_of
from service.errors import TooLarge
from service.http.answer_size import refuse_above
from service.http.texts import Text

# Of a text or a pair, so many words are hidden: its first ones.
HIDDEN_WORDS = 128
# `{"field":"text_pair","start":12345,"end":12345,"word":"...","weight":-0.0123456789,
# "unknown":false},` without the word, whose characters take up to six bytes.
_WORD_BYTES = 112
_CHARACTER_BYTES = 6
# The rest of an explanation, with a label of 256 characters.
_EACH_BYTES = 2048
_FIELDS = ("text", "text_pair")


class Place(NamedTuple):
    """A word, and which text of the input has it."""

    field: str
    word: Word


@dataclass(frozen=True, slots=True, eq=False)
class Located:
    """The words of one input, and how much of its texts was read."""

    places: Sequence[Place]
    read: Sequence[int]

    @property
    def nbytes(self) -> int:
        """At most, in an answer."""
        words = len(self.places) * _WORD_BYTES + sum(self.read) * _CHARACTER_BYTES
        return words + _EACH_BYTES


def locate(
    encoder: TextEncoder, texts: Sequence[Text], encodings: Sequence[Encoding]
) -> Steps[list[Located]]:
    """The words of every text, in pieces of bounded work. encodings: of the texts, cut at their
    tails; one object for a text that several adapters read alike."""
    found: dict[int, Located] = {}
    for text, encoding in zip(texts, encodings, strict=True):
        if id(encoding) in found:
            continue
        fields: list[LocatedField] = yield from encoder.locate(
            text.text, text.text_pair, max_length=text.spec.max_length
        )
        whole = [text.text] if text.text_pair is None else [text.text, text.text_pair]
        words = encoder.words(whole, fields, encoding)
        places = [
            Place(name, word) for name, each in zip(_FIELDS, words, strict=False) for word in each
        ]
        found[id(encoding)] = Located(places, [field.read for field in fields])
    return [found[id(encoding)] for encoding in encodings]


class Explanations:
    """The explanations of a request's texts.

    Args:
        most_hidden: words of all texts together that may be hidden.
        most_bytes: of the answer.

    Raises:
        TooLarge: more words than that, or the answer would be too large.
    """

    def __init__(
        self,
        kind: Explain,
        texts: Sequence[Text],
        encodings: Sequence[Encoding],
        located: Sequence[Located],
        *,
        most_hidden: int,
        most_bytes: int,
    ) -> None:
        refuse_above(
            sum(item.nbytes for item in located), most_bytes, "explain fewer inputs at once"
        )
        self.kind = kind
        self._texts, self._encodings, self._located = texts, encodings, located
        # Of each text: the words that are hidden, and the index of its first row among all.
        self._hidden: list[tuple[list[Place], int]] = []
        self._rows: Sequence[RowResult] = ()
        if kind == "occlusion":
            self._choose(most_hidden)

    @property
    def weighs_tokens(self) -> bool:
        """Whether the texts' own rows must have token weights."""
        return self.kind == "attention"

    def entries(self) -> list[Entry]:
        """The rows that are needed beside those of the texts."""
        entries = []
        # One object again for several adapters.
        without_word: dict[tuple[int, int], Encoding] = {}
        for text, encoding, (places, _) in zip(
            self._texts, self._encodings, self._hidden, strict=False
        ):
            for number, (_, word) in enumerate(places):
                hidden = without_word.get((id(encoding), number))
                if hidden is None:
                    hidden = without_word[id(encoding), number] = without(encoding, word)
                cost = cost_of(hidden, text.spec)
                entries.append(Entry(text.key, hidden, cost, counted=False))
        return entries

    def take(self, rows: Sequence[RowResult]) -> None:
        """The answers to the entries."""
        self._rows = rows

    def of(self, index: int, row: RowResult) -> dict[str, Any]:
        """One text's explanation, in the shape of `schemas.Explanation`. row: its own answer."""
        text, encoding, located = self._texts[index], self._encodings[index], self._located[index]
        best = int(row.scores.argmax())
        notes = []
        special: float | None = None
        places: Sequence[Place] = located.places
        weights: Sequence[float] = ()
        if self.kind == "occlusion":
            places, first = self._hidden[index]
            score = float(row.scores[best])
            rows = self._rows[first : first + len(places)]
            weights = [score - float(hidden.scores[best]) for hidden in rows]
            if len(places) < len(located.places):
                notes.append(
                    f"the first {len(places)} of {len(located.places)} words were hidden, "
                    "one at a time"
                )
        else:
            assert row.token_weights is not None, "the entry asked for them"
            shares: list[float] = row.token_weights.tolist()
            if (note := _note(text.spec.prompt)) is not None:
                notes.append(note)
            if not shares:
                places = ()
            else:
                weights = [sum(shares[token] for token in word.tokens) for _, word in places]
                special = max(0.0, sum(shares) - sum(weights))
        explanation: dict[str, Any] = {
            "kind": self.kind,
            "label": text.spec.labels[best],
            "words": [
                {
                    "field": field,
                    "start": word.start,
                    "end": word.end,
                    "word": _of_field(text, field)[word.start : word.end],
                    "weight": weight,
                    "unknown": word.unknown,
                }
                for (field, word), weight in zip(places, weights, strict=True)
            ],
            "special_tokens": {
                "count": len(encoding) - sum(len(word.tokens) for _, word in located.places),
                "weight": special,
            },
            "read": {
                "text": located.read[0],
                "text_pair": located.read[1] if len(located.read) == 2 else None,
            },
        }
        if notes:
            explanation["note"] = "; ".join(notes)
        return explanation

    def _choose(self, most: int) -> None:
        """
        Raises:
            TooLarge: more words than may be hidden.
        """
        total = 0
        for located in self._located:
            chosen = first_words(located.places, min(HIDDEN_WORDS, most))
            self._hidden.append((chosen, total))
            total += len(chosen)
        if total > most:
            raise TooLarge(
                f"{total} words would be hidden, at most {most} may be "
                "(IDSPAM_MAX_HIDDEN_WORDS): explain fewer inputs at once"
            )


def without(encoding: Encoding, word: Word) -> Encoding:
    """The text as if the word were not there."""
    tokens = list(word.tokens)
    return Encoding(
        np.delete(encoding.input_ids, tokens),
        np.delete(encoding.token_type_ids, tokens),
        encoding.truncated,
    )


def _of_field(text: Text, field: str) -> str:
    return text.text if field == _FIELDS[0] else text.text_pair or ""


def first_words(places: Sequence[Place], most: int) -> list[Place]:
    """The first words of a text; of a pair, half of them of each, or more if one has few."""
    if len(places) <= most:
        return list(places)
    first = [place for place in places if place.field == _FIELDS[0]]
    second = places[len(first) :]
    of_second = min(len(second), max(most // 2, most - len(first)))
    return [*first[: most - of_second], *second[:of_second]]


def _note(prompt: Prompt | None) -> str | None:
    """What the weights of this prompt's attention do not say; None: nothing is missing."""
    match prompt:
        case AttentionPrompt() if prompt.pooling is GeneratorPooling.ATTENTION:
            return None
        case AttentionPrompt() | RoutedPrompt():
            return "the prompt is made from the mean of all tokens, so all weigh the same"
        case FirstTokenPrompt():
            return "the prompt is made from the state of the first token, which has read the others"
    return 'the adapter makes no prompt from the text: ask for "occlusion"'
