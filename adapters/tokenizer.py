"""Text to token ids, the same way for training and serving. Knows no model.

A causal backbone gets `<|endoftext|>` behind every text: that is the token its answer is read at, so that an empty
text has one too, and between the two texts of a pair.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

Ids: TypeAlias = npt.NDArray[np.int64]

# What the tokenizer's hash is taken over besides its vocabulary: it must behave the same, not only hold the same words.
_PROBES: tuple[tuple[str, str | None], ...] = (
    ("", None),
    ("The quick brown Fox jumps over 13 lazy dogs.", None),
    ("naïve café — “quotes”, £5, 東京, 🙂\tand\nlines", None),
    ("a premise", "and its hypothesis"),
)


@dataclass(frozen=True, slots=True)
class Encoding:
    """Token ids of one text or pair, special tokens included.

    `input_ids`, `token_type_ids`: int64 [length]. `truncated` says that the text did not fit.
    """

    input_ids: Ids
    token_type_ids: Ids
    truncated: bool

    def __len__(self) -> int:
        return len(self.input_ids)


class TextEncoder:
    """A Hugging Face fast tokenizer with one truncating copy for every maximum length in use."""

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
        self._by_length: dict[int, Tokenizer] = {}
        self.sha256 = self._hash()

    def encode(self, text: str, pair: str | None = None, *, max_length: int) -> Encoding:
        """Encode one text or pair into at most `max_length` tokens; the longer text of a pair is cut first."""
        return _encoding(self._truncating(max_length).encode(text, pair))

    def encode_batch(self, texts: Sequence[tuple[str, str | None]], *, max_length: int) -> list[Encoding]:
        """The same for many, spread over the tokenizer's threads."""
        inputs = [text if pair is None else (text, pair) for text, pair in texts]
        return [_encoding(item) for item in self._truncating(max_length).encode_batch(inputs)]

    def tokens(self, encoding: Encoding) -> list[str]:
        """The token strings, for showing which of them made a prompt."""
        return [self._base.id_to_token(int(item)) for item in encoding.input_ids]

    def _truncating(self, max_length: int) -> Tokenizer:
        tokenizer = self._by_length.get(max_length)
        if tokenizer is None:
            tokenizer = Tokenizer.from_str(self._base.to_str())
            tokenizer.enable_truncation(max_length, strategy="longest_first")
            self._by_length[max_length] = tokenizer
        return tokenizer

    def _hash(self) -> str:
        digest = hashlib.sha256()
        for token, index in sorted(self._base.get_vocab().items()):
            digest.update(f"{index} {token}\n".encode())
        for text, pair in _PROBES:
            encoded = self._base.encode(text, pair)
            digest.update(f"{encoded.ids} {encoded.type_ids}\n".encode())
        return digest.hexdigest()


def _encoding(item: object) -> Encoding:
    return Encoding(
        input_ids=np.array(item.ids, dtype=np.int64),  # type: ignore[attr-defined]  # tokenizers.Encoding is untyped
        token_type_ids=np.array(item.type_ids, dtype=np.int64),  # type: ignore[attr-defined]  # as above
        truncated=bool(item.overflowing),  # type: ignore[attr-defined]  # as above
    )
