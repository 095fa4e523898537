"""A comparison with real worker processes: figures, tables, plots, and the death of a worker."""

import csv
import multiprocessing
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from adapters.format.spec import GeneratorPooling
from tests.support.experiments import Watch, settings_of
from train.data.dataset import read_examples
from train.errors import SettingsError
from train.experiments.answers import unpacked
from train.experiments.cells import Cell, Findings, Store
from train.experiments.compare import compare
from train.loop.encoded_splits import classes_of
from train.metrics import Metric, measure

METHODS = ("idspam", "head-only", "lora")


@pytest.fixture(scope="module")
def compared(workspace: Path) -> Findings:
    """Two tasks, three methods, two seeds, on two workers."""
    findings = compare(
        ("sst2", "imdb"),
        METHODS,
        (1, 2),
        settings_of(workspace),
        workspace / "compared",
        data_root=workspace / "data",
        jobs=2,
    )
    assert not multiprocessing.active_children(), "workers outlived the comparison"
    return findings


@pytest.mark.slow
def test_every_cell_of_a_comparison_has_a_result(compared: Findings) -> None:
    assert len(compared.cells) == 12
    assert not compared.failed
    for cell in compared.cells:
        report = compared.outcomes[cell.key].report
        assert report is not None
        assert (report.method, report.seed) == (cell.method, cell.seed)
        assert set(report.metrics) == {"selection", "validation"}
        assert not (compared.output / "cells" / f"{cell.key}.state").exists()


