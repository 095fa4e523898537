"""The reports of `fit` and `evaluate`: their data, their JSON and the table printed at the end."""

import json
import math
import os
import platform
import re
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Self

from rich.console import Console
from rich.table import Table
from rich.text import Text

from cli.hints import command_line, option
from cli.tables import show_table
from train.abstaining import Answered
from train.calibration import Calibrated
from train.data.dataset import Dataset
from train.loop.progress import EpochReport
from train.metrics import (
    AnyMetrics,
    Assessment,
    Bin,
    Confusion,
    Estimate,
    LabelFigures,
    Metric,
    MultiLabelMetrics,
    Reliability,
)
from train.report.data_checks import DataChecks, Reading
from train.set_metrics import MultiLabelAssessment

# Labels in the table of `evaluate`; the report has all.
_MOST_LABELS = 40
_MOST_CONFUSIONS = 10
# Labels of which there is a matrix; it has a column for each.
_MOST_COLUMNS = 8
_PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "numpy")


@dataclass(frozen=True, slots=True)
class Baseline:
    """The metrics of a method without a prompt; None for a split that does not exist."""

    validation: AnyMetrics | None
    test: AnyMetrics | None


@dataclass(frozen=True, slots=True)
class DataReport:
    """The rows that were used. labels: how many have each label.

    unlabelled: how many have none; None where every text has one label.
    """

    path: str
    sha256: str
    rows: int
    labels: Mapping[str, int]
    unlabelled: int | None = None

    @classmethod
    def of(cls, dataset: Dataset) -> Self:
        counts = Counter(label for example in dataset.examples for label in example.labels)
        unlabelled = sum(not example.labels for example in dataset.examples)
        return cls(
            dataset.source,
            dataset.sha256,
            len(dataset),
            dict(sorted(counts.items())),
            unlabelled if dataset.multi_label else None,
        )


class TrialOutcome(StrEnum):
    """How a trial of a search ended. `FAILED`: its loss was not finite."""

    FINISHED = "finished"
    PRUNED = "pruned"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class TrialReport:
    """One trial of a search.

    number: from 1. settings: those that it tried; all others were the run's. accuracy: on the
    validation rows after its best epoch, micro-F1 for sets of labels; None if it finished no epoch.
    epochs: how many it trained.
    chosen: whether it became the adapter.
    """

    number: int
    settings: Mapping[str, Any]
    outcome: TrialOutcome
    accuracy: float | None
    epochs: int
    seconds: float
    chosen: bool


@dataclass(frozen=True, slots=True)
class DecisionReport:
    """When an adapter for one label a text abstains.

    abstain_below: None if it never does. precision: for which that was chosen, with the probability
    `train.abstaining.CONFIDENCE`; None if it was set. coverage: what thresholds do on the
    validation rows, or on those of `evaluate`, the most texts answered first. answered: what
    `abstain_below` does on every split that is measured.
    """

    abstain_below: float | None
    precision: float | None
    coverage: tuple[Answered, ...]
    answered: Mapping[str, Answered]


@dataclass(frozen=True, slots=True)
class FitReport:
    """One run of `fit`.

    data: by split: train, validation, test. settings: complete, with a value in place of None.
    cache: mode, bytes, seconds to fill. best_epoch: from 1. seconds: of the whole run.
    assessments: by split. trials: empty without a search. thresholds: by label, where a text has a
    set of labels and they were chosen. calibration: how `temperature` was chosen; None if it was
    not. decision: None for sets of labels, and without measured rows. checks: what was found out
    about the data.
    """

    output: str
    card: str
    validation: AnyMetrics | None
    test: AnyMetrics | None
    majority: Baseline
    head_only: Baseline
    trainable_parameters: int
    seconds: float
    seconds_per_epoch: float
    epochs: tuple[EpochReport, ...]
    best_epoch: int
    temperature: float
    settings: Mapping[str, Any]
    data: Mapping[str, DataReport]
    cache: Mapping[str, str | int | float]
    assessments: Mapping[str, Assessment | MultiLabelAssessment]
    trials: tuple[TrialReport, ...]
    command: str | None
    thresholds: Mapping[str, float] | None = None
    calibration: Calibrated | None = None
    decision: DecisionReport | None = None
    checks: DataChecks = field(default_factory=DataChecks)

    @property
    def metric(self) -> Metric:
        """What judges it, and what chose its epoch and its settings."""
        return Metric.default(multi_label=self.data["train"].unlabelled is not None)

    def to_json(self) -> str:
        """One JSON object; figures that are not finite become null.

        `majority` and `head_only` are accuracies, or micro-F1 for sets of labels, on the test rows
        if there are any, else on the validation rows; `baselines` holds both splits.
        """
        content = asdict(self)
        content["baselines"] = {name: content[name] for name in ("majority", "head_only")}
        content["majority"] = _headline(self.majority, self.metric)
        content["head_only"] = _headline(self.head_only, self.metric)
        return _json(content)


