"""The examples of the pages: every block of code, and what its page says of running it.

A comment directly before a block says what a test could not guess:

    <!-- not run: needs a GPU -->              never; the reason is required
    <!-- limit: 6000 -->                       may take so many seconds; without it ten minutes
    <!-- serves -->                            starts the service that the rest of the page asks
    <!-- until Ctrl-C -->                      does not end by itself
    <!-- fails: 2 -->                          ends with this exit code; 22 is that of curl
    <!-- output -->                            of a block further up: what it printed
    <!-- numbers vary -->                      of an output: any numbers in place of these

`<!-- not run on this page: reason -->` holds for all blocks after it. A comment may hold several
marks, separated by semicolons. `python -m tests.support.page_examples` counts the blocks.
"""

import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from markdown_it import MarkdownIt

TREE = Path(__file__).resolve().parents[2]
SHELLS = ("sh", "bash", "shell")
OUTPUTS = ("json", "text", "")
# What a command begins with where a block, as an indented one, names no language.
_COMMAND = re.compile(
    r"([A-Z_]+=\S+ )*(python|\.venv/bin/python|make|curl|docker|accelerate|torchrun|kubectl) "
)
_COMMENT = re.compile(r"<!--\s*(.*?)\s*-->", re.DOTALL)
_FLAGS = ("serves", "until Ctrl-C", "output", "numbers vary")
_VALUES = ("not run", "limit", "fails", "not run on this page")
_BETWEEN = re.compile(rf";(?=\s*(?:{'|'.join((*_FLAGS, *_VALUES))})\s*(?::|;|$))")
# Blocks in it are indented, as in mkdocs: tabs, notes, what can be unfolded.
_CONTAINER = re.compile(r"(=== |!!! |\?\?\?\+? )")


class Kind(StrEnum):
    """COMMANDS: for a shell. PROGRAM: Python. OUTPUT: what the block before prints. SHOWN: neither,
    as a configuration file or an example of a log."""

    COMMANDS = "commands"
    PROGRAM = "program"
    OUTPUT = "output"
    SHOWN = "shown"


class MarkError(Exception):
    """A comment before a block is no mark, or does not fit the block."""


@dataclass(frozen=True, slots=True)
class Block:
    """line: its first one, from 1. marks: by name; of those without a value it is empty."""

    page: Path
    line: int
    language: str
    text: str
    kind: Kind
    marks: dict[str, str]

    @property
    def runs(self) -> bool:
        """Whether it is something to run, and can be."""
        return self.kind in (Kind.COMMANDS, Kind.PROGRAM) and self.reason is None

    @property
    def reason(self) -> str | None:
        """Why no test runs it."""
        return self.marks.get("not run")

    @property
    def place(self) -> str:
        return f"{self.page.relative_to(TREE)}:{self.line}"


def pages() -> Sequence[Path]:
    """Every page of the documentation, and the README."""
    return [TREE / "README.md", *sorted((TREE / "docs").rglob("*.md"))]


def blocks_of(page: Path) -> list[Block]:
    """The blocks of a page, in their order.

    Raises:
        MarkError: a mark that does not exist, lacks its reason, or stands where it means nothing.
    """
    found: list[Block] = []
    marks: dict[str, str] = {}
    of_page: dict[str, str] = {}
    adjacent = False
    for token in MarkdownIt().parse(_unfolded(page.read_text())):
        where = f"{page.relative_to(TREE)}:{token.map[0] + 1 if token.map else '?'}"
        if token.type == "html_block" and (comment := _COMMENT.fullmatch(token.content.strip())):
            read = _marks(comment[1], where)
            if "not run on this page" in read:
                of_page = {"not run": read.pop("not run on this page")}
            marks |= read
            continue
        if token.type not in ("fence", "code_block"):
            if marks and token.nesting >= 0 and token.type not in _OPENINGS:
                raise MarkError(f"{where}: a mark with no block after it: {', '.join(marks)}")
            adjacent = adjacent and token.type in _OPENINGS
            continue
        language = token.info.split()[0] if token.info.split() else ""
        kind = _kind(language, token.content, adjacent="output" in marks or adjacent)
        previous = found[-1] if found else None
        if kind is Kind.OUTPUT and previous is not None and previous.reason is not None:
            marks = {"not run": previous.reason} | marks
        marks = of_page | marks
        line = (token.map[0] if token.map else 0) + 1
        block = Block(page, line, language, token.content, kind, marks)
        _check(block)
        found.append(block)
        adjacent, marks = kind in (Kind.COMMANDS, Kind.PROGRAM), {}
    if marks:
        raise MarkError(f"{page.relative_to(TREE)}: a mark at the end: {', '.join(marks)}")
    return found


