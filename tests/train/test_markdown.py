"""Untrusted text on a model card is shown, and never becomes markup."""

import re
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jinja2 import UndefinedError
from markdown_it import MarkdownIt
from markdown_it.token import Token

from adapters.format.spec import BackboneIdentity, Provenance
from tests.support.model_cards import facts_of, parsed
from train.report.markdown import fenced, literal, visible
from train.report.model_card import CardFacts, environment, model_card
from train.report.report import DataReport

HOSTILE = (
    "a|b",
    "`x`",
    "new\nline",
    "<script>alert(1)</script>",
    "\\|",
    "| --- |",
    "[link](http://example.org) ![image](x)",
    "**bold** _it_ ~~no~~ &lt; &#124;",
    "```",
    "\x1b[31m\u202e\r\n",
    "# heading",
    "  spaces  ",
)


def _inline(tokens: list[Token]) -> list[Token]:
    return [child for token in tokens for child in token.children or ()]


def _cells(tokens: list[Token]) -> list[str]:
    """The shown text of the cells of all tables."""
    return [
        "".join(child.content for child in tokens[index + 1].children or ())
        for index, token in enumerate(tokens)
        if token.type in ("td_open", "th_open")
    ]


def _table_lines(card: str) -> list[list[str]]:
    tables = re.findall(r"(?:^\|.*\n)+", card, re.MULTILINE)
    return [table.splitlines() for table in tables]


def _check(card: str, harmless: str) -> None:
    """Assert that the card has the structure of one with harmless names, and no other markup."""
    card.encode()
    tokens, expected = parsed(card), parsed(harmless)
    blocks = [token.type for token in tokens]
    assert blocks == [token.type for token in expected]
    assert not {"html_block", "html_inline"} & {*blocks, *(t.type for t in _inline(tokens))}
    links = [child.attrs["href"] for child in _inline(tokens) if child.type == "link_open"]
    assert links == ["https://arxiv.org/abs/2506.05629"]
    for kind in ("image", "em_open", "strong_open"):
        count = sum(child.type == kind for child in _inline(tokens))
        assert count == sum(child.type == kind for child in _inline(expected))
    for lines in _table_lines(card):
        # Renderers drop cells beyond the head's, so bars are counted in the text.
        assert len({line.count("|") for line in lines}) == 1


def _hostile(texts: Sequence[str]) -> CardFacts:
    """Facts whose untrusted texts are all among these."""
    labels = tuple(texts)
    facts, one = facts_of(labels), texts[0]
    report = replace(
        facts.report,
        command=one,
        data={split: replace(rows, path=one) for split, rows in facts.report.data.items()},
        settings={"data_name": one},
    )
    # A spec refuses some of them.
    provenance = Provenance.model_construct(
        data=one, data_licence=one, code_version=one, created=one
    )
    backbone = BackboneIdentity.model_construct(name=one, fingerprint="1" * 64)
    spec = facts.spec.model_copy(update={"provenance": provenance, "backbone": backbone})
    return replace(facts, report=report, spec=spec, file_name=one, machine=one, versions={one: one})


@pytest.mark.parametrize("first", range(len(HOSTILE)))
def test_hostile_labels_paths_and_commands_keep_every_table_and_inject_nothing(
    first: int,
) -> None:
    texts = HOSTILE[first:] + HOSTILE[:first]
    card = model_card(_hostile(texts))
    _check(card, model_card(_hostile([f"x{index}" for index in range(len(texts))])))
    cells = _cells(parsed(card))
    for text in texts:
        assert visible(text).strip() in [cell.strip() for cell in cells], "and are shown"


@pytest.mark.slow
@settings(deadline=None, max_examples=60)
@given(st.lists(st.text(min_size=1, max_size=20), min_size=2, max_size=4, unique_by=visible))
@example(["`", "``"])
@example(["x`", "\\"])
@example([" ", "  "])
def test_no_text_at_all_breaks_a_card(texts: list[str]) -> None:
    _check(
        model_card(_hostile(texts)), model_card(_hostile(["x1", "x2", "x3", "x4"][: len(texts)]))
    )


def test_characters_that_cannot_be_encoded_are_escaped() -> None:
    facts = facts_of()
    text = "caf\udce9.csv"
    report = replace(
        facts.report, command=text, data={"test": DataReport(text, "0" * 64, 1, {"ham": 1})}
    )
    card = model_card(replace(facts, report=report, file_name=text, machine=text))
    assert b"caf\\udce9.csv" in card.encode()


def test_the_template_cannot_print_text_without_an_escaping_filter() -> None:
    rendered = environment().from_string("{{ text | literal }}").render(text="a|b")
    assert rendered == "a&#124;b"
    for source in ("{{ text }}", "{{ text ~ 'x' }}", "{{ text | upper }}", "{{ 'constant' }}"):
        with pytest.raises(TypeError, match="without an escaping filter"):
            environment().from_string(source).render(text="a|b")
    with pytest.raises(UndefinedError):
        environment().from_string("{{ missing }}").render()


def test_plain_text_becomes_a_code_span_and_other_text_keeps_no_punctuation() -> None:
    assert literal("card_charged twice*") == "`card_charged twice*`"
    assert literal("a|b") == "a&#124;b"
    assert literal("<b>&") == "&#60;b&#62;&#38;"
    assert literal("") == ""
    assert literal("a\tb\x00") == "a&#92;tb&#92;x00"
    assert literal("joined\u200cword") == "`joined\u200cword`"


def test_a_fence_is_longer_than_any_within_it() -> None:
    assert fenced("a", "sh") == "```sh\na\n```"
    text = "one\n````\n<b>\n"
    (token,) = MarkdownIt("commonmark").parse(fenced(text))
    assert (token.type, token.content) == ("fence", text + "\n")
    assert fenced("\ud800\x1b\r") == "```\n\\ud800\\x1b\\r\n```"
