"""`evaluate --rows`: a file with a row for every text, what was answered and how surely."""

import json
from collections.abc import Iterator
from pathlib import Path

from adapters.format.durable import write_atomically
from cli.text_files import csv_row
from train.data.dataset import Label
from train.report.data_checks import label_cell
from train.report.evaluation import Evaluation

HEAD = ("line", "text", "text_pair", "label", "predicted", "correct", "score", "label_score", "cut")


def write_rows(path: Path, evaluation: Evaluation) -> None:
    """Write the rows in their order: CSV, or JSONL with the scores of all labels.

    `score` is that of the answer, `label_score` that of the true label. With sets of labels they
    are those of the least sure decision of the answer, and of the worst one for the true set.
    """
    rows = _rows(evaluation)
    if path.suffix == ".jsonl":
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_atomically(path, "".join(lines).encode())
        return
    table = [csv_row(HEAD)]
    for row in rows:
        labels = {name: _cell(row[name]) for name in ("label", "predicted")}
        flags = {name: "yes" if row[name] else "no" for name in ("correct", "cut")}
        shown = {name: f"{row[name]:.6f}" for name in ("score", "label_score")}
        cells = row | labels | flags | shown
        table.append(csv_row(cells[name] for name in HEAD))
    write_atomically(path, "".join(table).encode())


def _cell(value: object) -> str:
    assert isinstance(value, str | tuple)
    return label_cell(value)


def _rows(evaluation: Evaluation) -> Iterator[dict[str, object]]:
    labels = evaluation.spec.labels
    index = {label: position for position, label in enumerate(labels)}
    for number, example in enumerate(evaluation.data.examples):
        scores: list[float] = evaluation.scores[number].tolist()
        predicted: Label
        if evaluation.spec.multi_label:
            given = evaluation.predicted[number].tolist()
            predicted = tuple(label for label, each in zip(labels, given, strict=True) if each)
            score, label_score = (
                min(
                    share if label in chosen else 1 - share
                    for label, share in zip(labels, scores, strict=True)
                )
                for chosen in (predicted, example.labels)
            )
        else:
            predicted = labels[int(evaluation.predicted[number])]
            score = scores[index[predicted]]
            label_score = scores[index[example.labels[0]]]
        yield {
            "line": example.line,
            "text": example.text,
            "text_pair": example.text_pair,
            "label": example.label,
            "predicted": predicted,
            "correct": set(example.labels) == set(_set(predicted)),
            "score": score,
            "label_score": label_score,
            "cut": evaluation.cut[number],
            "scores": dict(zip(labels, scores, strict=True)),
        }


def _set(label: Label) -> tuple[str, ...]:
    return (label,) if isinstance(label, str) else label
