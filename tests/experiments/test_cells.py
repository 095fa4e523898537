"""Cells without running them: keys, order, files, placement and display."""

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from tests.support.experiments import cell_named, failed, finished
from train.config.settings import FitSettings
from train.data.dataset import Dataset, Example
from train.errors import OutputError, SettingsError
from train.experiments.cells import (
    Cell,
    DamagedOutcome,
    Kind,
    PlannedCell,
    Store,
    TaskSplits,
    cell_of,
    outcome_path,
    write_outcome,
)
from train.experiments.display import Display, LineDisplay, LiveDisplay, display_for
from train.experiments.few_rows import few_rows
from train.experiments.pool import Placement, ReadyQueue
from train.experiments.session import placement_of
from train.loop.progress import EpochReport
from train.metrics import Metric


def _dataset(labels: str) -> Dataset:
    examples = tuple(Example(f"text {n}", None, label) for n, label in enumerate(labels))
    return Dataset("memory", "0" * 64, examples)


def _splits(labels: str = "abab") -> TaskSplits:
    return TaskSplits.of({"train": _dataset(labels), "selection": _dataset("ab")}, Metric.ACCURACY)


def test_few_rows_have_the_label_proportions_of_the_whole() -> None:
    data = _dataset("a" * 700 + "b" * 290 + "c" * 10)
    chosen = few_rows(data, 100, seed=1)
    labels = [row.label for row in chosen.examples]
    assert (labels.count("a"), labels.count("b"), labels.count("c")) == (69, 29, 2)
    assert chosen == few_rows(data, 100, seed=1)
    assert chosen != few_rows(data, 100, seed=2)
    order = [data.examples.index(row) for row in chosen.examples]
    assert order == sorted(order)
    assert few_rows(_dataset("abab"), 100, seed=1) == _dataset("abab")
    assert len(few_rows(_dataset("abcdef" * 9), 5, seed=1)) == 12, (
        "two of each label, even if that is more than asked for"
    )


