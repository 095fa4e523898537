"""Random texts with the lengths of short messages."""

import random
from collections.abc import Sequence

from transformers import AutoTokenizer

from adapters.tokenizer import Encoding, TextEncoder
from benchmarks.shapes import place_of

MAX_TOKENS = 250
# Standard deviation of the logarithm of the lengths.
_SPREAD = 0.7


def words_of(source: str) -> list[str]:
    """The plain words that a backbone's tokenizer has one token for. source: a path or a name."""
    place = place_of(source)
    pieces = list(AutoTokenizer.from_pretrained(place).get_vocab())
    # Byte-level vocabularies mark what starts a word, WordPiece what continues one.
    marked = [piece[1:] for piece in pieces if piece.startswith("Ġ")]
    words = marked or [piece for piece in pieces if not piece.startswith("##")]
    return sorted(word for word in words if word.isascii() and word.isalpha() and len(word) > 2)


def make_texts(words: Sequence[str], *, count: int, mean_tokens: float, seed: int = 0) -> list[str]:
    """Texts of random words; a word is a token.

    Lengths are log-normal with mean `mean_tokens`, special tokens included, and at most MAX_TOKENS.
    The longest of 500 texts with mean 39 has about 220.
    """
    rng = random.Random(seed)
    middle = (mean_tokens - 2) / 2.718281828 ** (_SPREAD**2 / 2)
    lengths = [
        min(max(1, round(middle * rng.lognormvariate(0, _SPREAD))), MAX_TOKENS - 2)
        for _ in range(count)
    ]
    return [" ".join(rng.choices(words, k=length)) for length in lengths]


def make_encodings(
    encoder: TextEncoder, words: Sequence[str], *, count: int, mean_tokens: float, seed: int = 0
) -> list[Encoding]:
    """`make_texts`, tokenised."""
    texts = make_texts(words, count=count, mean_tokens=mean_tokens, seed=seed)
    return encoder.encode_batch([(text, None) for text in texts], max_length=256)


def encodings_of_length(
    encoder: TextEncoder, words: Sequence[str], *, count: int, tokens: int
) -> list[Encoding]:
    """Different texts of exactly this many tokens, special ones included."""
    rng = random.Random(0)
    texts = [" ".join(rng.choices(words, k=tokens)) for _ in range(count)]
    return encoder.encode_batch([(text, None) for text in texts], max_length=tokens)
