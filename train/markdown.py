"""Markdown from figures and from text that nobody vouches for: GitHub's kind, with its tables.

Knows no adapter. Foreign text is shown as it is and stays text: it can end neither a table's cell
nor a code span, begins no block and is never HTML.
"""

import math
import re
from collections.abc import Iterable, Sequence

# Joiners: invisible, but letters of some languages and parts of emoji.
_JOINERS = "\u200c\u200d"
_PUNCTUATION = re.compile(r"[!-/:-@\[-`{-~]")


def visible(text: str) -> str:
    r"""One line without what cannot be seen or encoded: line ends, controls, lone surrogates.

    They become what Python writes for them: `\n`, `\x1b`, `\ud800`.
    """
    return "".join(
        item if item.isprintable() or item in _JOINERS else ascii(item).strip("'") for item in text
    )


def literal(text: str) -> str:
    """Foreign text as inline Markdown: a code span, or with every punctuation mark as an entity.

    A code span is what people read best. Of what cannot stand in one, in a table, without a rule
    that renderers differ in, no character is left that any of them could read as markup.
    """
    shown = visible(text)
    if shown and not set(shown) & set("`|\\<>&"):
        return f"`{shown}`"
    return _PUNCTUATION.sub(lambda found: f"&#{ord(found[0])};", shown)


def fenced(text: str, language: str = "") -> str:
    """Lines for copying, between fences longer than any within them; the rest as `visible`."""
    text = "\n".join(visible(line) for line in text.split("\n"))
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of cells that are Markdown already; columns of figures are set to the right."""
    body = [tuple(row) for row in rows]
    assert all(len(row) == len(head) for row in body)
    marks = [
        "---:" if body and all(re.match(r"-?\d|-$", row[column]) for row in body) else "---"
        for column in range(len(head))
    ]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, marks, *body))


def number(value: float | None) -> str:
    """Four decimals; `-` where there is no figure or none that is finite."""
    return "-" if value is None or not math.isfinite(value) else f"{value:.4f}"
