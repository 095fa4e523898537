"""Words are slices of the text as it was sent, put together from the tokens that were read."""

from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from adapters.tokenizer import End, TextEncoder, result_of
from adapters.words import LocatedField, Word
from tests.support.families import FAMILY_NAMES, backbone_of
from tests.support.odd_texts import odd_texts
from tests.support.tokenizers import KINDS, tiny_tokenizer


@cache
def encoder_of(kind: str) -> TextEncoder:
    tokenizer = Tokenizer.from_str(tiny_tokenizer(kind).to_str())
    start, end = ("[CLS]", "[SEP]") if tokenizer.token_to_id("[CLS]") else ("<s>", "</s>")
    tokenizer.post_processor = TemplateProcessing(
        single=f"{start} $A {end}",
        pair=f"{start} $A {end} $B:1 {end}:1",
        special_tokens=[(name, tokenizer.token_to_id(name)) for name in (start, end)],
    )
    return TextEncoder(tokenizer)


def words_of(
    encoder: TextEncoder,
    text: str,
    pair: str | None = None,
    *,
    max_length: int = 10**6,
    cut: End = "tail",
) -> tuple[list[LocatedField], list[list[Word]]]:
    texts = [text] if pair is None else [text, pair]
    encoding = encoder.encode(text, pair, max_length=max_length, cut=cut)
    fields = result_of(encoder.locate(text, pair, max_length=max_length, cut=cut))
    return fields, encoder.words(texts, fields, encoding)


def shown(kind: str, text: str) -> list[str]:
    _, (words,) = words_of(encoder_of(kind), text)
    return [text[word.start : word.end] for word in words]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150, deadline=None)
@given(
    text=odd_texts,
    pair=st.one_of(st.none(), odd_texts),
    times=st.sampled_from((1, 1, 1, 100)),
    max_length=st.one_of(st.integers(2, 40), st.just(10**6)),
    cut=st.sampled_from(("head", "tail")),
)
def test_words_are_in_order_in_bounds_and_apart_and_have_every_token_that_can_be_seen(
    kind: str, text: str, pair: str | None, times: int, max_length: int, cut: End
) -> None:
    encoder = encoder_of(kind)
    if len(text) * times < 4000:
        text = text * times
    encoding = encoder.encode(text, pair, max_length=max_length, cut=cut)
    fields, words = words_of(encoder, text, pair, max_length=max_length, cut=cut)
    texts = [text] if pair is None else [text, pair]
    assert len(fields) == len(words) == len(texts)
    taken: set[int] = set()
    for each, field, found in zip(texts, fields, words, strict=True):
        (whole,) = encoder.encode_batch([(each, None)], max_length=10**6)
        assert 0 <= field.read <= len(each)
        inner = whole.input_ids[1:-1].tolist()
        kept = encoding.input_ids[field.first : field.first + len(field.spans)].tolist()
        assert kept == (inner[: len(kept)] if cut == "tail" else inner[len(inner) - len(kept) :])
        assert (field.read == len(each)) == (len(kept) == len(inner))
        end = 0
        for word in found:
            assert end <= word.start < word.end <= len(each)
            part = each[word.start : word.end]
            assert part == part.strip()
            end = word.end
            assert word.tokens
            assert not taken & set(word.tokens)
            taken |= set(word.tokens)
        for index, (start, stop) in enumerate(field.spans.tolist(), field.first):
            if each[start:stop].strip():
                (holder,) = (word for word in found if index in word.tokens)
                piece = each[start:stop]
                assert holder.start <= stop - len(piece.lstrip())
                assert start + len(piece.rstrip()) <= holder.end
        assert all(index in taken for index in range(field.first, field.first + len(kept))) or (
            not found
        )
    spots = {field.first + index for field in fields for index in range(len(field.spans))}
    assert taken <= spots


@pytest.mark.parametrize("kind", KINDS)
def test_every_tokenizer_has_the_same_words(kind: str) -> None:
    text = " WINNER!!! it's  the\tcat, 1,999.50 is snake_case; don\u2019t  "
    expected = ["WINNER", "!!!", "it's", "the", "cat", ",", "1,999.50", "is", "snake_case"]
    assert shown(kind, text) == [*expected, ";", "don\u2019t"]


@pytest.mark.parametrize("kind", KINDS)
def test_marks_stay_with_their_letters_and_signs_in_one_piece(kind: str) -> None:
    text = "cafe\u0301s e\u0301 क्षि 👩\u200d👧 👍🏽 🇩🇪"
    assert shown(kind, text) == text.split()


@pytest.mark.parametrize("kind", ["default", "wordpiece", "unigram", "byte-level"])
def test_ideographs_are_words_of_their_own_where_the_tokenizer_has_them(kind: str) -> None:
    words = shown(kind, "東京 a。が")
    assert "".join(words) == "東京a。が"
    # The little byte-level vocabulary has half of each.
    assert words[:2] == (["東京", "a"] if kind == "byte-level" else ["東", "京"])


def test_what_the_vocabulary_lacks_is_marked() -> None:
    text = "win 東 win!"
    for kind, unknown in (("wordpiece", ["東"]), ("byte-level", [])):
        _, (words,) = words_of(encoder_of(kind), text)
        assert [text[word.start : word.end] for word in words if word.unknown] == unknown


def test_white_space_belongs_to_the_word_after_it_and_at_the_end_to_the_one_before() -> None:
    encoder = encoder_of("byte-level")
    text = "\n\n a \n"
    _, (words,) = words_of(encoder, text)
    assert [text[word.start : word.end] for word in words] == ["a"]
    assert words[0].tokens == tuple(range(1, len(encoder.encode(text, max_length=99)) - 1))
    _, (words,) = words_of(encoder, " \n ")
    assert words == []


def test_a_cut_text_says_how_much_of_each_part_was_read() -> None:
    encoder = encoder_of("default")
    fields, words = words_of(encoder, "one two three four", "five", max_length=6)
    assert [field.read for field in fields] == [len("one two"), len("five")]
    assert [len(each) for each in words] == [2, 1]
    # Three special tokens, two words, one.
    assert [field.first for field in fields] == [1, 4]
    assert [words[0][1].tokens, words[1][0].tokens] == [(2,), (4,)]


def test_a_long_text_is_located_without_reading_all_of_it() -> None:
    text = "  a\u3000b" + " " * 100_000 + "cat" + " x" * 2_000_000
    encoder = encoder_of("default")
    (field,), (words,) = words_of(encoder, text, max_length=6)
    assert [text[word.start : word.end] for word in words] == ["a", "b", "cat", "x"]
    assert words[2].start == 5 + 100_000
    assert field.read == words[3].end


def test_a_word_that_is_too_long_for_the_tokenizer_is_one_unknown_word() -> None:
    text = "a " + "z" * 5000 + " b"
    _, (words,) = words_of(encoder_of("default"), text, max_length=16)
    assert [(word.start, word.end, word.unknown) for word in words] == [
        (0, 1, False),
        (2, 5002, True),
        (5003, 5004, False),
    ]


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_every_family_has_words_around_its_special_tokens(family: str) -> None:
    encoder = backbone_of(family).encoder
    text, pair = "good card!", "bad Café"
    encoding = encoder.encode(text, pair, max_length=64)
    _, words = words_of(encoder, text, pair, max_length=64)
    assert [text[word.start : word.end] for word in words[0]] == ["good", "card", "!"]
    assert [pair[word.start : word.end] for word in words[1]] == ["bad", "Café"]
    taken = [token for each in words for word in each for token in word.tokens]
    assert len(set(taken)) == len(taken) < len(encoding)