@pytest.mark.slow
def test_every_figure_is_a_row_of_the_csv(compared: Findings) -> None:
    with (compared.output / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    # Four metrics of two splits: of twelve cells, and of the majority class for each task and seed.
    assert len(rows) == 4 * 2 * (12 + 4)
    cell = compared.cells[0]
    report = compared.outcomes[cell.key].report
    assert report is not None
    row_of_cell = next(
        row
        for row in rows
        if (row["task"], row["method"], row["seed"]) == (cell.task, cell.method, str(cell.seed))
        and (row["split"], row["metric"]) == ("validation", "accuracy")
    )
    assert float(row_of_cell["value"]) == Metric.ACCURACY.of(report.metrics["validation"])
    assert int(row_of_cell["trainable_parameters"]) == report.trainable_parameters
    assert int(row_of_cell["peak_memory"]) == report.peak_memory > 0
    assert {row["method"] for row in rows} == {*METHODS, "majority-class"}


@pytest.mark.slow
def test_the_report_has_the_papers_table_and_its_conditions(compared: Findings) -> None:
    text = (compared.output / "report.md").read_text()
    lines = text.splitlines()
    assert "| method | sst2 (accuracy) | imdb (accuracy) | mean |" in lines
    values = [
        100 * Metric.ACCURACY.of(report.metrics["validation"])
        for cell in compared.cells
        if (cell.task, cell.method) == ("sst2", "idspam")
        and (report := compared.outcomes[cell.key].report)
    ]
    mean, spread = np.mean(values), np.std(values, ddof=1)
    row = next(line for line in lines if line.startswith("| idspam |"))
    assert f"**{mean:.1f} ± {spread:.1f}**" in row, "the only prompt is the best prompt"
    assert next(line for line in lines if line.startswith("| lora |")).count("**") == 0
    order = [line.split(" | ")[0] for line in lines if line.startswith("| ") and "±" in line]
    assert order == ["| majority-class", "| head-only", "| idspam", "| lora"]
    for part in (
        "train 60 of 67,349",
        "## Costs",
        "the command",
        "runs computed on: cpu",
        "runs at once: 2",
        "![score parameters](plots/score_parameters.png)",
    ):
        assert part in text
    assert "Not complete" not in text
    assert "not run" not in text


@pytest.mark.slow
def test_the_report_says_which_differences_are_larger_than_chance_and_ends_in_advice(
    compared: Findings, workspace: Path
) -> None:
    text = (compared.output / "report.md").read_text()
    section = text.partition("## Differences to idspam, validation rows\n")[2].partition("\n## ")[0]
    rows = [line.split(" | ")[0] for line in section.splitlines() if line.startswith("| ")]
    assert rows == ["| method", "| ---", "| head-only", "| lora"]
    assert text.rstrip().splitlines()[-3:] == ["## Advice", "", compared.advice]
    assert compared.advice.endswith(".")
    with (compared.output / "differences.csv").open(newline="") as file:
        pairs = list(csv.DictReader(file))
    # Two tasks, three pairs of methods.
    assert len(pairs) == 6
    for pair in pairs:
        values = {
            method: np.mean(
                [
                    Metric.ACCURACY.of(report.metrics["validation"])
                    for cell in compared.cells
                    if (cell.task, cell.method) == (pair["task"], method)
                    and (report := compared.outcomes[cell.key].report)
                ]
            )
            for method in (pair["method"], pair["other"])
        }
        expected = values[pair["method"]] - values[pair["other"]]
        assert float(pair["difference"]) == pytest.approx(expected, abs=1e-6)
        low, high = float(pair["low"]), float(pair["high"])
        assert low <= float(pair["difference"]) <= high
        assert (pair["larger_than_chance"] == "yes") == (low > 0 or high < 0)
    # The answers that are kept give the figures that are reported.
    rows_of = read_examples(str(workspace / "data" / "sst2" / "validation.jsonl"))
    for cell in (cell for cell in compared.cells if cell.task == "sst2"):
        report = compared.outcomes[cell.key].report
        assert report is not None
        assert set(report.answers) == {"validation"}
        predicted = unpacked(report.answers["validation"], labels=2, several=False)
        true = classes_of(rows_of, rows_of.labels)
        assert measure(predicted, true, labels=2) == report.metrics["validation"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["score_parameters", "score_seconds", "learning_curves"])
def test_plots_show_something(compared: Findings, name: str) -> None:
    picture = imread(compared.output / "plots" / f"{name}.png")
    assert min(picture.shape[:2]) > 300
    ink = (picture[..., :3].min(axis=-1) < 0.6).mean()
    assert 0.005 < ink < 0.5
    svg = (compared.output / "plots" / f"{name}.svg").read_text()
    # Okabe and Ito's blue is the first method's.
    assert "#0072b2" in svg


@pytest.mark.slow
def test_a_dead_worker_fails_its_cell_alone_and_is_replaced(
    compared: Findings, workspace: Path, tmp_path: Path
) -> None:
    output = tmp_path / "again"
    shutil.copytree(compared.output, output)
    damaged, missing = (f"{cell.key}.json" for cell in compared.cells[:2])
    for cell in compared.cells[:2]:
        (output / "cells" / f"{cell.key}.state").write_text("no state")
    (output / "cells" / damaged).write_text((output / "cells" / damaged).read_text()[:-40])
    (output / "cells" / missing).unlink()

    def kill(_: Cell) -> None:
        if len(watch.started_cells) == 1:
            (worker,) = multiprocessing.active_children()
            worker.kill()

    watch = Watch(started=kill)
    findings = compare(
        ("sst2", "imdb"),
        METHODS,
        (1, 2),
        settings_of(workspace),
        output,
        data_root=workspace / "data",
        jobs=1,
        display=watch,
    )
    assert {f"{cell.key}.json" for cell in watch.started_cells} == {damaged, missing}
    assert any("damaged" in note for note in watch.notes)
    assert any("starting it over" in note for note in watch.notes)
    (failed,) = findings.failed
    assert failed.cell == watch.started_cells[0]
    assert failed.failure is not None
    assert "SIGKILL" in failed.failure
    survivor = watch.started_cells[1]
    again, before = findings.outcomes[survivor.key].report, compared.outcomes[survivor.key].report
    assert again is not None
    assert before is not None
    assert again.metrics == before.metrics, "the same cell gives the same figures"
    text = (output / "report.md").read_text()
    assert "of 12 runs 11 are finished, 1 failed" in text
    assert "(1 of 2 seeds)" in text
    assert "| 1 of 2 tasks |" in text
    with Store(output) as store:
        assert store.read(failed.cell) == failed


@pytest.mark.parametrize(
    ("methods", "seeds", "expected"),
    [
        (("idspam", "magic"), (1,), "methods: magic is none of idspam,"),
        (("idspam", "idspam"), (1,), "methods: idspam twice"),
        ((), (1,), "no methods are given"),
        (("idspam",), (), "no seeds are given"),
    ],
)
def test_an_impossible_comparison_is_refused_before_anything_is_written(
    workspace: Path, tmp_path: Path, methods: tuple[str, ...], seeds: tuple[int, ...], expected: str
) -> None:
    output = tmp_path / "output"
    with pytest.raises(SettingsError, match=expected):
        compare(
            ("sst2",), methods, seeds, settings_of(workspace), output, data_root=workspace / "data"
        )
    assert not output.exists()


def test_a_setting_that_has_no_effect_beside_another_is_refused_as_by_fit(
    workspace: Path, tmp_path: Path
) -> None:
    settings = settings_of(workspace)
    settings = replace(settings, attention_size=4, generator_pooling=GeneratorPooling.MEAN)
    output = tmp_path / "output"
    with pytest.raises(SettingsError, match="--attention-size 4: --generator-pooling mean has no"):
        compare(("sst2",), METHODS, (1,), settings, output, data_root=workspace / "data")
    assert not output.exists()


@pytest.mark.slow
def test_kept_adapters_of_other_settings_and_of_tasks_with_one_name_are_other_files(
    workspace: Path,
) -> None:
    output = workspace / "kept"
    kept: dict[str, bytes] = {}
    for folder, epochs in (("x", 1), ("x", 2), ("Y", 1), ("y", 1)):
        task = workspace / folder / "sst2.jsonl"
        if not task.exists():
            task.parent.mkdir()
            rows = (workspace / "data" / "sst2" / "train.jsonl").read_text().splitlines()
            task.write_text("\n".join(rows[: 40 if folder == "x" else 30]))
        findings = compare(
            (str(task),),
            ("head-only",),
            (1,),
            settings_of(workspace, epochs=epochs),
            output,
            data_root=None,
            jobs=1,
            keep=True,
        )
        assert not findings.failed
        for path in (output / "adapters").iterdir():
            kept.setdefault(path.name, path.read_bytes())
    assert len(kept) == len(list((output / "adapters").iterdir())) == 3
    assert all((output / "adapters" / name).read_bytes() == kept[name] for name in kept)
