"""Where an adapter comes from, for its model card: data, training, file.

Knows no figure of quality.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from statistics import median
from typing import Any

from adapters.spec import AdapterSpec
from train.card_details import MOST_LABELS
from train.markdown import fenced, literal, number, table
from train.report import DataReport, EpochReport, FitReport, TrialReport

MOST_EPOCHS = 40
MOST_TRIALS = 40

# Of the spec: what has a row or a place of its own.
_ELSEWHERE = {"backbone", "labels", "calibration", "provenance", "tokenizer_sha256"}


def data_section(data: Mapping[str, DataReport], spec: AdapterSpec) -> Iterator[str]:
    """Which rows were used, by split, and how the labels are spread."""
    labels, past = spec.labels, spec.provenance
    yield "## Data"
    licence = literal(past.data_licence) if past.data_licence else "not stated"
    yield f"{literal(past.data or 'Unnamed')}. Licence of the data: {licence}."
    yield table(
        ("split", "rows", "source", "sha256 of the source"),
        [
            (literal(split), f"{found.rows:,}", literal(found.path), literal(found.sha256))
            for split, found in data.items()
        ],
    )
    counts = {
        split: {label: found.labels.get(label, 0) for label in labels}
        for split, found in data.items()
    }
    if len(labels) <= MOST_LABELS:
        rows = [
            (literal(label), *(f"{found[label]:,}" for found in counts.values()))
            for label in labels
        ]
        yield table(("rows of", *map(literal, data)), rows)
        return
    yield f"Rows of a label, of {len(labels):,} labels:"
    yield table(
        ("split", "least", "of", "median", "most", "of"),
        [(literal(split), *_spread(found)) for split, found in counts.items()],
    )


def _spread(counts: Mapping[str, int]) -> Iterator[str]:
    least, most = min(counts, key=counts.__getitem__), max(counts, key=counts.__getitem__)
    yield from (f"{counts[least]:,}", literal(least))
    yield f"{median(counts.values()):,g}"
    yield from (f"{counts[most]:,}", literal(most))


def training_section(
    report: FitReport, spec: AdapterSpec, *, judge: str | None, place: str
) -> Iterator[str]:
    """How it was trained.

    judge: the split that chose the best epoch. place: machine and versions, Markdown.
    """
    yield "## Training"
    judged = f"judged on {literal(judge)}, as the epochs below" if judge else "judged on no rows"
    yield (
        f"{report.trainable_parameters:,} trained parameters, the backbone's are frozen. Best of "
        f"{len(report.epochs)} epochs: {report.best_epoch}, {judged}. {report.seconds:,.1f} s in "
        f"all, {report.seconds_per_epoch:,.2f} s an epoch, on {place}."
    )
    if report.command is not None:
        yield fenced(report.command, "sh")
    yield table(
        ("epoch", "training loss", "accuracy", "macro-F1", "seconds", ""),
        [
            (
                str(epoch.epoch),
                number(epoch.loss),
                number(epoch.accuracy),
                number(epoch.macro_f1),
                f"{epoch.seconds:,.1f}",
                "kept" if epoch.epoch == report.best_epoch else "",
            )
            for epoch in _thinned(report.epochs, report.best_epoch)
        ],
    )
    elsewhere = spec.model_dump().keys() | {"command"}
    settings = {key: item for key, item in report.settings.items() if key not in elsewhere}
    yield table(("setting", "value"), [(literal(key), _value(settings[key])) for key in settings])
    if report.trials:
        yield from _search(report.trials, judge=judge or "no rows")


def _search(trials: Sequence[TrialReport], *, judge: str) -> Iterator[str]:
    """What else was tried. Rows that chose flatter what they chose."""
    yield "### The search that chose these settings"
    yield (
        f"{len(trials):,} trials, compared by their accuracy on {literal(judge)}; the first one "
        "had the settings of a run without a search. That the best one was taken makes its figures "
        f"on {literal(judge)} better than on other rows."
    )
    ranked = sorted(trials, key=lambda trial: (not trial.chosen, -(trial.accuracy or 0.0)))
    shown = sorted(ranked[:MOST_TRIALS], key=lambda trial: trial.number)
    if len(shown) < len(trials):
        yield f"The best {len(shown)}:"
    names = list(trials[0].settings)
    yield table(
        ("trial", *map(literal, names), "accuracy", "epochs", ""),
        [
            (
                str(trial.number),
                *(_short(trial.settings[name]) for name in names),
                number(trial.accuracy),
                str(trial.epochs),
                "kept" if trial.chosen else literal(trial.outcome),
            )
            for trial in shown
        ],
    )


def file_section(spec: AdapterSpec, file: Mapping[str, Any]) -> Iterator[str]:
    """What the file is, and the switches of the method that its spec declares."""
    rows = {
        **file,
        "backbone": spec.backbone.name,
        "backbone's fingerprint": spec.backbone.fingerprint,
        "tokenizer's sha256": spec.tokenizer_sha256,
        "temperature": spec.calibration.temperature,
        "made by version": spec.provenance.code_version,
        "made at": spec.provenance.created,
        **spec.model_dump(mode="json", exclude=_ELSEWHERE),
    }
    yield "## The file"
    yield table(("field", "value"), [(key, _value(rows[key])) for key in rows])


def _thinned(epochs: Sequence[EpochReport], best: int) -> Iterator[EpochReport]:
    """At most about `MOST_EPOCHS`: every so many, and the best and the last."""
    step = math.ceil(len(epochs) / MOST_EPOCHS)
    for index, epoch in enumerate(epochs):
        if index % step == 0 or epoch.epoch == best or index == len(epochs) - 1:
            yield epoch


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else _value(value)


def _value(value: Any) -> str:
    match value:
        case None:
            return "-"
        case bool():
            return "yes" if value else "no"
        case int() | float():
            return str(value)
        case _:
            return literal(str(value))
