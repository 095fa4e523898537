"""A long text has the tokens that it has whole, at both of its ends, in the smallest windows."""

from functools import cache
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from adapters import long_text
from adapters.errors import UncuttableText
from adapters.long_text import LONGEST_STRETCH, Pipeline, Reader
from adapters.tokenizer import End, TextEncoder, result_of
from adapters.words import LocatedField, Word, words_of
from tests.support.odd_texts import odd_texts
from tests.support.tokenizers import KINDS, tiny_tokenizer


@cache
def pipeline_of(kind: str) -> Pipeline:
    return Pipeline.of(tiny_tokenizer(kind))


def whole(kind: str, text: str) -> list[int]:
    ids: list[int] = tiny_tokenizer(kind).encode(text, add_special_tokens=False).ids
    return ids


def words(text: str, spans: Any) -> list[Word]:
    """The words that tokens at these places make."""
    places = np.array(spans, np.int32).reshape(-1, 2)
    return words_of(text, LocatedField(0, places, len(text)), np.zeros(len(places), np.bool_))


def read(kind: str, text: str, count: int, end: Literal["first", "last"]) -> Reader:
    reader = Reader(pipeline_of(kind), text, end, locates=True)
    for _ in reader.read(count):
        pass
    return reader


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows of a few letters, so that a short text has many of them."""
    monkeypatch.setattr(long_text, "SLICE", 24)
    monkeypatch.setattr(long_text, "_FIRST_WINDOW", 3)
    monkeypatch.setattr(long_text, "_CHARACTERS_A_TOKEN", 1)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_tokenizer_is_known(kind: str) -> None:
    assert pipeline_of(kind).cut is not None


@pytest.mark.slow
@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=120, deadline=None)
@given(text=odd_texts, count=st.integers(0, 30), end=st.sampled_from(("first", "last")))
def test_a_part_of_a_text_has_the_tokens_of_the_whole(
    kind: str, text: str, count: int, end: Literal["first", "last"]
) -> None:
    expected = whole(kind, text)
    reader = read(kind, text, count, end)
    known = reader.ids(10**6)
    assert known == (
        expected[: len(known)] if end == "first" else expected[len(expected) - len(known) :]
    )
    assert len(reader) >= min(count, len(expected))
    # The token at the border may be a part of a longer unknown word.
    inside = slice(None) if reader.complete else slice(-1) if end == "first" else slice(1, None)
    places = tiny_tokenizer(kind).encode(text, add_special_tokens=False).offsets
    places = places[: len(known)] if end == "first" else places[len(places) - len(known) :]
    assert words(text, reader.spans(10**6)[inside]) == words(text, places[inside])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["default", "byte-level", "unigram"])
@settings(max_examples=60, deadline=None)
@given(
    text=odd_texts,
    pair=st.one_of(st.none(), odd_texts),
    times=st.integers(1, 400),
    max_length=st.integers(2, 40),
    cut=st.sampled_from(("head", "tail")),
)
def test_pairs_are_cut_alike_whether_whole_or_in_windows(
    kind: str, text: str, pair: str | None, times: int, max_length: int, cut: End
) -> None:
    """Whole is what the tokenizer's own threads do with texts that are not long."""
    encoder = encoder_of(kind)
    text = text * times if len(text) * times < 3000 else text
    each = [text] if pair is None else [text, pair]
    read = result_of(encoder._read(each, max_length, cut))
    (whole,) = encoder.encode_batch([(text, pair)], max_length=max_length, cut=cut)
    assert read.input_ids.tolist() == whole.input_ids.tolist()
    assert read.token_type_ids.tolist() == whole.token_type_ids.tolist()
    assert read.truncated == whole.truncated


@cache
def encoder_of(kind: str) -> TextEncoder:
    tokenizer = Tokenizer.from_str(tiny_tokenizer(kind).to_str())
    first, last = (tokenizer.token_to_id(name) is not None for name in ("[CLS]", "<s>"))
    start, end = ("[CLS]", "[SEP]") if first else ("<s>", "</s>")
    assert first or last
    tokenizer.post_processor = TemplateProcessing(
        single=f"{start} $A {end}",
        # Two special tokens more than the single one: an odd room, and an even one.
        pair=f"{start} $A {end} $B:1 {end}:1",
        special_tokens=[(name, tokenizer.token_to_id(name)) for name in (start, end)],
    )
    return TextEncoder(tokenizer)


def test_a_tokenizer_with_words_across_spaces_is_read_whole() -> None:
    tokenizer = Tokenizer.from_str(tiny_tokenizer("wordpiece").to_str())
    tokenizer.add_tokens(["New York"])
    assert Pipeline.of(tokenizer).cut is None
    text = "a New York card. " * 3000
    encoder = TextEncoder(tokenizer)
    short, whole = (encoder.encode(text, max_length=size) for size in (64, 10**6))
    assert short.input_ids.tolist()[:-1] == whole.input_ids.tolist()[: len(short) - 1]
    with pytest.raises(UncuttableText):
        encoder.encode("a New York card. " * 10_000, max_length=64)


def test_a_text_is_refused_that_has_no_place_to_divide_it() -> None:
    encoder = encoder_of("byte-level")
    text = "\u0301" * (LONGEST_STRETCH + 3 * long_text.SLICE)
    with pytest.raises(UncuttableText) as refused:
        encoder.encode_batch([("fine", None), ("a " * 9999, None), (text, None)], max_length=16)
    assert refused.value.index == 2


def test_the_count_of_tokens_ends_at_its_limit() -> None:
    encoder = encoder_of("default")
    assert result_of(encoder.count("a " * 50_000, limit=1000)) == 1001
    assert result_of(encoder.count("a " * 500, "b", limit=1000)) == 504
