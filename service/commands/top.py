"""`python -m service top`: a live view of a running service, from its /metrics and /readyz.

Two scrapes make a `Between`, a `Between` makes the panels, and rich draws the panels.
"""

import math
import sys
import textwrap
import time
from argparse import ArgumentParser, Namespace
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

from cli.shell import Command, CommandFailed
from service.access.scopes import needs
from service.client import ClientError
from service.client.environment import service_url
from service.client.retry import ONCE
from service.commands.flags import add_service, client_of, count, positive_seconds

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from service.client import Client

Labels: TypeAlias = frozenset[tuple[str, str]]

# The wait for the first view, which needs two scrapes.
_FIRST_SECONDS = 1.0
# Columns of a view that is printed, not drawn on a terminal.
_PRINTED_WIDTH = 160
# From this many columns on, panels are drawn side by side.
_WIDE = 100
# Series of probes and pages, which the latency leaves out.
_NOT_REQUESTS = frozenset(
    ("route", path)
    for (_, path), need in needs().items()
    if need.is_open or "metrics" in need.scopes
)
STAGES: Mapping[str, str] = {
    "tokenize": "idspam_tokenize_seconds",
    "queue": "idspam_queue_seconds",
    "inference": "idspam_inference_seconds",
}
# All that the panels read: with thousands of adapters the rest has megabytes.
METRICS = (
    *STAGES.values(),
    "idspam_adapter_evictions_total",
    "idspam_adapter_loads_total",
    "idspam_batch_adapters",
    "idspam_batch_rows",
    "idspam_batch_tokens",
    "idspam_build_info",
    "idspam_devices",
    "idspam_engine_texts_total",
    "idspam_predictions_total",
    "idspam_process_cpu_seconds_total",
    "idspam_process_resident_bytes",
    "idspam_process_restarts_total",
    "idspam_request_errors_total",
    "idspam_request_seconds",
    "idspam_requests_total",
    "idspam_tier_adapters",
    "idspam_tier_bytes",
    "idspam_waiting_tokens",
    "process_cpu_seconds_total",
    "process_resident_memory_bytes",
)
_SHOWN_LABELS = 4
# The only column of words.
LABELS = "labels"


@dataclass(frozen=True, slots=True)
class Scrape:
    """All metrics at one time. seconds: on a monotonic clock. series: values by name and labels."""

    seconds: float
    series: Mapping[str, Mapping[Labels, float]]

    def values(self, name: str, label: str) -> dict[str, float]:
        """A metric by one of its labels, summed over the others."""
        return _by(label, self.series.get(name, {}).items())

    def total(self, name: str) -> float:
        return sum(self.series.get(name, {}).values())

    def labels(self, name: str) -> dict[str, str]:
        """The labels of a metric's first series that is not zero."""
        for labels, value in self.series.get(name, {}).items():
            if value:
                return dict(labels)
        return {}


def parse(text: str, *, seconds: float) -> Scrape:
    """
    Raises:
        CommandFailed: these are not metrics of this service.
    """
    from prometheus_client.parser import text_string_to_metric_families

    series: dict[str, dict[Labels, float]] = defaultdict(dict)
    try:
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                series[sample.name][frozenset(sample.labels.items())] = sample.value
    except (ValueError, KeyError, IndexError) as error:
        raise CommandFailed(f"no metrics of this service: {error}") from None
    if not any(name.startswith("idspam_") for name in series):
        raise CommandFailed("no metrics of this service")
    return Scrape(seconds, series)


