"""Scores, tables, the summary on stdout and labels of plots, from outcomes written by hand."""

import io
from itertools import combinations
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from rich.console import Console

from tests.support.experiments import cell_named, failed, finished, report_of
from train.config.settings import FitSettings
from train.experiments.cells import Findings
from train.experiments.plots import Point, learning_curve, place_labels
from train.experiments.tables import (
    Score,
    conditions_section,
    mean_of,
    print_findings,
    score_of,
    score_table,
)
from train.metrics import Metric


def test_scores_are_means_and_sample_deviations_in_percent() -> None:
    assert Score({1: 0.8, 2: 0.9}).percent() == "85.0 ± 7.1"
    assert Score({1: 0.8}).percent() == "80.0", "one seed has no deviation"
    assert Score({1: 0.8, 2: 0.9}, ("not run yet",)).percent() == "85.0 ± 7.1 (2 of 3 seeds)"


def test_a_table_cell_without_a_figure_says_why() -> None:
    cells = [cell_named(seed=1), cell_named(seed=2)]
    assert score_of(cells, {}, lambda _: 1.0).percent() == "not run yet"
    outcomes = {cells[0].key: failed(cells[0], "a | b" + " c" * 80)}
    text = score_of(cells, outcomes, lambda _: 1.0).percent()
    assert text.startswith("failed: ")
    assert len(text) < 90
    assert "|" not in text, "it would end the table cell"


def test_the_mean_over_tasks_needs_every_task() -> None:
    whole, part = Score({1: 0.8, 2: 0.9}), Score({1: 0.8}, ("not run yet",))
    assert mean_of([whole, Score({1: 0.6, 2: 0.7})]).values == pytest.approx({1: 0.7, 2: 0.8})
    assert mean_of([whole, part]).percent() == "1 of 2 tasks"


def test_the_best_prompt_of_every_column_is_bold() -> None:
    rows = {
        "majority-class": [Score({1: 0.5}), Score({1: 0.5})],
        "idspam": [Score({1: 0.8001}), Score({}, ("not run yet",))],
        "lpt": [Score({1: 0.8002}), Score({1: 0.4})],
        "dept": [Score({1: 0.7}), Score({1: 0.3})],
        "lora": [Score({1: 0.9}), Score({1: 0.9})],
    }
    assert score_table(["rte", "mrpc"], rows).splitlines()[2:] == [
        "| majority-class | 50.0 | 50.0 | 50.0 |",
        "| idspam | **80.0** | not run yet | 1 of 2 tasks |",
        "| lpt | **80.0** | **40.0** | **60.0** |",
        "| dept | 70.0 | 30.0 | 50.0 |",
        "| lora | 90.0 | 90.0 | 90.0 |",
    ]


def test_a_learning_curve_ends_with_the_shortest_seed() -> None:
    reports = [report_of(cell_named(), 0.8, epochs=3), report_of(cell_named(seed=2), 0.4, epochs=2)]
    line = learning_curve("idspam", reports, Metric.ACCURACY)
    assert list(line.x) == [1, 2]
    assert line.y == pytest.approx([30.0, 60.0])


def _conditions(backbone: str) -> str:
    return conditions_section(
        FitSettings(command="train `x`"),
        backbone=backbone,
        fingerprint="0" * 64,
        tasks=("rte", "qqp", "mnli"),
        jobs=2,
        outcomes={},
    )


def test_the_report_names_tasks_that_the_backbone_was_pre_trained_on() -> None:
    lines = [line for line in _conditions("all-MiniLM-L6-v2").splitlines() if "not clean" in line]
    assert [line.split(":")[0] for line in lines] == ["- qqp", "- mnli"]
    assert "not clean" not in _conditions("roberta-large")


def test_the_summary_holds_means_and_failures() -> None:
    cells = (cell_named(seed=1), cell_named(seed=2), cell_named("mrpc"))
    outcomes = {
        outcome.cell.key: outcome
        for outcome in (finished(cells[0], 0.8), finished(cells[1], 0.9), failed(cells[2]))
    }
    metrics = {"rte": Metric.ACCURACY, "mrpc": Metric.ACCURACY_F1}
    findings = Findings(Path("out"), cells, outcomes, metrics)
    assert findings.failed == (outcomes[cells[2].key],)
    stream = io.StringIO()
    print_findings(findings, Console(file=stream, width=100))
    shown = stream.getvalue()
    assert "85.0 ± 7.1" in shown
    assert "failed: mrpc idspam seed 1: the loss | is nan" in shown
    assert shown.endswith("written: out/report.md\n")


def test_labels_of_neighbours_do_not_cover_each_other() -> None:
    points = [Point(f"method-{n}", 1.0 + n / 50, 80.0 + n % 3 / 10) for n in range(8)]
    figure = Figure(figsize=(7.2, 4.6))
    axes = figure.add_subplot()
    axes.plot([point.x for point in points], [point.y for point in points], "o")
    axes.set_xlim(0, 2)
    axes.set_ylim(70, 90)
    figure.draw_without_rendering()
    place_labels(axes, points)
    boxes = [text.get_window_extent() for text in axes.texts]
    assert len(boxes) == len(points)
    assert not any(one.overlaps(other) for one, other in combinations(boxes, 2))