@dataclass(frozen=True, slots=True)
class EvaluationReport:
    """One run of `evaluate`. revision: sha256 of the file. truncated: how many texts were cut.

    assessment: what a model card says about a split: intervals, labels, confusion, calibration.
    decision: what thresholds do on these rows, and the adapter's own; None for sets of labels.
    """

    adapter: str
    revision: str
    metrics: AnyMetrics
    majority: AnyMetrics
    data: DataReport
    truncated: int
    reading: Reading
    seconds: float
    texts_per_second: float
    assessment: Assessment | MultiLabelAssessment
    decision: DecisionReport | None = None

    def to_json(self) -> str:
        """One JSON object; `accuracy`, `macro_f1` and `matthews`, or `micro_f1`, `macro_f1` and
        `exact_match`, and `labels` are at its top level."""
        content = asdict(self)
        labels = {"labels": content["assessment"].pop("labels")}
        return _json(content.pop("metrics") | content | labels)


def versions() -> dict[str, str]:
    """Versions of Python and of the packages whose arithmetic or formats affect a result."""
    numbers = {"python": platform.python_version()}
    for package in _PACKAGES:
        with suppress(PackageNotFoundError):
            numbers[package] = version(package)
    return numbers


def machine() -> str:
    """The CPU of this machine, described for people: `4 CPU cores (its model name)`."""
    return f"{len(os.sched_getaffinity(0))} CPU cores ({_processor()})"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def serving_name(output: str) -> str:
    """A name for serving an adapter: its file's name without characters that names cannot have."""
    stem = Path(output).stem.lower()
    return re.sub("[^a-z0-9._-]+", "-", stem)[:64].strip("._-") or "my-adapter"


def print_fit(report: FitReport, console: Console) -> None:
    """Print the result next to the baselines without a prompt, so that a failed run is obvious."""
    several = report.metric is Metric.MICRO_F1
    title = "labels given correctly" if several else "share of rows answered correctly"
    table = Table(title=title, title_justify="left", title_style="")
    table.add_column("")
    for split in ("validation", "test"):
        if getattr(report, split) is not None:
            names = (f"{split} micro-F1", "macro-F1", "exact match")
            for name in names if several else (split, "macro-F1"):
                table.add_column(name, justify="right")
    constant = "always the same labels" if several else "majority class"
    rows = {
        "this adapter": Baseline(report.validation, report.test),
        "head only": report.head_only,
        constant: report.majority,
    }
    for name, result in rows.items():
        table.add_row(
            name, *_cells(result.validation, report.validation), *_cells(result.test, report.test)
        )
    show_table(console, table)
    if (warning := _warning(report)) is not None:
        print_line(console, warning)
    print_line(
        console,
        f"{report.trainable_parameters:,} trained parameters, "
        f"best of {len(report.epochs)} epochs: {report.best_epoch}, "
        f"{report.seconds:.1f} s ({report.seconds_per_epoch:.2f} s an epoch)",
    )
    for line in report.checks.lines():
        print_line(console, f"data: {line}")
    if report.trials:
        of_methods = "method" in report.trials[0].settings
        found = _methods if of_methods else _search
        print_line(console, found(report.trials, report.metric))
    if report.calibration is not None:
        print_line(console, _calibration(report.calibration))
    if report.decision is not None and report.decision.abstain_below is not None:
        print_line(console, _abstaining(report.decision))
    print_line(console, f"written: {report.output}, and its model card: {report.card}")
    from adapters.backbone.loading import DEFAULT_BACKBONE

    backbone = str(report.settings.get("backbone") or DEFAULT_BACKBONE)
    setting = "" if backbone == DEFAULT_BACKBONE else f"IDSPAM_BACKBONE={shlex.quote(backbone)} "
    print_line(console, f"to serve it: {setting}{command_line('service', 'serve')}")
    words = [
        *option("--adapter", report.output),
        *option("--name", serving_name(report.output)),
    ]
    print_line(console, f"to publish it there: {command_line('train', 'push', *words)}")