@dataclass(frozen=True, slots=True)
class Between:
    """What happened from one scrape to a later one."""

    before: Scrape
    now: Scrape

    @property
    def seconds(self) -> float:
        return max(self.now.seconds - self.before.seconds, 1e-9)

    def increases(self, name: str) -> dict[Labels, float]:
        """The increase of each series of a counter; one that was reset counts from zero."""
        old = self.before.series.get(name, {})
        return {
            labels: _increase(old.get(labels, 0.0), value)
            for labels, value in self.now.series.get(name, {}).items()
        }

    def rate(self, name: str) -> float:
        """Increase per second, over all labels."""
        return sum(self.increases(name).values()) / self.seconds

    def rates(self, name: str, label: str) -> dict[str, float]:
        """Increase per second, by one label."""
        increases = _by(label, self.increases(name).items())
        return {key: value / self.seconds for key, value in increases.items()}

    def mean(self, histogram: str) -> float:
        """The mean of the observations; NaN if there were none."""
        count = self.rate(f"{histogram}_count")
        return self.rate(f"{histogram}_sum") / count if count else math.nan

    def quantile(
        self, histogram: str, share: float, *, without: Collection[tuple[str, str]] = ()
    ) -> float:
        """A quantile of the observations, as if they were spread evenly within each bucket.

        NaN if there were none. Observations above the last finite bound count as that bound.

        Args:
            without: series with one of these labels are ignored.
        """
        counts: dict[float, float] = defaultdict(float)
        for labels, value in self.increases(f"{histogram}_bucket").items():
            if not labels.intersection(without):
                counts[float(dict(labels)["le"])] += value
        return _quantile(sorted(counts.items()), share)


def _quantile(cumulative: list[tuple[float, float]], share: float) -> float:
    if not cumulative or not (total := cumulative[-1][1]):
        return math.nan
    rank = share * total
    low = below = 0.0
    for high, below_high in cumulative:
        if below_high >= rank:
            if math.isinf(high):
                return low
            inside = below_high - below
            return high if inside <= 0 else low + (high - low) * (rank - below) / inside
        low, below = high, below_high
    return low


def _increase(before: float, now: float) -> float:
    return now if now < before else now - before


def _by(label: str, items: Iterable[tuple[Labels, float]]) -> dict[str, float]:
    sums: dict[str, float] = defaultdict(float)
    for labels, value in items:
        sums[dict(labels).get(label, "")] += value
    return dict(sums)


@dataclass(frozen=True, slots=True)
class Panel:
    """A heading and rows of cells."""

    heading: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


def panels_of(between: Between, *, adapters: int) -> list[Panel]:
    """All panels. adapters: how many of the busiest are shown."""
    return [
        _traffic(between),
        _latency(between),
        _batches(between),
        _tiers(between),
        _busiest(between, adapters),
        _processes(between),
    ]


def running(between: Between) -> str:
    """`0.5.0, all-MiniLM-L6-v2, cpu, bfloat16`; "" before the engine runs."""
    info = between.now.labels("idspam_build_info")
    shown = ", ".join(
        info[key] for key in ("version", "backbone", "device", "dtype") if key in info
    )
    devices = between.now.total("idspam_devices")
    return f"{shown}, {devices:.0f} devices" if shown and devices > 1 else shown


def _traffic(between: Between) -> Panel:
    outcomes = between.rates("idspam_requests_total", "outcome")
    errors = between.rates("idspam_request_errors_total", "type")
    rates = {"requests": sum(outcomes.values()), "texts": between.rate("idspam_predictions_total")}
    rates |= {name: rate for name, rate in outcomes.items() if rate and name != "success"}
    rates |= {f"error {name}": rate for name, rate in errors.items() if rate}
    return Panel(
        "traffic", ("", "a second"), [[name, number(rate)] for name, rate in rates.items()]
    )


def _latency(between: Between) -> Panel:
    rows = [["request", *_quantiles(between, "idspam_request_seconds")]]
    rows += [[stage, *_quantiles(between, name)] for stage, name in STAGES.items()]
    return Panel("latency, ms", ("", "p50", "p99"), rows)


def _quantiles(between: Between, histogram: str) -> list[str]:
    return [
        number(between.quantile(histogram, share, without=_NOT_REQUESTS) * 1e3)
        for share in (0.5, 0.99)
    ]


