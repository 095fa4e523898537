"""A long text has the tokens that it has whole, at both of its ends, in windows of a few letters."""

from functools import cache
from typing import Any, Literal

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from adapters import long_text
from adapters.errors import UncuttableText
from adapters.long_text import LONGEST_STRETCH, Pipeline, Reader
from tests.support.tokenizers import KINDS, tiny_tokenizer

PARTS = (
    *("a", "the", "it's", "they'll", "'re", "don't", "cat", "Zürich", "crème", "1999", "x"),
    *(" ", "  ", "   ", "\n", "\t", " \n ", "\r\n", "\u00a0", "\u3000", "\u2581", "\x00", "\u200b"),
    *(".", ",", "...", "``", "''", "'", "-", "[", "]", "…", "，", "。", "（", "Ａ"),
    *(
        "[MASK]",
        "[SEP]",
        "[MA",
        "SK]",
        "<mask>",
        " <mask>",
        "<ma",
        "sk>",
        "<s>",
        "</s",
        ">",
        "<MASK>",
    ),
    *("東京", "中国的首都", "です", "が", "か\u3099", "한국", "\u1112\u1161\u11ab", "แม่น้ำ", "क्षि"),
    *("e\u0301", "\u0301", "\u0323", "a\u0301\u0323", "\u0600", "ﬁ", "İ", "ß", "Σ", "ος", "\u00a8"),
    *(
        "🙂",
        "👩\u200d👧",
        "👍🏽",
        "🇩🇪",
        "\ud7a3\u11a8",
        "ж",
        "\u0e33",
        "\ufeff",
        "\u00ad",
        "א",
        "ئ",
    ),
)
texts = st.lists(
    st.one_of(
        st.sampled_from(PARTS),
        st.sampled_from(" .a-字ж'\n").flatmap(
            lambda each: st.integers(1, 160).map(lambda n: each * n)
        ),
        st.text(max_size=4),
    ),
    max_size=40,
).map("".join)


@cache
def pipeline_of(kind: str) -> Pipeline:
    return Pipeline.of(tiny_tokenizer(kind))


def whole(kind: str, text: str) -> list[int]:
    ids: list[int] = tiny_tokenizer(kind).encode(text, add_special_tokens=False).ids
    return ids


def read(kind: str, text: str, count: int, end: Literal["first", "last"]) -> Reader:
    reader = Reader(pipeline_of(kind), text, end)
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


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=120, deadline=None)
@given(text=texts, count=st.integers(0, 30), end=st.sampled_from(("first", "last")))
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
    assert not reader.complete or len(reader) == len(expected)
