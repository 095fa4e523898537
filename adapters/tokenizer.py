"""Text to token ids, for training and for serving. HTTP workers import this: no torch.

For a causal backbone `<|endoftext|>` follows every text, also the first one of a pair: its answer
is read at that token, so even an empty text has one.
"""

import hashlib
import json
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from adapters.errors import UncuttableText
from adapters.long_text import SLICE, Pipeline, Reader, Spans
from adapters.words import LocatedField, Word, words_of

T = TypeVar("T")
Ids: TypeAlias = npt.NDArray[np.int64]
# The end of a text that is cut off if the text is too long.
End: TypeAlias = Literal["head", "tail"]
# Work in pieces of a few milliseconds; it yields before each.
Steps: TypeAlias = Generator[None, None, T]


def result_of(steps: Steps[T]) -> T:
    """All steps one after the other."""
    while True:
        try:
            next(steps)
        except StopIteration as stop:
            value: T = stop.value
            return value


# Encoding a longer text whole takes longer than looking for the part that is read.
_SHORT = 2048
# Of two texts with more tokens than this nobody counts which one has more: the first one is taken
# to be no longer.
_COMPARED = 2**14

# The tokenizer's hash covers its vocabulary and the encodings of these texts: two tokenizers with
# one vocabulary may still behave differently.
_PROBES: tuple[tuple[str, str | None], ...] = (
    ("", None),
    ("The quick brown Fox jumps over 13 lazy dogs.", None),
    ("naïve café — “quotes”, £5, 東京, 🙂\tand\nlines", None),
    ("a premise", "and its hypothesis"),
)


# Not frozen: every process makes one for every text, and a frozen one takes four times as long.
@dataclass(slots=True, eq=False)
class Encoding:
    """Token ids of one text or pair, special tokens included.

    input_ids, token_type_ids: int64 [length]. truncated: the text did not fit.
    """

    input_ids: Ids
    token_type_ids: Ids
    truncated: bool

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass(frozen=True, slots=True)
class _Piece:
    """A part of the template: one special token, or all tokens of text 0 or 1."""

    text: int | None
    input_id: int
    token_type_id: int