def test_a_key_changes_with_everything_that_decides_the_result() -> None:
    assert _splits().sha256 != _splits("abba").sha256, "parts of one file are different rows"
    assert _splits().sha256 == _splits().sha256

    def key(seed: int = 1, method: str = "lora", **decides: object) -> str:
        cell = cell_of(
            Kind.COMPARE, "a/../B |é", method, variant="t=5", seed=seed, decides={"x": 1} | decides
        )
        return cell.key

    keys = [key(), key(seed=2), key(method="lpt"), key(x=2), key(y=None)]
    assert len(set(keys)) == len(keys)
    assert key() == key()
    assert all(set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789._-") for name in keys)


def _planned(cell: Cell, cost: float, after: Cell | None = None) -> PlannedCell:
    return PlannedCell(cell, _splits(), FitSettings(), cost, after=after)


def test_the_longest_cell_runs_first_but_not_before_the_one_it_starts_from() -> None:
    short, long, last = cell_named("short"), cell_named("long"), cell_named("last")
    queue = ReadyQueue(
        [_planned(short, 1.0), _planned(long, 2.0), _planned(last, 9.0, after=short)]
    )
    order = []
    while (planned := queue.first()) is not None:
        queue.take(planned)
        order.append(planned.cell)
        assert queue.ended(finished(planned.cell, 0.5)) == []
    assert order == [long, short, last]


def test_a_cell_that_starts_from_a_failed_one_is_given_up() -> None:
    first, second = (
        _planned(cell_named("first"), 1.0),
        _planned(cell_named("second"), 1.0, after=cell_named("first")),
    )
    queue = ReadyQueue([first, second])
    queue.take(first)
    assert queue.first() is None
    assert queue.ended(failed(first.cell)) == [second]
    assert queue.planned == []


def test_long_methods_and_many_rows_cost_more() -> None:
    costs = [
        _splits().cost("head-only", epochs=3),
        _splits().cost("idspam", epochs=3),
        _splits().cost("fine-tuning", epochs=3),
        _splits("ab" * 50).cost("fine-tuning", epochs=3),
    ]
    assert costs == sorted(set(costs))


def test_an_outcome_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    done, lost = finished(cell_named(), 0.8), failed(cell_named("mrpc"))
    with Store(tmp_path / "new" / "folder") as store:
        assert store.read(done.cell) is None
        for outcome in (done, lost, replace(lost, trace="Traceback")):
            write_outcome(store.cells, outcome)
            assert store.read(outcome.cell) == outcome


_DAMAGES: dict[str, Callable[[str], str]] = {
    "empty": lambda _: "",
    "cut": lambda text: text[: len(text) // 2],
    "not-an-object": lambda _: "[]",
    "no-epochs": lambda text: text.replace('"epochs"', '"epoch"'),
    "another-cell": lambda text: text.replace('"rte"', '"mrpc"'),
    "no-report": lambda text: text.replace('"failure": null', '"failure": "why"'),
    "another-kind": lambda text: text.replace('"compare"', '"guess"'),
}


@pytest.mark.parametrize("damage", _DAMAGES)
def test_a_damaged_file_is_no_outcome(tmp_path: Path, damage: str) -> None:
    outcome = finished(cell_named(), 0.8)
    with Store(tmp_path) as store:
        path = outcome_path(store.cells, outcome.cell)
        path.write_text(_DAMAGES[damage](outcome.to_json()))
        with pytest.raises(DamagedOutcome):
            store.read(outcome.cell)
        path.write_bytes(b"\xff\xfe")
        with pytest.raises(DamagedOutcome):
            store.read(outcome.cell)


def test_only_one_process_at_a_time_uses_a_folder(tmp_path: Path) -> None:
    with (
        Store(tmp_path),
        pytest.raises(OutputError, match="another process works here"),
        Store(tmp_path),
    ):
        raise AssertionError("two at once")
    with Store(tmp_path):
        pass
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"), Store(tmp_path / "file"):
        raise AssertionError("a file is no folder")


def test_an_error_before_the_first_outcome_leaves_the_folder_as_it_was(tmp_path: Path) -> None:
    new, old, used = tmp_path / "a" / "b", tmp_path / "old", tmp_path / "used"
    old.mkdir()
    for folder in (new, old):
        with pytest.raises(OutputError, match="unusable"), Store(folder):
            raise OutputError("unusable")
    assert [path.name for path in tmp_path.rglob("*")] == ["old"]
    with Store(used) as store:
        write_outcome(store.cells, finished(cell_named(), 0.8))
    with pytest.raises(OutputError, match="unusable"), Store(used):
        raise OutputError("unusable")
    assert len(list((used / "cells").iterdir())) == 1


def test_jobs_share_the_cores() -> None:
    assert placement_of("cpu", None).jobs >= 1
    assert placement_of("cpu", 1000) == Placement(("cpu",), jobs=1000, threads=1)
    with pytest.raises(SettingsError, match="--jobs must be at least 1"):
        placement_of("cpu", 0)


CELLS = (cell_named("rte"), cell_named("mrpc"))


def _show(display: Display) -> None:
    with display:
        display.begin(cells=3, finished=1, costs=dict.fromkeys(CELLS, 1.0))
        for cell in CELLS:
            display.started(cell, "cpu")
        display.progressed(CELLS[0], "epoch 3/20", 0.5)
        display.epoch_done(CELLS[0], EpochReport(3, 0.25, 0.9, 0.8, 1.5, 1234.0))
        display.note("a [note]")
        display.tick()
        display.ended(finished(CELLS[0], 0.8))
        display.ended(failed(CELLS[1]))
        display.tick()


def test_lines_say_which_cell_starts_and_how_it_ends() -> None:
    stream, times = io.StringIO(), iter([0.0, 0.0, 60.0, 70.0])
    _show(LineDisplay(stream, clock=lambda: next(times)))
    assert stream.getvalue().splitlines() == [
        "1/3 cells",
        "rte idspam seed 1: started on cpu",
        "mrpc idspam seed 1: started on cpu",
        "a [note]",
        "rte idspam seed 1: selection accuracy 0.8000, best epoch 2, 1:15 "
        "(2/3 cells, about 1:00 left)",
        "mrpc idspam seed 1: failed: the loss | is nan (2/3 cells, 1 failed)",
    ]


def test_a_terminal_shows_the_running_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=120, force_interactive=True)
    _show(LiveDisplay(console, clock=lambda: 0.0))
    shown = stream.getvalue()
    for part in ("a [note]", "epoch 3/20", "50%", "selection accuracy 0.9000", "failed: the loss"):
        assert part in shown
    assert "2/3 cells, 1 failed" in shown
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l"), "the cursor is shown again"
    assert isinstance(display_for(io.StringIO()), LineDisplay)


def test_the_base_display_shows_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    _show(Display())
    assert capsys.readouterr() == ("", "")