# They only contain blocks.
_OPENINGS = ("bullet_list_open", "ordered_list_open", "list_item_open", "blockquote_open")


def _marks(comment: str, where: str) -> dict[str, str]:
    marks = {}
    for part in _BETWEEN.split(comment):
        name, colon, value = (piece.strip() for piece in part.partition(":"))
        if name in _FLAGS and not colon:
            marks[name] = ""
        elif name in _VALUES and value:
            marks[name] = value
        elif name in (*_FLAGS, *_VALUES):
            raise MarkError(f"{where}: {part.strip()!r}: only {', '.join(_VALUES)} have a value")
        # Any other comment is none of ours.
    return marks


def _kind(language: str, text: str, *, adjacent: bool) -> Kind:
    if language in SHELLS or (language == "" and _COMMAND.match(text)):
        return Kind.COMMANDS
    if language == "python":
        return Kind.PROGRAM
    return Kind.OUTPUT if adjacent and language in OUTPUTS else Kind.SHOWN


def _check(block: Block) -> None:
    runs = block.kind in (Kind.COMMANDS, Kind.PROGRAM)
    for name in block.marks:
        fits = {
            "not run": True,
            "output": block.kind is Kind.OUTPUT,
            "numbers vary": block.kind is Kind.OUTPUT,
        }
        if not fits.get(name, runs):
            raise MarkError(f"{block.place}: {name!r} means nothing for {block.kind}")
    for name, what in (("fails", "an exit code"), ("limit", "seconds")):
        if not block.marks.get(name, "0").isdecimal():
            raise MarkError(f"{block.place}: {name}: {what}")


def _unfolded(text: str) -> str:
    """The page with the same lines, and what is in tabs and notes no longer indented."""
    lines, depth = [], 0
    for line in text.splitlines():
        indent = len(line) - len(line.lstrip(" "))
        if line.strip():
            depth = min(depth, indent // 4)
        body = line[4 * depth :]
        lines.append(body)
        if _CONTAINER.match(body):
            depth += 1
    return "\n".join(lines) + "\n"


def count(blocks: Sequence[Block]) -> Counter[str]:
    """How many run, are compared with what was printed, cannot run, are only shown."""
    counts: Counter[str] = Counter()
    for block in blocks:
        if block.kind is Kind.SHOWN:
            counts["shown"] += 1
        elif block.reason is not None:
            counts["not run"] += 1
        else:
            counts["compared" if block.kind is Kind.OUTPUT else "run"] += 1
    return counts


def _report() -> Iterator[str]:
    names = ("run", "compared", "not run", "shown")
    yield f"{'page':32}" + "".join(f"{name:>10}" for name in names)
    total: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    for page in pages():
        blocks = blocks_of(page)
        counts = count(blocks)
        total += counts
        reasons += Counter(
            block.reason for block in blocks if block.reason and block.kind is not Kind.SHOWN
        )
        if blocks:
            name = str(page.relative_to(TREE))
            yield f"{name:32}" + "".join(f"{counts[each]:10}" for each in names)
    yield f"{'all':32}" + "".join(f"{total[each]:10}" for each in names)
    for reason, number in reasons.most_common():
        yield f"not run, {number}: {reason}"


if __name__ == "__main__":
    sys.stdout.writelines(f"{line}\n" for line in _report())
