"""An answer that explains itself, for people: the label, then the words that count most."""

import io
from collections.abc import Sequence
from typing import NamedTuple

from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.text import Text

from service.client import Explanation, Input, Result
from service.client.types import Explain

# Words of a text that are shown.
_MOST_WORDS = 10
_WIDEST_WORD = 24
_WIDEST_BAR = 24
# A loss of score that fills a bar, at least.
_LEAST_FULL = 0.1
_TITLES: dict[Explain, str] = {
    "attention": "share of the prompt that each word made",
    "occlusion": "what the score loses without each word",
}


class _Line(NamedTuple):
    name: str
    weight: float


def described(text: str | Input, result: Result, *, columns: int, colour: bool) -> str:
    """A few lines about one answer, with a line end after each.

    Args:
        text: what was sent.
        columns: of the terminal.
        colour: with the escape codes of a terminal.
    """
    written = io.StringIO()
    console = Console(
        file=written,
        width=max(20, columns),
        force_terminal=colour,
        no_color=not colour,
        highlight=False,
        markup=False,
        legacy_windows=False,
    )
    explanation = result.explanation
    head = Text(f"{_printable(result.label)} {result.score:.3f}", style="bold")
    if result.abstained:
        head.append(" (abstained)", style="yellow")
    if result.id is not None:
        head.append(f"  {_printable(result.id)}", style="dim")
    console.print(head, soft_wrap=True)
    console.print(_shown(text), style="dim", no_wrap=True, overflow="ellipsis")
    if explanation is not None:
        _explain(console, explanation)
    if result.truncated:
        console.print(_cut(text, explanation), style="yellow")
    return written.getvalue() + "\n"


def _explain(console: Console, explanation: Explanation) -> None:
    lines = [
        _Line(("* " if word.unknown else "") + _printable(word.word), word.weight)
        for word in sorted(explanation.words, key=lambda word: -abs(word.weight))[:_MOST_WORDS]
    ]
    console.print(f"{explanation.kind}: {_TITLES[explanation.kind]}")
    if (share := explanation.special_tokens.weight) is not None:
        lines.append(_Line(f"({explanation.special_tokens.count} special tokens)", share))
    for line in _bars(lines, explanation.kind, console.width):
        console.print(line, soft_wrap=True)
    more = len(explanation.words) - _MOST_WORDS
    if more > 0:
        console.print(f"  and {more} more words")
    if any(word.unknown for word in explanation.words):
        console.print("  * not in the tokenizer's vocabulary")
    if explanation.note is not None:
        console.print(explanation.note)


def _bars(lines: Sequence[_Line], kind: Explain, columns: int) -> list[Text]:
    widest = min(_WIDEST_WORD, max((cell_len(line.name) for line in lines), default=0))
    bars = max(4, min(_WIDEST_BAR, columns - widest - 11))
    # Shares have no sign. Of scores, a bar says how much and not only which is the largest.
    signed = kind == "occlusion"
    full = max(_LEAST_FULL if signed else 1e-9, *(abs(line.weight) for line in lines), 0.0)
    drawn = []
    for line in lines:
        name = line.name if cell_len(line.name) <= widest else line.name[: widest - 1] + "\u2026"
        # Without this, a small loss would be `-0.000`.
        weight = round(line.weight, 3) + 0.0
        shown = f"{weight:+.3f}" if signed and weight else f"{weight:{' ' if signed else ''}.3f}"
        text = Text(f"  {set_cell_size(name, widest)} {shown} ")
        bar = "\u2588" * round(bars * abs(line.weight) / full)
        text.append(bar, style="cyan" if line.weight >= 0 else "magenta")
        drawn.append(text)
    return drawn


def _shown(text: str | Input) -> str:
    if isinstance(text, str):
        return _printable(text)
    pair = "" if text.text_pair is None else f" | {text.text_pair}"
    return _printable(text.text + pair)


def _cut(text: str | Input, explanation: Explanation | None) -> str:
    if explanation is None:
        return "cut: longer than its adapter reads"
    whole = text if isinstance(text, str) else text.text
    parts = [f"{explanation.read.text} of {len(whole)} characters"]
    if not isinstance(text, str) and text.text_pair is not None:
        parts.append(f"{explanation.read.text_pair} of {len(text.text_pair)} of the pair's second")
    return f"cut: {', '.join(parts)} were read"


def _printable(text: str) -> str:
    """On one line, and without what a terminal would obey."""
    return "".join(each if each.isprintable() else "\ufffd" for each in " ".join(text.split()))