def print_evaluation(report: EvaluationReport, console: Console) -> None:
    """Print what a model card says about a split: figures with their intervals next to those of a
    constant answer, labels, confusion, calibration, and what abstaining would do."""
    several = isinstance(report.metrics, MultiLabelMetrics)
    measured = report.assessment
    figures = ("micro_f1", "macro_f1", "exact_match")
    titles = ("micro-F1", "macro-F1", "exact match")
    if not several:
        figures, titles = ("accuracy", "macro_f1", "matthews"), ("accuracy", "macro-F1", "Matthews")
    table = Table()
    table.add_column(f"{report.data.rows:,} rows of {report.data.path}", overflow="fold")
    for heading in ("this adapter", "95 % interval", "the same labels" if several else "majority"):
        table.add_column(heading, justify="right")
    for figure, title in zip(figures, titles, strict=True):
        estimate: Estimate = getattr(measured, figure)
        interval = f"{estimate.low:.4f} to {estimate.high:.4f}"
        values = (getattr(metrics, figure) for metrics in (report.metrics, report.majority))
        own, constant = (f"{value:.4f}" for value in values)
        table.add_row(title, own, interval, constant)
    show_table(console, table)
    show_table(console, _label_table(measured.labels))
    if isinstance(measured, MultiLabelAssessment):
        show_table(console, _size_table(measured.sizes))
    elif measured.matrix is not None and len(measured.labels) <= _MOST_COLUMNS:
        show_table(console, _matrix_table(measured.labels, measured.matrix))
    elif measured.confusions:
        show_table(console, _confusion_table(measured.confusions))
    scaled, unscaled = measured.scaled, measured.unscaled
    show_table(console, _bin_table(scaled.bins, several=several))
    print_line(console, _reliability(scaled))
    if scaled.temperature != unscaled.temperature:
        print_line(console, _reliability(unscaled))
    if report.decision is not None:
        show_table(console, _coverage_table(report.decision.coverage))
        if report.decision.abstain_below is not None:
            print_line(console, _abstaining(report.decision))
    cut = f", {report.truncated:,} texts were cut" if report.truncated else ""
    if report.reading.unreadable:
        cut += f", {report.reading.unreadable:,} have more than a tenth of unknown tokens"
    print_line(console, f"{report.seconds:.1f} s, {report.texts_per_second:,.0f} texts/s{cut}")
    print_line(console, f"{report.adapter}, revision {report.revision}")


def _reliability(scores: Reliability) -> str:
    return (
        f"at temperature {scores.temperature:.4g}: calibration error "
        f"{scores.expected_calibration_error:.4f}, Brier score {scores.brier:.4f}, negative "
        f"log-likelihood {scores.negative_log_likelihood:.4f}"
    )


def _bin_table(bins: Sequence[Bin], *, several: bool) -> Table:
    """How often scores are right: a well calibrated adapter has the same figure twice."""
    table = Table()
    table.add_column("score" if several else "top score", justify="right")
    share = "share with the label" if several else "accuracy"
    for name in ("decisions" if several else "rows", "mean score", share):
        table.add_column(name, justify="right")
    for part in bins:
        if part.rows and part.score is not None and part.accuracy is not None:
            span = f"{part.low:.2f} to {part.high:.2f}"
            table.add_row(span, f"{part.rows:,}", f"{part.score:.4f}", f"{part.accuracy:.4f}")
    return table


def _size_table(sizes: Sequence[tuple[int, int, int]]) -> Table:
    table = Table()
    for name in ("labels of a row", "rows that have so many", "rows that were given so many"):
        table.add_column(name, justify="right")
    for size, having, given in sizes:
        table.add_row(f"{size:,}", f"{having:,}", f"{given:,}")
    return table


def _matrix_table(labels: Sequence[LabelFigures], matrix: Sequence[Sequence[int]]) -> Table:
    """Rows are true labels, columns answers."""
    table = Table()
    table.add_column("label, and what was answered", overflow="fold")
    for label in labels:
        table.add_column(Text(label.label), justify="right", overflow="fold")
    for label, counts in zip(labels, matrix, strict=True):
        table.add_row(Text(label.label), *(f"{count:,}" for count in counts))
    return table


def _confusion_table(confusions: Sequence[Confusion]) -> Table:
    """The most frequent mistakes."""
    table = Table()
    for name in ("label", "answered instead"):
        table.add_column(name, overflow="fold")
    table.add_column("rows", justify="right")
    for mistake in confusions[:_MOST_CONFUSIONS]:
        table.add_row(Text(mistake.true), Text(mistake.predicted), f"{mistake.count:,}")
    return table


def _label_table(labels: Sequence[LabelFigures]) -> Table:
    """Precision and recall, for the labels with the most rows."""
    most = sorted(labels, key=lambda label: -label.support)[:_MOST_LABELS]
    more = f", the {len(most)} most frequent of {len(labels)}" if len(labels) > len(most) else ""
    table = Table()
    table.add_column(f"label{more}", overflow="fold")
    for name in ("rows", "given", "precision", "recall", "F1"):
        table.add_column(name, justify="right")
    for label in most:
        figures = (label.precision, label.recall, label.f1)
        shown = ("-" if figure is None else f"{figure:.4f}" for figure in figures)
        table.add_row(Text(label.label), f"{label.support:,}", f"{label.predicted:,}", *shown)
    return table


