"""Markdown with untrusted text in it: names, labels, paths and commands never become markup."""

import math
import re
from collections.abc import Iterable, Sequence

# Zero-width joiners: invisible, but part of some languages' spelling and of emoji.
_JOINERS = "\u200c\u200d"
_PUNCTUATION = re.compile(r"[!-/:-@\[-`{-~]")


class Markdown(str):
    """Text that is safe to write into a Markdown file as it is."""

    __slots__ = ()


def visible(text: str) -> str:
    r"""One line, with line ends, control characters and lone surrogates as escapes.

    The escapes are those of Python: `\n`, `\x1b`, `\ud800`.
    """
    return "".join(
        char if char.isprintable() or char in _JOINERS else ascii(char).strip("'") for char in text
    )


def literal(text: str) -> Markdown:
    """Untrusted text as inline Markdown: a code span, or every punctuation mark as an entity.

    A code span is the easiest to read. Renderers differ in how they treat some characters in a code
    span inside a table; text with one of these gets entities, which leave nothing to interpret.
    """
    shown = visible(text)
    if shown and not set(shown) & set("`|\\<>&"):
        return Markdown(f"`{shown}`")
    return Markdown(_PUNCTUATION.sub(lambda mark: f"&#{ord(mark[0])};", shown))


def fenced(text: str, language: str = "") -> Markdown:
    """A code block to copy from, with fences longer than any in the text; each line `visible`."""
    text = "\n".join(visible(line) for line in text.split("\n"))
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return Markdown(f"{fence}{language}\n{text}\n{fence}")


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of cells that are Markdown already; columns of numbers are right-aligned."""
    body = [tuple(row) for row in rows]
    assert all(len(row) == len(head) for row in body)
    marks = [alignment([row[column] for row in body]) for column in range(len(head))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, marks, *body))


def alignment(cells: Sequence[str]) -> Markdown:
    """The delimiter below a column's head: right-aligned if all its cells are numbers or `-`."""
    numeric = cells and all(re.match(r"-?\d|-$", cell) for cell in cells)
    return Markdown("---:" if numeric else "---")


def number(value: float | None) -> Markdown:
    """Four decimals; `-` if there is no value, or one that is not finite."""
    return Markdown("-" if value is None or not math.isfinite(value) else f"{value:.4f}")
