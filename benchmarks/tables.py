"""Writes the tables of docs/benchmarks.md from the JSON files that `sets` wrote.

Each table gets its command, date, commit, machine, versions and conditions from its own file, so
files of other machines can be brought here. Tables whose file is missing stay as they are, and so
does the rest of the page: read again what the text around a table says about it.
"""

import json
import re
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from benchmarks.page import BadPage, Place, changed_by_hand, filled, places_of
from benchmarks.report import BenchmarkFailed, Report
from benchmarks.sets import SETS

_FOLDER, _PAGE = Path("runs/benchmarks"), Path("docs/benchmarks.md")
_NEEDED = {"date", "command", "commit", "machine", "versions", "conditions", "table"}
_NAME = re.compile(r"[a-z0-9-]+")


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "folders",
        nargs="*",
        type=Path,
        metavar="folder",
        help=f"of a set's JSON files; by default those of {' and '.join(SETS)} in {_FOLDER}",
    )
    parser.add_argument(
        "--into", type=Path, default=_PAGE, metavar="PAGE", help=f"by default {_PAGE}"
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="write nothing, and fail if the page is not what the files say",
    )


def run(options: Namespace) -> Report:
    """
    Raises:
        BenchmarkFailed: there is no file, one of them is not a benchmark's, or the comments of the
            page do not make pairs.
    """
    page: Path = options.into
    folders: list[Path] = options.folders or [_FOLDER / which for which in SETS]
    contents: dict[str, Any] = {}
    for folder in folders:
        contents |= _read(folder)
    if not contents:
        asked = " or ".join(map(str, folders))
        raise BenchmarkFailed(
            f"no JSON file in {asked}: `python -m benchmarks sets cpu` writes some"
        )
    try:
        before = page.read_text(encoding="utf-8").split("\n")
        after, homeless = filled(before, contents)
        edited = changed_by_hand(before)
    except (BadPage, UnicodeDecodeError) as error:
        raise BenchmarkFailed(f"{page}: {error}") from None
    if not options.check and after != before:
        page.write_text("\n".join(after), encoding="utf-8")
    places = {"before": _tables(before), "after": _tables(after)}
    differing = [
        name for name in contents if places["before"].get(name) != places["after"].get(name)
    ]
    outcomes = {
        name: "has no place in the page"
        if name in homeless
        else "as its file says"
        if name not in differing
        else "differs from its file"
        if options.check
        else "written"
        for name in contents
    }
    outcomes |= _missing(folders, set(contents), set(places["before"]))
    problems = []
    if options.check and differing:
        problems.append(f"not what the files say: {', '.join(differing)}")
    if homeless:
        sets = {name.partition("/")[0] for name in homeless}
        lines = " or ".join(f"`<!-- new tables of {which} -->`" for which in sorted(sets))
        problems.append(f"no place for {', '.join(homeless)}: add a line {lines}")
    if edited := [name for name in edited if options.check or name not in contents]:
        problems.append(f"changed by hand: {', '.join(edited)}")
    return Report(
        f"tables of {page}",
        ("table", "outcome"),
        [[name, outcome] for name, outcome in outcomes.items()],
        outcomes,
        {"commits": ", ".join(sorted({content["commit"] or "?" for content in contents.values()}))},
        problem=f"{page}: {'; '.join(problems)}" if problems else "",
    )


def _read(folder: Path) -> dict[str, Any]:
    """The JSON files of a folder by the names of their tables, in the order of its set."""
    if not _NAME.fullmatch(folder.name):
        raise BenchmarkFailed(
            f"{folder}: the last part is the name of a set: expected {' or '.join(SETS)}"
        )
    order = [*SETS.get(folder.name, ())]
    files = sorted(
        folder.glob("*.json"),
        key=lambda path: (order.index(path.stem) if path.stem in order else len(order), path.stem),
    )
    return {f"{folder.name}/{path.stem}": _content(path) for path in files}


def _content(path: Path) -> Any:
    if not _NAME.fullmatch(path.stem):
        raise BenchmarkFailed(f"{path}: expected a name of small letters, digits and hyphens")
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise BenchmarkFailed(f"{path} is not JSON: {error}") from None
    if lacking := sorted(_NEEDED - set(content if isinstance(content, dict) else ())):
        raise BenchmarkFailed(
            f"{path} lacks {', '.join(lacking)}: an older version wrote it, or no benchmark did; "
            "run its step again"
        )
    return content


def _missing(folders: list[Path], there: set[str], placed: set[str]) -> dict[str, str]:
    """What becomes of the tables of a set whose files are missing."""
    return {
        name: f"{'left as it is' if name in placed else 'not in the page'}: no {folder / step}.json"
        for folder in folders
        for step in SETS.get(folder.name, ())
        if (name := f"{folder.name}/{step}") not in there
    }


def _tables(lines: list[str]) -> dict[str, list[str]]:
    """The lines of each table in a page, its comments included."""

    def of(place: Place) -> list[str]:
        return lines[place.first : place.last + 1]

    return {name: of(place) for name, place in places_of(lines).items()}
