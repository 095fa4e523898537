"""Texts are truncated exactly as by the tokenizer itself, but in linear time."""

import random
import time
from typing import Any

import pytest
from tokenizers import Tokenizer

from adapters.tokenizer import End, TextEncoder
from tests.support.families import FAMILY_NAMES, backbone_of, gpt2_bytes, tokenizer_of

WORDS = ("good", "bad", "Café", "東京", "42", "!", "<pad>", "[SEP]", "<|endoftext|>", "\n", "🙂")


def encoder_of(family: str) -> TextEncoder:
    return backbone_of(family).encoder


@pytest.mark.slow
@pytest.mark.parametrize("family", [name for name in FAMILY_NAMES if name != "gpt2"])
def test_texts_are_cut_as_the_tokenizer_cuts_them(family: str) -> None:
    encoder, chosen = encoder_of(family), random.Random(0)
    own: Any = Tokenizer.from_str(tokenizer_of(family).backend_tokenizer.to_str())
    for _ in range(400):
        text, other = (" ".join(chosen.choices(WORDS, k=chosen.randrange(20))) for _ in range(2))
        pair = chosen.choice((None, other))
        max_length = chosen.choice((4, 5, 6, 7, 8, 13, 48))
        cut: End = chosen.choice(("head", "tail"))
        side = "right" if cut == "tail" else "left"
        own.enable_truncation(max_length, strategy="longest_first", direction=side)
        expected = own.encode(text, pair)
        encoding = encoder.encode(text, pair, max_length=max_length, cut=cut)
        assert encoding.input_ids.tolist() == expected.ids
        assert encoding.token_type_ids.tolist() == expected.type_ids
        assert encoding.truncated == bool(expected.overflowing)


def test_an_end_token_follows_every_text_of_a_causal_backbone() -> None:
    encoder = encoder_of("gpt2")
    end = gpt2_bytes().eos_token

    def tokens(*texts: str) -> list[str]:
        ids = encoder.encode(*texts, max_length=8).input_ids.tolist()
        return [encoder._base.id_to_token(each) or "" for each in ids]

    assert tokens("") == [end]
    assert tokens("go") == ["go", end]
    pair = tokens("go", "go go go go go go")
    assert [token == end for token in pair] == [False, True, *[False] * 5, True]


@pytest.mark.parametrize("family", FAMILY_NAMES)
@pytest.mark.parametrize("max_length", [2, 3, 4])
def test_no_encoding_is_longer_than_its_maximum(family: str, max_length: int) -> None:
    """Even if a pair's special tokens do not fit: a longer encoding would exceed the positions."""
    encoder = encoder_of(family)
    texts = (("good card", None), ("good card", "bad card"), ("", ""), ("good " * 99, ""))
    for text, pair in texts:
        encoding = encoder.encode(text, pair, max_length=max_length)
        assert 1 <= len(encoding) <= max_length
        assert len(encoding.input_ids) == len(encoding.token_type_ids)
        whole = encoder.encode(text, pair, max_length=10**6)
        assert encoding.truncated == (len(whole) > max_length)


def test_a_batch_has_the_encodings_of_its_texts_alone() -> None:
    encoder = encoder_of("bert")
    texts = [("a good card", None), ("", None), ("one", "two words"), ("bad " * 80, "free " * 80)]
    together = encoder.encode_batch(texts, max_length=24)
    for (text, pair), encoding in zip(texts, together, strict=True):
        alone = encoder.encode(text, pair, max_length=24)
        assert encoding.input_ids.tolist() == alone.input_ids.tolist()
        assert encoding.truncated == alone.truncated
    assert encoder.encode_batch([], max_length=24) == []


def test_two_long_texts_cost_no_more_than_their_tokens() -> None:
    """The tokenizer itself would combine every piece of one text with every piece of the other.

    Here that would be a minute and 20 GB.
    """
    encoder = encoder_of("bert")
    long = "good " * 4000
    started = time.perf_counter()
    assert len(encoder.encode(long, long, max_length=8)) == 8
    assert time.perf_counter() - started < 5


def test_the_hash_tells_tokenizers_apart_by_vocabulary_and_by_behaviour() -> None:
    tokenizer = tokenizer_of("bert").backend_tokenizer
    same = TextEncoder(tokenizer)
    cased: Any = Tokenizer.from_str(tokenizer.to_str())
    cased.normalizer.lowercase = False
    larger: Any = Tokenizer.from_str(tokenizer.to_str())
    larger.add_tokens(["entirely-new"])
    assert TextEncoder(tokenizer).sha256 == same.sha256
    assert len({same.sha256, TextEncoder(cased).sha256, TextEncoder(larger).sha256}) == 3


def test_the_callers_tokenizer_stays_as_it_was() -> None:
    tokenizer: Any = Tokenizer.from_str(tokenizer_of("bert").backend_tokenizer.to_str())
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=9)
    before = tokenizer.to_str()
    assert len(TextEncoder(tokenizer).encode("good bad card free", max_length=16)) == 6
    assert tokenizer.to_str() == before