def _coverage_table(coverage: Sequence[Answered]) -> Table:
    """What abstaining would do: every second threshold, those that answer the most first."""
    table = Table()
    for name in ("abstain below", "answered", "accuracy of these"):
        table.add_column(name, justify="right")
    for part in coverage[::2]:
        accuracy = "-" if part.accuracy is None else f"{part.accuracy:.4f}"
        table.add_row(f"{part.threshold:.6f}", f"{part.coverage:.1%}", accuracy)
    return table


def _methods(trials: Sequence[TrialReport], metric: Metric) -> str:
    """`methods by validation accuracy: head-only 0.8120, vectors 0.9010 (kept), ...`."""
    figures = (
        f"{trial.settings['method']} "
        f"{'failed' if trial.accuracy is None else format(trial.accuracy, '.4f')}"
        f"{' (kept)' if trial.chosen else ''}"
        for trial in trials
    )
    return f"methods by validation {metric.value}: {', '.join(figures)}"


def _search(trials: Sequence[TrialReport], metric: Metric) -> str:
    """`search: trial 7 of 20 (validation accuracy 0.9312; the first, the defaults: 0.9201)`."""
    chosen = next(trial for trial in trials if trial.chosen)
    first = trials[0].accuracy
    defaults = "-" if first is None else f"{first:.4f}"
    figure = metric.replace("-f1", "-F1")
    return (
        f"search: trial {chosen.number} of {len(trials)} (validation {figure} "
        f"{chosen.accuracy:.4f}; the first, without a search: {defaults})"
    )


def _calibration(calibrated: Calibrated) -> str:
    """`temperature 1.4: calibration error 0.0312, 0.0871 at 1 (cross-fitted on ...)`."""
    rows = f"{calibrated.rows:,} validation rows"
    if calibrated.fitted is None or calibrated.cross_fitted is None:
        return f"temperature 1: {rows} are too few to fit another"
    if calibrated.kept:
        return (
            f"temperature {calibrated.temperature:.4g}: calibration error {calibrated.after:.4f}, "
            f"{calibrated.before:.4f} at 1 (cross-fitted on {rows})"
        )
    return (
        f"temperature 1: calibration error {calibrated.before:.4f}; {calibrated.fitted:.4g} does "
        f"not lower both the error ({calibrated.cross_fitted:.4f}) and the loss (cross-fitted on "
        f"{rows})"
    )


def _abstaining(decision: DecisionReport) -> str:
    """`abstains below 0.81: of validation it answers 92.1 %, 97.3 % of these correctly; of ...`."""
    shares = []
    for split, part in decision.answered.items():
        right = "" if part.accuracy is None else f", {part.accuracy:.1%} of these correctly"
        shares.append(f"of {split} it answers {part.coverage:.1%}{right}")
    how = (
        f"abstains below {decision.abstain_below:g}" if decision.abstain_below else "never abstains"
    )
    return f"{how}: {'; '.join(shares)}".replace("%", " %")


def _warning(report: FitReport) -> str | None:
    """Compares with the baselines on the test rows, else on the validation rows."""
    for split in ("test", "validation"):
        adapter: AnyMetrics | None = getattr(report, split)
        majority: AnyMetrics | None = getattr(report.majority, split)
        head: AnyMetrics | None = getattr(report.head_only, split)
        if adapter is None:
            continue
        score = report.metric.of
        if majority is not None and score(adapter) <= score(majority):
            same = "the majority class" if report.metric is Metric.ACCURACY else "the same labels"
            return f"warning: on {split}, no better than always answering {same}"
        if head is not None and score(adapter) <= score(head):
            return f"warning: on {split}, no better than a head alone on the frozen backbone"
        return None
    return "warning: nothing was measured: there are no validation and no test rows"


def _headline(baseline: Baseline, metric: Metric) -> float | None:
    metrics = baseline.test or baseline.validation
    return None if metrics is None else metric.of(metrics)


def _cells(metrics: AnyMetrics | None, column: AnyMetrics | None) -> tuple[str, ...]:
    if column is None:
        return ()
    several = isinstance(column, MultiLabelMetrics)
    names = ("micro_f1", "macro_f1", "exact_match") if several else ("accuracy", "macro_f1")
    if metrics is None:
        return ("-",) * len(names)
    return tuple(f"{getattr(metrics, name):.4f}" for name in names)


def print_line(console: Console, text: str) -> None:
    """Print a line without wrapping it, because people copy paths and commands."""
    console.print(text, soft_wrap=True, markup=False, highlight=False)


def _json(content: dict[str, Any]) -> str:
    finite = _finite(content | {"versions": versions()})
    return json.dumps(finite, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
