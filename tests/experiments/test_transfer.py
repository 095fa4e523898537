"""Transfers and ablations with real worker processes on a tiny random backbone."""

from collections.abc import Mapping
from pathlib import Path

import pytest
from matplotlib.image import imread

from tests.support.experiments import Watch, settings_of
from train.errors import SettingsError
from train.experiments.ablate import ablate
from train.experiments.cells import Cell, Findings
from train.experiments.transfer import transfer


@pytest.mark.slow
def test_a_failed_run_fails_the_run_that_starts_from_it_and_both_are_tried_again(
    workspace: Path, tmp_path: Path
) -> None:
    blocked: list[Path] = []

    def block(costs: Mapping[Cell, float]) -> None:
        """Put a folder where a run should write its state."""
        source = next(cell for cell in costs if (cell.task, cell.variant) == ("qqp", ""))
        blocked.append(tmp_path / "cells" / f"{source.key}.state")
        blocked[0].mkdir()

    def run(watch: Watch) -> Findings:
        return transfer(
            ("mrpc", "qqp"),
            ("idspam",),
            (1,),
            settings_of(workspace),
            tmp_path,
            data_root=workspace / "data",
            jobs=2,
            display=watch,
        )

    findings = run(Watch(begin=block))
    failures = {(outcome.cell.task, outcome.cell.variant) for outcome in findings.failed}
    assert failures == {("qqp", ""), ("mrpc", "100 rows after qqp")}
    text = (tmp_path / "report.md").read_text()
    assert "## Failed" in text
    assert "qqp idspam seed 1, which it starts from, failed" in text.replace("`", "")
    kept = {path.name for path in (tmp_path / "weights").iterdir()}
    assert not kept, "weights are removed once every run that starts from them has ended"

    blocked[0].rmdir()
    # Another run starts from weights that are gone, so they are trained again.
    (lost,) = (tmp_path / "cells").glob("transfer-qqp-idspam-100_rows_after_mrpc-*.json")
    lost.unlink()
    watch = Watch()
    findings = run(watch)
    assert not findings.failed
    started = [(cell.task, cell.variant) for cell in watch.started_cells]
    assert set(started[:2]) == {("mrpc", ""), ("qqp", "")}
    assert set(started[2:]) == {("mrpc", "100 rows after qqp"), ("qqp", "100 rows after mrpc")}
    assert sum("trying again" in note for note in watch.notes) == 2
    assert not list((tmp_path / "weights").iterdir())
    text = (tmp_path / "report.md").read_text()
    assert text.count("| method | mrpc → qqp | qqp → mrpc | mean |") == 2
    assert text.count("| method | mrpc | qqp | mean |") == 2
    assert "failed" not in text
    reports = {
        (cell.task, cell.variant): report
        for cell in findings.cells
        if (report := findings.outcomes[cell.key].report)
    }
    further, alone = reports["mrpc", "100 rows after qqp"], reports["mrpc", "100 rows"]
    assert set(reports["qqp", ""].metrics) == {"selection", "qqp", "mrpc"}
    assert set(further.metrics) == {"selection", "mrpc"}
    assert further.epochs[0].loss != alone.epochs[0].loss, (
        "same rows and seed, other initial weights"
    )


def test_tasks_without_a_partner_cannot_be_transferred(workspace: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="tasks: cola has no partner"):
        transfer(
            ("sst2", "imdb", "cola"),
            ("idspam",),
            (1,),
            settings_of(workspace),
            tmp_path / "output",
            data_root=workspace / "data",
        )


@pytest.mark.slow
def test_every_switch_has_its_table_and_its_plot(workspace: Path, tmp_path: Path) -> None:
    findings = ablate(
        ("sst2",),
        (1,),
        settings_of(workspace),
        tmp_path,
        data_root=workspace / "data",
        switches=("generator_pooling", "final_activation"),
        jobs=1,
    )
    # The default is in both tables and is run once.
    assert [cell.variant for cell in findings.cells] == [
        "",
        "generator_pooling=mean",
        "final_activation=relu",
        "final_activation=tanh",
    ]
    assert not findings.failed
    text = (tmp_path / "report.md").read_text()
    assert "| attention *default* |" in text
    assert "| none *default* |" in text
    for name in ("generator_pooling", "final_activation"):
        assert f"(plots/{name}.png)" in text
        assert (imread(tmp_path / "plots" / f"{name}.png")[..., :3].min(axis=-1) < 0.6).any()
