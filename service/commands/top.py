"""`python -m service top`: a running service as it works, from its /metrics and /readyz."""

import sys
import time
from argparse import ArgumentParser, Namespace
from typing import TYPE_CHECKING

from service.commands import CommandFailed
from service.commands.flags import add_service, client_of, count, positive_seconds

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from service.client import Client
    from service.commands.panels import Panel
    from service.commands.scrape import Scrape

HELP = "a live view of the service"
# Until the first view: what is shown are rates, and nobody wants to wait for those.
_FIRST_SECONDS = 1.0
# Of a view that is printed where there is no terminal.
_PRINTED_WIDTH = 160
# Two panels side by side need so many columns.
_WIDE = 100


def add_arguments(parser: ArgumentParser) -> None:
    add_service(parser)
    parser.add_argument(
        "--interval",
        type=positive_seconds,
        default=2.0,
        metavar="S",
        help="seconds between two looks; %(default)g",
    )
    parser.add_argument("--once", action="store_true", help="print one view and end")
    parser.add_argument(
        "--adapters", type=count, default=10, metavar="N", help="of the busiest; %(default)s"
    )


def run(arguments: Namespace) -> int:
    from rich.console import Console

    from service.client import Retries

    width = None if sys.stdout.isatty() else _PRINTED_WIDTH
    console = Console(file=sys.stdout, width=width)
    if not (arguments.once or console.is_terminal):
        raise CommandFailed("standard output is no terminal: --once prints one view")
    with client_of(arguments, retries=Retries(attempts=1)) as client:
        if arguments.once:
            _once(client, arguments, console)
        else:
            _live(client, arguments, console)
    return 0


def _once(client: "Client", arguments: Namespace, console: "Console") -> None:
    before = _scrape(client)
    time.sleep(arguments.interval)
    console.print(_view(client, before, _scrape(client), arguments, width=console.width))


def _live(client: "Client", arguments: Namespace, console: "Console") -> None:
    """Until Ctrl-C; a service that goes away is waited for."""
    from rich.live import Live
    from rich.text import Text

    from service.client import ClientError

    before = _scrape(client)
    with Live(Text("looking ..."), console=console, screen=True, auto_refresh=False) as live:
        wait = min(_FIRST_SECONDS, arguments.interval)
        while True:
            live.refresh()
            time.sleep(wait)
            wait = arguments.interval
            try:
                now = _scrape(client)
                live.update(_view(client, before, now, arguments, width=console.width))
                before = now
            except (ClientError, CommandFailed) as error:
                live.update(Text(f"{arguments.url}: {error}"))


def _scrape(client: "Client") -> "Scrape":
    from service.commands.scrape import NoMetrics, parse

    try:
        return parse(client.metrics(), seconds=time.monotonic())
    except NoMetrics as error:
        raise CommandFailed(str(error)) from None


def _view(
    client: "Client", before: "Scrape", now: "Scrape", arguments: Namespace, *, width: int
) -> "RenderableType":
    from rich.columns import Columns
    from rich.console import Group
    from rich.text import Text

    from service.commands.panels import panels_of, running
    from service.commands.scrape import Between

    between = Between(before, now)
    ready = client.ready()
    state = "ready" if ready.ok else f"not ready: {ready.reason}"
    head = Text(f"{arguments.url}: {state}; {running(between) or 'no engine'}", style="bold")
    panels = panels_of(between, adapters=arguments.adapters)
    small, wide = panels[:3], panels[3:]
    shown: list[RenderableType] = [_table(panel) for panel in small]
    if width >= _WIDE:
        shown = [Columns(shown, padding=(0, 4), equal=True)]
    spaced: list[RenderableType] = [head]
    for item in [*shown, *(_table(panel) for panel in wide)]:
        spaced += [Text(), item]
    return Group(*spaced)


def _table(panel: "Panel") -> "RenderableType":
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for index, column in enumerate(panel.columns):
        heading = panel.heading if index == 0 else column
        left = index == 0 or column == "labels"
        table.add_column(Text(heading), justify="left" if left else "right")
    for row in panel.rows:
        table.add_row(*(Text(cell) for cell in row))
    return table
