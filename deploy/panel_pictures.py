"""Draws the dashboard's panels with data of a running Prometheus, where Grafana is not at hand.

    python -m deploy.panel_pictures --prometheus http://127.0.0.1:9090 --output pictures

Each row of the dashboard becomes a picture, in light and in dark. The expressions are those of
`deploy.panels`, with Grafana's variables filled in. So the pictures show what expressions, units
and legends make of real data, and not how Grafana draws.
"""

import argparse
import json
import math
import re
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.dates import AutoDateLocator, DateFormatter
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from deploy.panels import ROWS, STATS, Chart, Query

COLUMNS = 3
STEPS = 120
# Curves that a legend names; Grafana's scrolls.
_NAMED = 11
_COLOURS = (
    *("#73BF69", "#F2CC0C", "#5794F2", "#FF780A", "#F2495C", "#8AB8FF", "#B877D9", "#19730E"),
    *("#C4162A", "#1F60C4", "#8F3BB8", "#FFA6B0"),
)
# Background, text, grid.
THEMES: Mapping[str, tuple[str, str, str]] = {
    "light": ("#FFFFFF", "#24292E", "#E4E7E7"),
    "dark": ("#181B1F", "#CCCCDC", "#2F3237"),
}
_IEC = ("B", "KiB", "MiB", "GiB", "TiB")
_SHORT = ("", " K", " Mil", " Bil")
_SECONDS_A_DAY = 86400.0


@dataclass(frozen=True, slots=True)
class Curve:
    """values: at the times of its source; NaN where there is none."""

    name: str
    values: Sequence[float]

    @property
    def last(self) -> float:
        """The last value, as Grafana shows in a panel with one number."""
        return next((value for value in reversed(self.values) if math.isfinite(value)), math.nan)


class Source:
    """A Prometheus server, and the time that is drawn.

    Args:
        interval: what `$__rate_interval` becomes: four times the scrape interval.

    Attributes:
        times: seconds since the epoch.
    """

    def __init__(self, url: str, *, minutes: float, interval: str) -> None:
        self._url = url.rstrip("/")
        self._interval = interval
        self._step = 60 * minutes / STEPS
        start = round(time.time() - 60 * minutes, 3)
        self.times = [start + number * self._step for number in range(STEPS + 1)]

    def curves(self, query: Query) -> list[Curve]:
        """
        Raises:
            OSError: the server does not answer, or refuses the expression.
        """
        expression = self.expression(query.expression)
        parameters = {
            "query": expression,
            "start": f"{self.times[0]:.3f}",
            "end": f"{self.times[-1] + self._step / 2:.3f}",
            "step": f"{self._step:.3f}",
        }
        data = urllib.parse.urlencode(parameters).encode()
        try:
            with urllib.request.urlopen(
                f"{self._url}/api/v1/query_range", data, timeout=30
            ) as answer:
                result = json.load(answer)["data"]["result"]
        except urllib.error.HTTPError as error:
            raise OSError(f"{expression}: {json.load(error).get('error')}") from None
        return [self._curve(series, query.legend) for series in result]

    def expression(self, text: str) -> str:
        """An expression with Grafana's variables filled in: everything is chosen."""
        for variable, value in (
            ("$__range", f"{round(self.times[-1] - self.times[0])}s"),
            ("$__rate_interval", self._interval),
            ("$instance", ".*"),
            ("$adapter", ".*"),
        ):
            text = text.replace(variable, value)
        return text

    def _curve(self, series: Mapping[str, Any], legend: str) -> Curve:
        values = [math.nan] * len(self.times)
        for at, value in series["values"]:
            values[round((float(at) - self.times[0]) / self._step)] = float(value)
        return Curve(legend_of(legend, series["metric"]), values)


def legend_of(template: str, labels: Mapping[str, str]) -> str:
    """Grafana's `{{label}}`, filled in."""
    return re.sub(r"\{\{\s*(\w+)\s*\}\}", lambda found: labels.get(found[1], ""), template)


def shown(value: float, unit: str) -> str:
    """A value in one of Grafana's units."""
    if not math.isfinite(value):
        return "no data"
    match unit:
        case "s":
            return _seconds(value)
        case "bytes":
            power = min(int(math.log(abs(value), 1024)), len(_IEC) - 1) if abs(value) >= 1 else 0
            return f"{value / 1024**power:.3g} {_IEC[power]}"
        case "percentunit":
            return f"{100 * value:.3g}%"
        case "percent":
            return f"{value:.3g}%"
        case "reqps":
            return f"{_short(value)} req/s"
        case "ops":
            return f"{_short(value)} ops/s"
        case "cps":
            return f"{_short(value)} c/s"
        case _:
            return _short(value)