class TextEncoder:
    """A Hugging Face fast tokenizer that truncates to any length, `longest_first`.

    The tokenizer does not truncate itself, because it also builds all that it cuts off. For a pair
    it combines every piece of one text with every piece of the other, so a few kilobytes of text
    would take minutes and gigabytes.
    """

    def __init__(self, tokenizer: Tokenizer, *, read_token: str | None = None) -> None:
        self._base = Tokenizer.from_str(tokenizer.to_str())
        self._base.no_truncation()
        self._base.no_padding()
        if read_token is not None:
            self._base.post_processor = TemplateProcessing(
                single=f"$A {read_token}",
                pair=f"$A {read_token} $B:1 {read_token}:1",
                special_tokens=[(read_token, self._base.token_to_id(read_token))],
            )
        self._single = _template(self._base.encode("a"))
        self._pair = _template(self._base.encode("a", "a"))
        self._frame = _frame_of(self._single)
        self._pipeline = Pipeline.of(self._base)
        self.sha256 = self._hash()

    def to_json(self) -> str:
        """For another process: `TextEncoder(Tokenizer.from_str(...))` is the same encoder.

        It contains the template with the read token.
        """
        return self._base.to_str()

    def encode(
        self, text: str, pair: str | None = None, *, max_length: int, cut: End = "tail"
    ) -> Encoding:
        """Encode a text or pair in at most `max_length` tokens; the longer text is cut first.

        Raises:
            UncuttableText: as `steps`.
        """
        texts = [text] if pair is None else [text, pair]
        if sum(map(len, texts)) > _SHORT:
            return result_of(self._read(texts, max_length, cut))
        encoded = [self._base.encode(each, add_special_tokens=False).ids for each in texts]
        return self._cut(encoded, max_length, cut)

    def encode_batch(
        self, texts: Sequence[tuple[str, str | None]], *, max_length: int, cut: End = "tail"
    ) -> list[Encoding]:
        """As `encode`, for many texts in the tokenizer's threads."""
        return result_of(self.steps([(*pair, max_length) for pair in texts], cut=cut))

    def steps(
        self, texts: Sequence[tuple[str, str | None, int]], *, cut: End = "tail"
    ) -> Steps[list[Encoding]]:
        """Encode texts or pairs, each in its own number of tokens, in pieces of bounded work.

        Between two pieces the caller may give up. What they cost depends on the tokens that are
        kept and not on the length of the texts.

        Raises:
            UncuttableText: a text that has too many characters and no place to divide them; see
            `adapters.long_text`.
        """
        encodings: list[Encoding | None] = [None] * len(texts)
        waiting: list[int] = []
        characters = 0
        for index, (text, pair, max_length) in enumerate(texts):
            length = len(text) + len(pair or "")
            if length > SLICE:
                each = [text] if pair is None else [text, pair]
                try:
                    encodings[index] = yield from self._read(each, max_length, cut)
                except UncuttableText as error:
                    error.index = index
                    raise
                continue
            waiting.append(index)
            characters += length
            if characters >= SLICE:
                yield
                self._encode_whole(texts, waiting, cut, encodings)
                waiting, characters = [], 0
        if waiting:
            yield
            self._encode_whole(texts, waiting, cut, encodings)
        return [encoding for encoding in encodings if encoding is not None]

    def count(self, text: str, pair: str | None = None, *, limit: int) -> Steps[int]:
        """How many tokens a text or pair has, special tokens included; `limit + 1` if it is more.

        Raises:
            UncuttableText: as `steps`.
        """
        template, total = self._single if pair is None else self._pair, 0
        total = sum(piece.text is None for piece in template)
        for each in [text] if pair is None else [text, pair]:
            reader = Reader(self._pipeline, each, "first")
            yield from reader.read(max(0, limit - total) + 1)
            total += len(reader)
        return min(total, limit + 1)

    def locate(
        self, text: str, pair: str | None = None, *, max_length: int, cut: End = "tail"
    ) -> Steps[list[LocatedField]]:
        """Where the tokens of `encode` are in a text, or in both texts of a pair.

        Raises:
            UncuttableText: as `steps`.
        """
        texts = [text] if pair is None else [text, pair]
        room = self._room(len(texts), max_length)
        if sum(map(len, texts)) > _SHORT:
            readers = yield from self._readers(texts, room, cut, locates=True)
            spans = [reader.spans(len(reader)) for reader in readers]
        else:
            yield
            encoded = [self._base.encode(each, add_special_tokens=False) for each in texts]
            spans = [np.array(each.offsets, np.int32).reshape(-1, 2) for each in encoded]
        kept = _shares(_counted(list(map(len, spans))), room)
        first, fields = 0, []
        for piece in self._single if pair is None else self._pair:
            if piece.text is None:
                first += 1
                continue
            share = kept[piece.text]
            fields.append(_located(texts[piece.text], first, spans[piece.text], share, cut))
            first += share
        return fields

    def words(
        self, texts: Sequence[str], fields: Sequence[LocatedField], encoding: Encoding
    ) -> list[list[Word]]:
        """The words of a text or of both texts of a pair, as far as they are read.

        Args:
            fields: of `locate`.
            encoding: of `encode`.
        """
        unknown = encoding.input_ids == (-1 if self.unknown_id is None else self.unknown_id)
        return [words_of(text, field, unknown) for text, field in zip(texts, fields, strict=True)]

    def count_unknown(self, encoding: Encoding) -> tuple[int, int]:
        """How many tokens stand for something that the vocabulary lacks, and how many are text."""
        text = ~np.isin(encoding.input_ids, self._special)
        unknown = 0
        if self.unknown_id is not None:
            unknown = int((encoding.input_ids == self.unknown_id).sum())
        return unknown, int(text.sum())

    @cached_property
    def _special(self) -> list[int]:
        """The ids of the template's special tokens."""
        return sorted({piece.input_id for piece in self._pair if piece.text is None})

    @cached_property
    def unknown_id(self) -> int | None:
        """The id of `[UNK]`; None for a tokenizer that reads every byte."""
        model = json.loads(self._base.to_str())["model"]
        if (token := model.get("unk_token")) is not None:
            return self._base.token_to_id(token)
        unknown: int | None = model.get("unk_id")
        return unknown

    def _encode_whole(
        self,
        texts: Sequence[tuple[str, str | None, int]],
        chosen: Sequence[int],
        cut: End,
        encodings: list[Encoding | None],
    ) -> None:
        """Encode the chosen texts, none of them long, in one call of the tokenizer."""
        flat = [text for index in chosen for text in texts[index][:2] if text is not None]
        encoded = iter(self._base.encode_batch_fast(flat, add_special_tokens=False))
        for index in chosen:
            text, pair, max_length = texts[index]
            ids = [next(encoded).ids for each in (text, pair) if each is not None]
            encodings[index] = self._cut(ids, max_length, cut)

    def _read(self, texts: list[str], max_length: int, cut: End) -> Steps[Encoding]:
        """Encode a long text or pair, reading no more of it than is kept."""
        room = self._room(len(texts), max_length)
        readers = yield from self._readers(texts, room, cut)
        lengths = _counted([len(reader) for reader in readers])
        kept = _shares(lengths, room)
        ids = [reader.ids(share) for reader, share in zip(readers, kept, strict=True)]
        return self._assemble(ids, max_length, truncated=sum(kept) < sum(lengths))

    def _readers(
        self, texts: list[str], room: int, cut: End, *, locates: bool = False
    ) -> Steps[list[Reader]]:
        """Readers that know as many tokens of every text as may be kept, and if it has more."""
        end: Literal["first", "last"] = "first" if cut == "tail" else "last"
        readers = [Reader(self._pipeline, text, end, locates=locates) for text in texts]
        for reader in readers:
            # One more than is kept tells that something is left out.
            yield from reader.read(room + 1)
        if len(readers) == 2 and room % 2:
            yield from _compare(readers)
        return readers

    def _cut(self, texts: list[list[int]], max_length: int, cut: End) -> Encoding:
        """Texts that were encoded whole."""
        if len(texts) == 1 and self._frame is not None:
            # Nearly every text: half the time of what follows.
            before, after, kind = self._frame
            room, own = max_length - len(before) - len(after), texts[0]
            if room >= 0:
                part = own
                if len(own) > room:
                    part = own[:room] if cut == "tail" else own[len(own) - room :]
                input_ids = np.array([*before, *part, *after], dtype=np.int64)
                # `np.full` takes five times as long.
                kinds = np.zeros(len(input_ids), dtype=np.int64)
                if kind:
                    kinds += kind
                return Encoding(input_ids, kinds, truncated=len(own) > room)
        lengths = _counted([len(text) for text in texts])
        kept = _shares(lengths, self._room(len(texts), max_length))
        ids = [
            text[:share] if cut == "tail" else text[len(text) - share :]
            for text, share in zip(texts, kept, strict=True)
        ]
        return self._assemble(ids, max_length, truncated=sum(kept) < sum(lengths))

    def _room(self, texts: int, max_length: int) -> int:
        """How many tokens are left beside the special ones."""
        template = self._single if texts == 1 else self._pair
        return max(0, max_length - sum(piece.text is None for piece in template))

    def _assemble(self, texts: list[list[int]], max_length: int, *, truncated: bool) -> Encoding:
        template = self._single if len(texts) == 1 else self._pair
        input_ids: list[int] = []
        token_type_ids: list[int] = []
        for piece in template:
            ids = [piece.input_id] if piece.text is None else texts[piece.text]
            input_ids += ids
            token_type_ids += [piece.token_type_id] * len(ids)
        # If not even the special tokens fit, they are cut as well.
        return Encoding(
            input_ids=np.array(input_ids[:max_length], dtype=np.int64),
            token_type_ids=np.array(token_type_ids[:max_length], dtype=np.int64),
            truncated=truncated or len(input_ids) > max_length,
        )

    def _hash(self) -> str:
        digest = hashlib.sha256()
        for token, index in sorted(self._base.get_vocab().items()):
            digest.update(f"{index} {token}\n".encode())
        for text, pair in _PROBES:
            encoded = self._base.encode(text, pair)
            digest.update(f"{encoded.ids} {encoded.type_ids}\n".encode())
        return digest.hexdigest()


