"""Which plots an experiment gets, from its reports and scores. Draws nothing itself."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from train.experiments.plots import Axis, Line, Point, curves, scatter
from train.experiments.scores import Score
from train.methods import METHODS
from train.metrics import Metric
from train.report import EpochReport, Metrics
from train.runs import RunReport

# The plots of a comparison.
COMPARISON = ("score_parameters", "score_seconds", "learning_curves")

_ORDER = tuple(METHODS)


def write_comparison(
    folder: Path,
    *,
    scores: Mapping[str, Score],
    reports: Mapping[str, Mapping[str, Sequence[RunReport]]],
    metrics: Mapping[str, Metric],
) -> None:
    """Score against parameters and against time, and learning curves.

    Args:
        scores: by method, the mean over all tasks; one without a value has no point.
        reports: by task and method.
    """
    sizes, times = [], []
    for method, score in scores.items():
        if score.mean is None:
            continue
        found = [report for of_task in reports.values() for report in of_task[method]]
        spread = None if score.deviation is None else 100 * score.deviation
        parameters = statistics.fmean(report.trainable_parameters for report in found)
        seconds = statistics.fmean(report.seconds for report in found)
        sizes.append(Point(method, parameters, 100 * score.mean, spread))
        times.append(Point(method, seconds, 100 * score.mean, spread))
    tasks = ", ".join(reports)
    score_axis = Axis(f"mean score over {tasks}, %" if len(tasks) < 50 else "mean score, %")
    if sizes:
        x = Axis("trained parameters", logarithmic=True)
        scatter(folder / COMPARISON[0], sizes, _ORDER, x=x, y=score_axis)
        x = Axis("seconds of training a run", logarithmic=True)
        scatter(folder / COMPARISON[1], times, _ORDER, x=x, y=score_axis)
    panels = {
        f"{task} ({curve_metric(metrics[task])})": [
            learning_curve(method, found, metrics[task])
            for method, found in methods.items()
            if found
        ]
        for task, methods in reports.items()
        if any(methods.values())
    }
    if panels:
        y = Axis("score on the selection rows, %")
        curves(folder / COMPARISON[2], panels, _ORDER, x=Axis("epoch", counts=True), y=y)


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
        scores: by task, one for every value; a value without one is left out.
    """
    places = [
        float(value) if isinstance(value, int) else float(n) for n, value in enumerate(values)
    ]
    lines = []
    for task, found in scores.items():
        known = [
            (place, 100 * score.mean, 100 * (score.deviation or 0.0))
            for place, score in zip(places, found, strict=True)
            if score.mean is not None
        ]
        if known:
            lines.append(Line(task, *(list(part) for part in zip(*known, strict=True))))
    if lines:
        ticks = {place: str(value) for place, value in zip(places, values, strict=True)}
        x = Axis(title, logarithmic=logarithmic, ticks=ticks)
        curves(path, {"": lines}, tuple(scores), x=x, y=Axis("score, %"))


def curve_metric(metric: Metric) -> Metric:
    """What epochs report of a metric: accuracy in place of a correlation."""
    return Metric.ACCURACY if metric is Metric.MATTHEWS else metric


def learning_curve(name: str, reports: Sequence[RunReport], metric: Metric) -> Line:
    """The mean over seeds, as far as every seed went."""
    length = min(len(report.epochs) for report in reports)
    values = [
        statistics.fmean(_selection(report.epochs[epoch], metric) for report in reports)
        for epoch in range(length)
    ]
    return Line(name, range(1, length + 1), [100 * value for value in values])


def _selection(epoch: EpochReport, metric: Metric) -> float:
    assert epoch.accuracy is not None, "runs are judged on selection rows"
    assert epoch.macro_f1 is not None, "runs are judged on selection rows"
    return curve_metric(metric).of(Metrics(epoch.accuracy, epoch.macro_f1, 0.0))
