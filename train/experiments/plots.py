"""Plots for a README, as PNG and SVG, drawn without a display.

The colours are Okabe and Ito's, distinct for any colour vision, without their yellow, which is too
pale for a line on white. Where colours repeat, marker and line style differ.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import Bbox

from train.experiments.cells import RunReport
from train.experiments.tables import Score
from train.loop.progress import EpochReport
from train.methods import METHODS
from train.metrics import Metric, Metrics, MultiLabelMetrics

# The plots of a comparison.
COMPARISON_PLOTS = ("score_parameters", "score_seconds", "learning_curves")

_ORDER = tuple(METHODS)
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
_LINES = ("-", "--", ":", "-.")
_MARKERS = "osD^vP*Xp<>h"
_DPI = 150
_PANEL = (4.2, 3.1)
_COLUMNS = 3
# Possible positions of a label around its point, in points: the nearest free one is used.
_OFFSETS = [
    (round(radius * math.cos(turn)), round(radius * math.sin(turn)))
    for radius in (8, 16, 26, 38, 52)
    for turn in (math.pi * step / 4 for step in (0, 1, 7, 2, 6, 4, 3, 5))
]


@dataclass(frozen=True, slots=True)
class Point:
    """A labelled point. spread: half the length of its error bar; None draws no bar."""

    name: str
    x: float
    y: float
    spread: float | None = None


@dataclass(frozen=True, slots=True)
class Line:
    """A named line. spreads: of its points, as in `Point`."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    spreads: Sequence[float | None] = ()


@dataclass(frozen=True, slots=True)
class Axis:
    """The label and the scale of an axis.

    counts: whether only whole numbers make sense. ticks: texts by value.
    """

    label: str
    logarithmic: bool = False
    counts: bool = False
    ticks: Mapping[float, str] | None = None


def write_comparison(
    folder: Path,
    *,
    scores: Mapping[str, Score],
    reports: Mapping[str, Mapping[str, Sequence[RunReport]]],
    metrics: Mapping[str, Metric],
) -> None:
    """Score against parameters and against time, and learning curves.

    Args:
        scores: by method, the mean over all tasks; a method without a value gets no point.
        reports: by task and method.
    """
    sizes, times = [], []
    for method, score in scores.items():
        if score.mean is None:
            continue
        runs = [report for by_method in reports.values() for report in by_method[method]]
        spread = None if score.deviation is None else 100 * score.deviation
        parameters = statistics.fmean(report.trainable_parameters for report in runs)
        seconds = statistics.fmean(report.seconds for report in runs)
        sizes.append(Point(method, parameters, 100 * score.mean, spread))
        times.append(Point(method, seconds, 100 * score.mean, spread))
    tasks = ", ".join(reports)
    score_axis = Axis(f"mean score over {tasks}, %" if len(tasks) < 50 else "mean score, %")
    if sizes:
        x = Axis("trained parameters", logarithmic=True)
        scatter(folder / COMPARISON_PLOTS[0], sizes, _ORDER, x=x, y=score_axis)
        x = Axis("seconds of training a run", logarithmic=True)
        scatter(folder / COMPARISON_PLOTS[1], times, _ORDER, x=x, y=score_axis)
    panels = {
        f"{task} ({curve_metric(metrics[task])})": [
            learning_curve(method, runs, metrics[task])
            for method, runs in by_method.items()
            if runs
        ]
        for task, by_method in reports.items()
        if any(by_method.values())
    }
    if panels:
        y = Axis("score on the selection rows, %")
        curves(folder / COMPARISON_PLOTS[2], panels, _ORDER, x=Axis("epoch", counts=True), y=y)


def write_switch(
    path: Path,
    *,
    title: str,
    values: Sequence[object],
    scores: Mapping[str, Sequence[Score]],
    logarithmic: bool,
) -> None:
    """Score against the values of a switch, a line for every task.

    Args:
        scores: by task, one for every value; those without a figure are left out.
    """
    positions = [
        float(value) if isinstance(value, int) else float(n) for n, value in enumerate(values)
    ]
    lines = []
    for task, of_task in scores.items():
        known = [
            (position, 100 * score.mean, 100 * (score.deviation or 0.0))
            for position, score in zip(positions, of_task, strict=True)
            if score.mean is not None
        ]
        if known:
            lines.append(Line(task, *(list(part) for part in zip(*known, strict=True))))
    if lines:
        ticks = {x: str(value) for x, value in zip(positions, values, strict=True)}
        x = Axis(title, logarithmic=logarithmic, ticks=ticks)
        curves(path, {"": lines}, tuple(scores), x=x, y=Axis("score, %"))


def curve_metric(metric: Metric) -> Metric:
    """The metric of a learning curve: epochs report no correlation, so accuracy replaces it."""
    return Metric.ACCURACY if metric is Metric.MATTHEWS else metric


def learning_curve(name: str, reports: Sequence[RunReport], metric: Metric) -> Line:
    """The mean over the seeds, up to the last epoch that all of them reached."""
    length = min(len(report.epochs) for report in reports)
    values = [
        statistics.fmean(_selection(report.epochs[epoch], metric) for report in reports)
        for epoch in range(length)
    ]
    return Line(name, range(1, length + 1), [100 * value for value in values])