def _batches(between: Between) -> Panel:
    rows = [["a second", number(between.rate("idspam_batch_rows_count"))]]
    rows += [
        [f"{unit} a batch", number(between.mean(f"idspam_batch_{unit}"))]
        for unit in ("rows", "tokens", "adapters")
    ]
    rows.append(["waiting tokens", number(between.now.total("idspam_waiting_tokens"))])
    engines = between.rates("idspam_engine_texts_total", "engine")
    if len(engines) > 1:
        rows += [[f"texts a second, {name}", number(engines[name])] for name in sorted(engines)]
    return Panel("batches", ("", ""), rows)


def _tiers(between: Between) -> Panel:
    now = between.now
    adapters, size = (now.values(f"idspam_tier_{unit}", "tier") for unit in ("adapters", "bytes"))
    loads, evictions = (
        between.rates(f"idspam_adapter_{event}_total", "tier") for event in ("loads", "evictions")
    )
    # Stored adapters are neither loaded nor evicted.
    rows = [
        [
            tier,
            number(adapters.get(tier, 0.0)),
            mebibytes(size.get(tier, 0.0)),
            number(loads.get(tier, math.nan)),
            number(evictions.get(tier, math.nan)),
        ]
        for tier in ("stored", "registered", "active")
    ]
    return Panel("tiers", ("", "adapters", "MiB", "loads/s", "evictions/s"), rows)


def _busiest(between: Between, adapters: int) -> Panel:
    by_adapter: dict[str, dict[str, float]] = defaultdict(dict)
    for labels, texts in between.increases("idspam_predictions_total").items():
        named = dict(labels)
        if texts:
            by_adapter[named["adapter"]][named["label"]] = texts
    sums = {name: sum(labels.values()) for name, labels in by_adapter.items()}
    total = sum(sums.values())
    busiest = sorted(sums, key=lambda name: (-sums[name], name))[:adapters]
    rows = [
        [
            name,
            number(sums[name] / between.seconds),
            percent(sums[name] / total),
            _shares(by_adapter[name], sums[name]),
        ]
        for name in busiest
    ]
    if more := len(sums) - len(busiest):
        rows.append([f"and {more} more", "", "", ""])
    return Panel("busiest adapters", ("", "texts/s", "share", LABELS), rows)


def _shares(labels: Mapping[str, float], total: float) -> str:
    """`ham 81%, spam 19%`, the most frequent first."""
    order = sorted(labels, key=lambda label: (-labels[label], label))
    parts = [f"{label} {percent(labels[label] / total)}" for label in order[:_SHOWN_LABELS]]
    if more := len(order) - len(parts):
        parts.append(f"{more} more")
    return ", ".join(parts)


def _processes(between: Between) -> Panel:
    """The processes of a supervisor by name, or the only one."""
    resident = between.now.values("idspam_process_resident_bytes", "process")
    cpu = between.rates("idspam_process_cpu_seconds_total", "process")
    if not resident:
        resident = {"service": between.now.total("process_resident_memory_bytes")}
        cpu = {"service": between.rate("process_cpu_seconds_total")}
    restarts = between.now.values("idspam_process_restarts_total", "kind")
    rows = [
        [name, mebibytes(size), percent(cpu.get(name, math.nan)), _restarts(name, restarts)]
        for name, size in resident.items()
    ]
    return Panel("processes", ("", "MiB", "of a core", "restarts of its kind"), rows)


def _restarts(process: str, restarts: Mapping[str, float]) -> str:
    """Restarts of all processes of this kind; worker-3 is of the kind worker."""
    return number(restarts.get(process.partition("-")[0], math.nan))


def number(value: float) -> str:
    """`1,234`, `12.3`, `0.045`: three digits are enough to read at a glance."""
    if math.isnan(value):
        return "-"
    if value == 0 or value >= 100 or (value == int(value) and value >= 1):
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 0.1 else f"{value:.3f}"


def percent(share: float) -> str:
    return "-" if math.isnan(share) else f"{share:.0%}"


def mebibytes(size: float) -> str:
    return f"{size / 2**20:,.1f}"


def add_arguments(parser: ArgumentParser) -> None:
    add_service(parser)
    parser.add_argument(
        "--interval",
        type=positive_seconds,
        default=2.0,
        metavar="S",
        help="seconds between two views; %(default)g",
    )
    parser.add_argument("--once", action="store_true", help="print one view and exit")
    parser.add_argument(
        "--adapters",
        type=count,
        default=10,
        metavar="N",
        help="how many of the busiest; %(default)s",
    )