def _short(value: float) -> str:
    power = min(int(math.log10(abs(value)) // 3), len(_SHORT) - 1) if abs(value) >= 1000 else 0
    return f"{value / 1000**power:.3g}{_SHORT[power]}"


def _seconds(value: float) -> str:
    if value == 0:
        return "0 s"
    factor, name = next(
        ((factor, name) for factor, name in ((1.0, "s"), (1e3, "ms")) if abs(value) * factor >= 1),
        (1e6, "µs"),
    )
    return f"{value * factor:.3g} {name}"


def draw_chart(
    axes: Axes, chart: Chart, curves: Sequence[Curve], times: Sequence[float], theme: str
) -> None:
    """One panel with curves over time."""
    _, text, grid = THEMES[theme]
    axes.set_title(chart.title, fontsize=9, loc="left", color=text, fontweight="bold", wrap=True)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: shown(value, chart.unit)))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_locator(AutoDateLocator(maxticks=6))  # type: ignore[no-untyped-call]
    axes.xaxis.set_major_formatter(DateFormatter("%H:%M"))  # type: ignore[no-untyped-call]
    axes.grid(visible=True, color=grid, linewidth=0.8)
    axes.tick_params(labelsize=7, colors=text, length=0)
    for side in axes.spines.values():
        side.set_visible(False)
    days = [at / _SECONDS_A_DAY for at in times]
    axes.set_xlim(days[0], days[-1])
    if not curves:
        axes.text(0.5, 0.5, "No data", transform=axes.transAxes, ha="center", color=text)
        axes.set_yticks([])
        return
    base = [0.0] * len(times)
    for curve, next_colour in zip(curves, cycle(_COLOURS), strict=False):
        colour = chart.colours.get(curve.name, next_colour)
        if chart.stacked:
            # As in Grafana, what is missing counts as nothing.
            top = [
                low + (value if math.isfinite(value) else 0.0)
                for low, value in zip(base, curve.values, strict=True)
            ]
            axes.fill_between(days, base, top, color=colour, alpha=0.2, linewidth=0)
            line = [
                high if math.isfinite(value) else math.nan
                for high, value in zip(top, curve.values, strict=True)
            ]
            axes.plot(days, line, color=colour, linewidth=1.2, label=curve.name)
            base = top
        else:
            axes.plot(days, curve.values, color=colour, linewidth=1.2, label=curve.name)
    if not chart.signed:
        axes.set_ylim(bottom=0)
    handles, names = axes.get_legend_handles_labels()
    legend = axes.legend(
        handles[:_NAMED],
        names[:_NAMED],
        loc="upper left",
        bbox_to_anchor=(-0.06, -0.1),
        ncols=2 if max(map(len, names)) < 30 else 1,
        fontsize=6.5,
        frameon=False,
        handlelength=1.2,
    )
    for entry in legend.get_texts():
        entry.set_color(text)


def draw_row(
    title: str, panels: Sequence[tuple[Chart, Sequence[Curve]]], source: Source, theme: str
) -> Figure:
    """A row of the dashboard."""
    background, text, _ = THEMES[theme]
    lines = math.ceil(len(panels) / COLUMNS)
    figure = Figure(figsize=(5.2 * COLUMNS, 3.9 * lines), dpi=90, layout="constrained")
    figure.set_facecolor(background)
    figure.suptitle(title, color=text, fontsize=12, ha="left", x=0.01)
    for number, (chart, curves) in enumerate(panels):
        axes = figure.add_subplot(lines, COLUMNS, number + 1)
        axes.set_facecolor(background)
        draw_chart(axes, chart, curves, source.times, theme)
    return figure


def draw_stats(stats: Sequence[tuple[str, str]], theme: str) -> Figure:
    """The first row: a title and a text each."""
    background, text, _ = THEMES[theme]
    figure = Figure(figsize=(5.2 * COLUMNS, 1.8), dpi=90)
    figure.set_facecolor(background)
    for number, (title, value) in enumerate(stats):
        x = (number + 0.5) / len(stats)
        figure.text(x, 0.82, title, ha="center", color=text, fontsize=9, fontweight="bold")
        size = 20 if len(value) < 14 else 8
        figure.text(x, 0.35, value, ha="center", color=text, fontsize=size, wrap=True)
    return figure


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m deploy.panel_pictures", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--prometheus", required=True, metavar="URL")
    parser.add_argument("--output", required=True, type=Path, metavar="FOLDER")
    parser.add_argument("--minutes", type=float, default=30.0, help="of data; default: %(default)g")
    parser.add_argument(
        "--rate-interval", default="1m", help="four times the scrape interval; default: %(default)s"
    )
    parser.add_argument("--theme", choices=sorted(THEMES), help="default: both")
    arguments = parser.parse_args(argv)
    themes = [arguments.theme] if arguments.theme else list(THEMES)
    arguments.output.mkdir(parents=True, exist_ok=True)
    source = Source(
        arguments.prometheus, minutes=arguments.minutes, interval=arguments.rate_interval
    )
    empty = []
    try:
        stats = []
        for title, unit, expression, legend in STATS:
            curves = source.curves(Query(expression, legend))
            value = ", ".join(c.name if legend else shown(c.last, unit) for c in curves)
            stats.append((title, value or "No data"))
        rows = []
        for title, charts in ROWS:
            panels = [
                (chart, [curve for query in chart.queries for curve in source.curves(query)])
                for chart in charts
            ]
            empty += [f"{title}: {chart.title}" for chart, curves in panels if not curves]
            rows.append((title, panels))
    except OSError as error:
        sys.stderr.write(f"panel_pictures: {error}\n")
        return 2
    for theme in themes:
        draw_stats(stats, theme).savefig(arguments.output / f"0-overview-{theme}.png")
        for number, (title, panels) in enumerate(rows, 1):
            name = f"{number}-{title.lower().replace(' ', '-')}-{theme}.png"
            draw_row(title, panels, source, theme).savefig(arguments.output / name)
    sys.stdout.write(f"written: {len(themes) * (1 + len(rows))} pictures in {arguments.output}\n")
    for panel in empty:
        sys.stdout.write(f"no data: {panel}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
