"""The tables in a page that JSON files of benchmarks fill.

A table stands between two comments of its own lines, with the name of its file (FOLDER/STEP):

    <!-- table cpu/engine -->
    ...
    <!-- end of table cpu/engine, 0a1b2c3d4e5f -->

The number is a checksum of the lines between, so a change by hand is noticed. A table without it is
written by hand until its file is there. A line `<!-- new tables of cpu -->` is where a table goes
that has no place yet.
"""

import hashlib
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

_START = re.compile(r"<!-- table (?P<name>[a-z0-9-]+/[a-z0-9-]+) -->")
_END = re.compile(
    r"<!-- end of table (?P<name>[a-z0-9-]+/[a-z0-9-]+)(?:, (?P<checksum>[0-9a-f]{12}))? -->"
)
# A comment that is meant as one of these two, or as the place for new tables.
_MEANT = re.compile(r"<!--\s*(?:end of )?(?:new )?tables?\b")
_NEW = "<!-- new tables of {} -->"
_NEW_LINE = re.compile(r"<!-- new tables of [a-z0-9-]+ -->")
_WIDTH = 100


class BadPage(Exception):
    """The comments of a page do not make pairs. The message names the line."""


@dataclass(frozen=True, slots=True)
class Place:
    """A table's place in a page.

    first, last: indices of the lines of its two comments. checksum: None if it is written by hand.
    """

    name: str
    first: int
    last: int
    checksum: str | None


def places_of(lines: Sequence[str]) -> dict[str, Place]:
    """The places of tables in a page, by name.

    Raises:
        BadPage: a comment has no partner, or two tables have one name.
    """
    places: dict[str, Place] = {}
    opened: tuple[str, int] | None = None
    for index, line in enumerate(lines):
        where = f"line {index + 1}: {line}"
        if start := _START.fullmatch(line):
            if opened:
                raise BadPage(f"{where}: the table {opened[0]} before it has no end")
            if start["name"] in places:
                raise BadPage(f"{where}: the page has this table already")
            opened = (start["name"], index)
        elif end := _END.fullmatch(line):
            if not opened or opened[0] != end["name"]:
                raise BadPage(f"{where}: no table of this name begins before it")
            places[end["name"]] = Place(end["name"], opened[1], index, end["checksum"])
            opened = None
        elif _MEANT.match(line) and not _NEW_LINE.fullmatch(line):
            raise BadPage(
                f"{where}: expected `<!-- table SET/STEP -->`, `<!-- end of table SET/STEP -->` or "
                "`<!-- new tables of SET -->`"
            )
    if opened:
        raise BadPage(f"line {opened[1] + 1}: the table {opened[0]} has no end")
    return places


def changed_by_hand(lines: Sequence[str]) -> list[str]:
    """Names of the tables that were written from a file and are not what was written."""
    return [
        name
        for name, place in places_of(lines).items()
        if place.checksum not in (None, _checksum(lines[place.first + 1 : place.last]))
    ]


def filled(
    lines: Sequence[str], contents: Mapping[str, Mapping[str, Any]]
) -> tuple[list[str], list[str]]:
    """The page with the tables of these JSON files in their places; all other lines as they were.

    contents: by the table's name, new ones in the order in which they go into the page.

    Returns:
        The lines, and the names for which the page has no place.
    """
    result, homeless = list(lines), []
    for name, content in contents.items():
        block = [*_block(name, table_lines(content))]
        place = places_of(result).get(name)
        new = _NEW.format(name.partition("/")[0])
        if place:
            result[place.first : place.last + 1] = block
        elif new in result:
            index = result.index(new)
            result[index:index] = [*block, ""]
        else:
            homeless.append(name)
    return result, homeless


def table_lines(content: Mapping[str, Any]) -> list[str]:
    """What a JSON file becomes: how and when it was measured, its table, its conditions."""
    columns, rows = content["table"]["columns"], content["table"]["rows"]
    measured = datetime.fromisoformat(content["date"])
    commit = f"code of `{content['commit']}`" if content["commit"] else "commit not recorded"
    return [
        *_wrapped(f"`{_command(content['command'])}`, {measured:%d %B %Y}, {commit}.".lstrip("0")),
        "",
        _row(columns),
        "|" + "---|" * len(columns),
        *map(_row, rows),
        "",
        *_wrapped(". ".join(_conditions(content)) + "."),
    ]


def _block(name: str, content: Sequence[str]) -> Iterator[str]:
    lines = ["", *content, ""]
    yield f"<!-- table {name} -->"
    yield from lines
    yield f"<!-- end of table {name}, {_checksum(lines)} -->"


def _checksum(lines: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:12]


def _command(command: Sequence[str]) -> str:
    """Without where its figures went."""
    kept = list(command)
    if "--json" in kept:
        index = kept.index("--json")
        del kept[index : index + 2]
    return " ".join(kept)


def _conditions(content: Mapping[str, Any]) -> Iterator[str]:
    """Sentences without their full stop."""
    machine, versions = content["machine"], content["versions"]
    parts = [str(machine["cpu"]), f"{machine['cores']} cores", f"{machine['threads']} threads"]
    parts += ["AVX512-BF16"] if machine.get("avx512_bf16") else []
    parts += [f"{machine['gpu']}, CUDA {machine['cuda']}"] if machine.get("gpu") else []
    yield f"*Machine*: {', '.join(parts)}"
    yield "*Versions*: " + ", ".join(f"{name} {value}" for name, value in versions.items())
    for name, value in content["conditions"].items():
        yield f"*{name.capitalize()}*: {_text(value)}".rstrip(".")


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_text(part)}" for name, part in value.items())
    return "none" if value is None else str(value)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(_escaped(cell) for cell in cells)} |".replace("|  |", "| |")


def _escaped(cell: str) -> str:
    return cell.replace("|", r"\|")


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, _WIDTH, break_long_words=False, break_on_hyphens=False)