def _selection(epoch: EpochReport, metric: Metric) -> float:
    assert epoch.accuracy is not None, "runs are judged on selection rows"
    assert epoch.macro_f1 is not None, "runs are judged on selection rows"
    if epoch.micro_f1 is not None:
        return metric.of(MultiLabelMetrics(epoch.micro_f1, epoch.macro_f1, epoch.accuracy))
    return curve_metric(metric).of(Metrics(epoch.accuracy, epoch.macro_f1, 0.0))


def scatter(path: Path, points: Sequence[Point], order: Sequence[str], *, x: Axis, y: Axis) -> None:
    """Labelled points.

    Args:
        path: without extension; `.png` and `.svg` are written.
        order: all names, so that each looks the same in every plot.
    """
    figure = Figure(figsize=(7.2, 4.6), layout="constrained")
    axes = figure.add_subplot()
    for point in points:
        axes.errorbar(
            point.x,
            point.y,
            yerr=point.spread,
            capsize=2,
            linestyle="none",
            elinewidth=0.8,
            markersize=7,
            **_look(point.name, order),
        )
    _format_axes(axes, x, y)
    axes.margins(x=0.12, y=0.12)
    figure.draw_without_rendering()
    place_labels(axes, points)
    _save(figure, path)


def curves(
    path: Path, panels: Mapping[str, Sequence[Line]], order: Sequence[str], *, x: Axis, y: Axis
) -> None:
    """A panel of lines for every title, with one legend for all."""
    columns = min(_COLUMNS, len(panels))
    height = math.ceil(len(panels) / columns)
    names = [
        name for name in order if any(name == line.name for p in panels.values() for line in p)
    ]
    legend_rows = math.ceil(len(names) / (2 * columns))
    size = (_PANEL[0] * columns, _PANEL[1] * height + 0.3 * legend_rows)
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(height, columns, squeeze=False)
    handles: dict[str, Any] = {}
    for axes, (title, lines) in zip(grid.flat, panels.items(), strict=False):
        for line in lines:
            style = _look(line.name, order) | {"linestyle": _line_style(line.name, order)}
            spreads = [spread or 0.0 for spread in line.spreads] or None
            handles[line.name] = axes.errorbar(
                line.x,
                line.y,
                yerr=spreads,
                capsize=2,
                elinewidth=0.8,
                markersize=3.5,
                linewidth=1.2,
                **style,
            )
        axes.set_title(title, fontsize=10)
        _format_axes(axes, x, y)
    for axes in list(grid.flat)[len(panels) :]:
        axes.remove()
    if len(names) > 1:
        figure.legend(
            [handles[name] for name in names],
            names,
            loc="outside lower center",
            ncols=2 * columns,
            fontsize=8,
            frameon=False,
        )
    _save(figure, path)


def _look(name: str, order: Sequence[str]) -> dict[str, Any]:
    index = order.index(name)
    colour, marker = _COLOURS[index % len(_COLOURS)], _MARKERS[index % len(_MARKERS)]
    return {"color": colour, "marker": marker}


def _line_style(name: str, order: Sequence[str]) -> str:
    return _LINES[order.index(name) // len(_COLOURS) % len(_LINES)]


def _format_axes(axes: Axes, x: Axis, y: Axis) -> None:
    axes.set_xlabel(x.label)
    axes.set_ylabel(y.label)
    if x.logarithmic:
        axes.set_xscale("log")
    if x.counts:
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    if x.ticks is not None:
        axes.set_xticks(list(x.ticks), labels=list(x.ticks.values()), minor=False)
        axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def place_labels(axes: Axes, points: Sequence[Point]) -> None:
    """Put each label at the nearest position that covers no point and no other label."""
    to_pixels = axes.transData.transform
    taken = [
        Bbox.from_extents(*(to_pixels((p.x, p.y)) - 8), *(to_pixels((p.x, p.y)) + 8))
        for p in points
    ]
    frame = axes.get_window_extent()
    for point in points:
        label = axes.annotate(
            point.name, (point.x, point.y), xytext=(0, 0), textcoords="offset points", fontsize=8
        )
        collisions: dict[tuple[int, int], int] = {}
        for offset in _OFFSETS:
            box = _move(label, offset)
            outside = not (
                frame.x0 <= box.x0
                and box.x1 <= frame.x1
                and frame.y0 <= box.y0 <= box.y1 <= frame.y1
            )
            collisions[offset] = sum(box.overlaps(other) for other in taken) + outside
            if not collisions[offset]:
                break
        taken.append(_move(label, min(collisions, key=collisions.__getitem__)))


def _move(label: Annotation, offset: tuple[int, int]) -> Bbox:
    """Put a label at this offset from its point; the box that it covers then."""
    across, up = ((part > 0) - (part < 0) + 1 for part in offset)
    label.set_position(offset)
    label.set_horizontalalignment(("right", "center", "left")[across])
    label.set_verticalalignment(("top", "center", "bottom")[up])
    return label.get_window_extent()


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Without salt and date, the same picture gives the same file.
    with mpl.rc_context({"svg.hashsalt": path.name}):
        figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})
    figure.savefig(path.with_suffix(".png"), dpi=_DPI)
