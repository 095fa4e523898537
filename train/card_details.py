"""One measured split of a model card in detail: labels, confusion, calibration, coverage.

Knows the assessment alone, no adapter and no run.
"""

import math
from collections.abc import Iterator

from train.assessment import Assessment, Bin, LabelFigures, Reliability
from train.markdown import fenced, literal, number, table

MOST_LABELS = 40
WEAKEST_LABELS = 20
CHART_WIDTH = 40

_LEGEND = "█ accuracy, │ mean score: where a bar ends before the line, scores promise too much\n"


def details(split: str, found: Assessment) -> Iterator[str]:
    """Markdown blocks; all labels up to `MOST_LABELS`, above that those of lowest F1."""
    yield from _labels(split, found)
    yield from _confusion(split, found)
    yield from _calibration(split, found)
    yield from _coverage(split, found)


def _labels(split: str, found: Assessment) -> Iterator[str]:
    occurring = [label for label in found.labels if label.f1 is not None]
    if len(found.labels) <= MOST_LABELS:
        yield f"### Labels, on {literal(split)}"
        shown = list(found.labels)
    else:
        shown = sorted(occurring, key=_f1)[:WEAKEST_LABELS]
        yield f"### The {len(shown)} labels of lowest F1, on {literal(split)}"
    yield table(
        ("label", "rows", "answers", "precision", "recall", "F1"),
        [
            (
                literal(label.label),
                f"{label.support:,}",
                f"{label.predicted:,}",
                number(label.precision),
                number(label.recall),
                number(label.f1),
            )
            for label in shown
        ],
    )


def _f1(label: LabelFigures) -> float:
    return 0.0 if label.f1 is None else label.f1


def _confusion(split: str, found: Assessment) -> Iterator[str]:
    yield f"### Confusion, on {literal(split)}"
    if found.matrix is not None:
        names = [literal(label.label) for label in found.labels]
        yield "A row is a true label, a column an answer."
        yield table(
            ("", *names),
            [
                (name, *(f"{count:,}" for count in counts))
                for name, counts in zip(names, found.matrix, strict=True)
            ],
        )
    elif found.confusions:
        yield "The most frequent mistakes:"
        yield table(
            ("true label", "answer", "rows"),
            [
                (literal(item.true), literal(item.predicted), f"{item.count:,}")
                for item in found.confusions
            ],
        )
    else:
        yield "There was no mistake."


def _calibration(split: str, found: Assessment) -> Iterator[str]:
    yield f"### Calibration, on {literal(split)}"
    yield (
        "Whether what scores .9 is right nine times of ten. The expected calibration error is the "
        "mean distance between score and accuracy in the table below; lower is better for all "
        "three. Likelihood in nats."
    )
    measured = [found.unscaled]
    if found.scaled.temperature != found.unscaled.temperature:
        measured.append(found.scaled)
    yield table(
        (
            "scores",
            "expected calibration error",
            "Brier score (0 to 2)",
            "negative log-likelihood",
        ),
        [(_temperature(item), *_errors(item)) for item in measured],
    )
    filled = [item for item in found.scaled.bins if item.rows]
    yield f"The top score, {_temperature(found.scaled)}, against how often it is right:"
    yield table(
        ("top score", "rows", "mean score", "accuracy"),
        [
            (_range(item), f"{item.rows:,}", number(item.score), number(item.accuracy))
            for item in filled
        ],
    )
    yield fenced("\n".join([_LEGEND, *map(_bar, filled)]))


def _temperature(found: Reliability) -> str:
    return f"at temperature {found.temperature:.4g}"


def _errors(found: Reliability) -> tuple[str, ...]:
    return (
        number(found.expected_calibration_error),
        number(found.brier),
        number(found.negative_log_likelihood),
    )


def _range(item: Bin) -> str:
    return f"{item.low:.2f} to {item.high:.2f}"


def _bar(item: Bin) -> str:
    assert item.accuracy is not None
    assert item.score is not None
    right = round(item.accuracy * CHART_WIDTH)
    cells = list("█" * right + "·" * (CHART_WIDTH - right))
    # Between the cells up to the score and those above it.
    cells.insert(round(item.score * CHART_WIDTH), "│")
    return f"{_range(item)} {''.join(cells)} {item.accuracy:.2f} of {item.rows:,}"


def _coverage(split: str, found: Assessment) -> Iterator[str]:
    yield f"### Answering only what it is sure of, on {literal(split)}"
    yield (
        "Answer texts whose top score is at least the threshold, give the others to people: how "
        "many are answered, and how many of these correctly."
    )
    yield table(
        ("most confident", "threshold", "rows answered", "accuracy"),
        [
            (
                f"{item.coverage * 100:.0f} %",
                # Rounded down: rounded up it would shut out rows that are counted here.
                f"{math.floor(item.threshold * 1e6) / 1e6:.6f}",
                f"{item.rows:,}",
                number(item.accuracy),
            )
            for item in found.coverage
        ],
    )
