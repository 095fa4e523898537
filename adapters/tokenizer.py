"""Text to token ids, for training and for serving. HTTP workers import this: no torch.

For a causal backbone `<|endoftext|>` follows every text, also the first one of a pair: its answer
is read at that token, so even an empty text has one.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

Ids: TypeAlias = npt.NDArray[np.int64]
# The end of a text that is cut off if the text is too long.
End: TypeAlias = Literal["head", "tail"]

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
        self.sha256 = self._hash()

    def to_json(self) -> str:
        """For another process: `TextEncoder(Tokenizer.from_str(...))` is the same encoder.

        It contains the template with the read token.
        """
        return self._base.to_str()

    def encode(
        self, text: str, pair: str | None = None, *, max_length: int, cut: End = "tail"
    ) -> Encoding:
        """Encode a text or pair in at most `max_length` tokens; the longer text is cut first."""
        texts = [text] if pair is None else [text, pair]
        encoded = [self._base.encode(each, add_special_tokens=False).ids for each in texts]
        return self._assemble(encoded, max_length, cut)

    def encode_batch(
        self, texts: Sequence[tuple[str, str | None]], *, max_length: int, cut: End = "tail"
    ) -> list[Encoding]:
        """As `encode`, for many texts in the tokenizer's threads."""
        flat = [text for pair in texts for text in pair if text is not None]
        encoded = iter(self._base.encode_batch_fast(flat, add_special_tokens=False))
        return [
            self._assemble(
                [next(encoded).ids for text in pair if text is not None], max_length, cut
            )
            for pair in texts
        ]

    def tokens(self, encoding: Encoding) -> list[str]:
        """The token strings, to show which of them made a prompt."""
        return [self._base.id_to_token(int(token)) or "" for token in encoding.input_ids]

    def _assemble(self, texts: list[list[int]], max_length: int, cut: End) -> Encoding:
        template = self._single if len(texts) == 1 else self._pair
        room = max_length - sum(piece.text is None for piece in template)
        kept = _shares([len(text) for text in texts], max(room, 0))
        truncated = [
            text[: kept[index]] if cut == "tail" else text[len(text) - kept[index] :]
            for index, text in enumerate(texts)
        ]
        input_ids: list[int] = []
        token_type_ids: list[int] = []
        for piece in template:
            ids = [piece.input_id] if piece.text is None else truncated[piece.text]
            input_ids += ids
            token_type_ids += [piece.token_type_id] * len(ids)
        # If not even the special tokens fit, they are cut as well.
        return Encoding(
            input_ids=np.array(input_ids[:max_length], dtype=np.int64),
            token_type_ids=np.array(token_type_ids[:max_length], dtype=np.int64),
            truncated=len(input_ids) > max_length or sum(kept) < sum(map(len, texts)),
        )

    def _hash(self) -> str:
        digest = hashlib.sha256()
        for token, index in sorted(self._base.get_vocab().items()):
            digest.update(f"{index} {token}\n".encode())
        for text, pair in _PROBES:
            encoded = self._base.encode(text, pair)
            digest.update(f"{encoded.ids} {encoded.type_ids}\n".encode())
        return digest.hexdigest()


def _template(encoded: Any) -> tuple[_Piece, ...]:
    """The special tokens around texts, from an encoding of sample texts."""
    pieces: list[_Piece] = []
    for text, input_id, type_id in zip(
        encoded.sequence_ids, encoded.ids, encoded.type_ids, strict=True
    ):
        if text is None or all(piece.text != text for piece in pieces):
            pieces.append(_Piece(text, input_id, type_id))
    return tuple(pieces)


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