def run(arguments: Namespace) -> int:
    from rich.console import Console

    width = None if sys.stdout.isatty() else _PRINTED_WIDTH
    console = Console(file=sys.stdout, width=width)
    if not (arguments.once or console.is_terminal):
        raise CommandFailed("standard output is no terminal; --once prints one view")
    with client_of(arguments, retries=ONCE) as client:
        if arguments.once:
            _once(client, arguments, console)
        else:
            _live(client, arguments, console)
    return 0


COMMAND = Command("a live view of the service", run, add_arguments)


def _once(client: "Client", arguments: Namespace, console: "Console") -> None:
    before = _scrape(client)
    time.sleep(arguments.interval)
    console.print(_view(client, before, _scrape(client), arguments, width=console.width))


def _live(client: "Client", arguments: Namespace, console: "Console") -> None:
    """Redraws until Ctrl-C, even while the service is unreachable."""
    from rich.live import Live
    from rich.text import Text

    before = _scrape(client)
    with Live(
        Text("waiting for metrics ..."), console=console, screen=True, auto_refresh=False
    ) as live:
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
                live.update(Text(f"{service_url(arguments.url)}: {error}"))


def _scrape(client: "Client") -> "Scrape":
    return parse(client.metrics(METRICS), seconds=time.monotonic())


def _view(
    client: "Client", before: "Scrape", now: "Scrape", arguments: Namespace, *, width: int
) -> "RenderableType":
    from rich.columns import Columns
    from rich.console import Group
    from rich.text import Text

    between = Between(before, now)
    ready = client.ready()
    state = "ready" if ready.ok else f"not ready: {ready.reason}"
    where = service_url(arguments.url)
    head = Text(f"{where}: {state}; {running(between) or 'no engine'}", style="bold")
    panels = panels_of(between, adapters=arguments.adapters)
    tables: list[RenderableType] = [_shown(panel, width) for panel in panels]
    if width >= _WIDE:
        tables = [Columns(tables[:3], padding=(0, 4), equal=True), *tables[3:]]
    spaced: list[RenderableType] = [head]
    for table in tables:
        spaced += [Text(), table]
    return Group(*spaced)


def _shown(panel: "Panel", width: int) -> "RenderableType":
    """A panel as a table, or where that is too narrow for its words, a few lines for each row."""
    from rich.console import Group
    from rich.text import Text

    least = _least_widths(panel)
    if sum(least) + len(least) - 1 <= width:
        return _table(panel, least)
    lines: list[RenderableType] = [Text(panel.heading, style="bold")]
    for name, *cells in panel.rows:
        facts = [
            cell if heading == LABELS else f"{heading} {cell}".strip()
            for heading, cell in zip(panel.columns[1:], cells, strict=True)
            if cell
        ]
        told = ", ".join(facts)
        told = textwrap.fill(told, width, initial_indent="  ", subsequent_indent="  ")
        lines += [Text(name, overflow="fold"), Text(told)]
    return Group(*lines)


def _least_widths(panel: "Panel") -> list[int]:
    """Of each column, if headings and labels go over several lines and no word is broken."""
    from rich.cells import cell_len

    widths = []
    for at, column in enumerate((panel.heading, *panel.columns[1:])):
        cells = [row[at] for row in panel.rows]
        words = " ".join(cells).split() if column == LABELS else cells
        widths.append(max(map(cell_len, [*column.split(), *words]), default=0))
    return widths


def _table(panel: "Panel", least: Sequence[int]) -> "RenderableType":
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for index, column in enumerate(panel.columns):
        heading = panel.heading if index == 0 else column
        left = index == 0 or column == LABELS
        justify: Literal["left", "right"] = "left" if left else "right"
        table.add_column(Text(heading), justify=justify, min_width=least[index])
    for row in panel.rows:
        table.add_row(*(Text(cell) for cell in row))
    return table
