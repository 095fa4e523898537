"""Texts of everything that tokenizers treat in ways of their own, for property tests."""

from hypothesis import strategies as st

PARTS = (
    *("a", "the", "it's", "they'll", "'re", "don't", "cat", "Zürich", "crème", "1999", "x"),
    *(" ", "  ", "   ", "\n", "\t", " \n ", "\r\n", "\u00a0", "\u3000", "\u2581", "\x00", "\u200b"),
    *(".", ",", "...", "``", "''", "'", "-", "[", "]", "…", "\uff0c", "。", "\uff08", "\uff21"),
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
odd_texts = st.lists(
    st.one_of(
        st.sampled_from(PARTS),
        st.sampled_from(" .a-字ж'\n").flatmap(
            lambda each: st.integers(1, 160).map(lambda n: each * n)
        ),
        st.text(max_size=4),
    ),
    max_size=40,
).map("".join)