def _located(text: str, first: int, spans: Spans, share: int, cut: End) -> LocatedField:
    """The part of a text's tokens that is kept. spans: of more tokens than that, if there are."""
    if share == len(spans):
        return LocatedField(first, spans, len(text))
    # A token at the border may be part of a character; something is left out in any case.
    kept = spans[:share] if cut == "tail" else spans[len(spans) - share :]
    if not share:
        read = 0
    elif cut == "tail":
        read = int(kept[:, 1].max())
    else:
        read = len(text) - int(kept[:, 0].min())
    return LocatedField(first, kept, min(read, len(text) - 1))


def _template(encoded: Any) -> tuple[_Piece, ...]:
    """The special tokens around texts, from an encoding of sample texts."""
    pieces: list[_Piece] = []
    for text, input_id, type_id in zip(
        encoded.sequence_ids, encoded.ids, encoded.type_ids, strict=True
    ):
        if text is None or all(piece.text != text for piece in pieces):
            pieces.append(_Piece(text, input_id, type_id))
    return tuple(pieces)


def _frame_of(single: Sequence[_Piece]) -> tuple[list[int], list[int], int] | None:
    """The ids before and after a text, and the type of all of them; None: there are several."""
    kinds = {piece.token_type_id for piece in single}
    (at,) = [index for index, piece in enumerate(single) if piece.text is not None]
    before, after = ([piece.input_id for piece in part] for part in (single[:at], single[at + 1 :]))
    return (before, after, kinds.pop()) if len(kinds) == 1 else None


def _compare(readers: Sequence[Reader]) -> Steps[None]:
    """Read on until it is known which of two texts has more tokens."""
    while True:
        unfinished = [reader for reader in readers if not reader.complete]
        finished = [len(reader) for reader in readers if reader.complete]
        if not unfinished or (finished and len(unfinished[0]) > finished[0]):
            return
        reader = min(unfinished, key=len)
        if len(reader) > _COMPARED:
            return
        yield from reader.read(len(reader) + _COMPARED // 16)


def _counted(lengths: list[int]) -> list[int]:
    return [_COMPARED] * len(lengths) if min(lengths) > _COMPARED else lengths


def _shares(lengths: list[int], room: int) -> list[int]:
    """How many tokens of each text are kept: the longer of two is cut until both are halves."""
    if len(lengths) == 1:
        return [min(lengths[0], room)]
    shorter, longer = sorted(lengths)
    if shorter + longer <= room:
        return lengths
    if 2 * shorter > room:
        shorter = room // 2
    longer = room - shorter
    return [shorter, longer] if lengths[0] <= lengths[1] else [longer, shorter]
