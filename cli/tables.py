"""Tables of results on standard output: columns on a wide terminal and in a pipe, else a record for
each row.

What comes from files and services may hold control characters, which a terminal would obey: they
are shown as `?`.
"""

import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from cli.shell import one_line

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

# A pipe has no width; nothing that is printed there is cut.
_PIPE_WIDTH = 4096


def print_table(
    headings: Sequence[str], rows: Iterable[Sequence[str]], *, right: Collection[str] = ()
) -> None:
    """Print rows under headings. On a terminal that is too narrow for the widest row, each row is
    printed as its first cell and a line for each other one.

    Args:
        right: headings of columns that are aligned on the right.
    """
    from rich.cells import cell_len
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    shown = [[one_line(cell) for cell in row] for row in rows]
    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else _PIPE_WIDTH)
    widths = [max(map(cell_len, column)) for column in zip(headings, *shown, strict=True)]
    if sum(widths) + len(widths) - 1 > console.width:
        for row in shown:
            sys.stdout.write(f"{row[0]}\n")
            facts = dict(zip(headings[1:], row[1:], strict=True))
            print_facts(facts, indent=2)
        return
    table = Table(box=None, pad_edge=False)
    for heading in headings:
        table.add_column(heading, justify="right" if heading in right else "left")
    for row in shown:
        table.add_row(*(Text(cell, no_wrap=True) for cell in row))
    console.print(table)


def show_table(console: "Console", table: "Table") -> None:
    """Print a table as it is, or as `print_table` does on a terminal that is too narrow for it."""
    wide = console.options.update(width=_PIPE_WIDTH)
    if console.measure(table, options=wide).maximum <= console.width or not console.is_terminal:
        console.print(table)
        return
    if table.title:
        console.print(str(table.title), markup=False, highlight=False, soft_wrap=True)
    names, *others = table.columns
    title = str(names.header)
    for index, name in enumerate(names.cells):
        console.print(_line(title, name), markup=False, highlight=False, soft_wrap=True)
        for column in others:
            cell = [*column.cells][index]
            line = f"  {column.header!s}: {cell!s}"
            console.print(line, markup=False, highlight=False, soft_wrap=True)


def _line(heading: str, cell: object) -> str:
    return f"{heading}: {cell!s}" if heading else str(cell)


def print_facts(facts: Mapping[str, str], *, indent: int = 0) -> None:
    """Print names and values, one a line; a line that is too long is left to the terminal."""
    width = max((len(name) for name in facts), default=0)
    for name, value in facts.items():
        sys.stdout.write(f"{' ' * indent}{name:<{width}} {one_line(value)}".rstrip() + "\n")
