"""Settings, progress and reports: what they refuse, what they show, when they warn."""

import io
import json
from dataclasses import replace

import pytest
from rich.console import Console

from cli.hints import command_line
from cli.progress import duration
from tests.support.model_cards import BAD, EPOCH_REPORT, FIT_REPORT, GOOD
from train.config.settings import FitSettings, Range, entries
from train.errors import DataError, SettingsError, TrainingError
from train.loop.progress import Progress
from train.metrics import Metrics
from train.report.progress import BarProgress, LineProgress, progress_for
from train.report.report import (
    Baseline,
    FitReport,
    TrialOutcome,
    TrialReport,
    print_fit,
)


def test_settings_out_of_range_name_every_fault() -> None:
    with pytest.raises(SettingsError) as caught:
        FitSettings(epochs=0, warmup_ratio=1.0, validation_fraction=-0.1, prompt_length=257)
    assert len(caught.value.faults) == 4
    assert caught.value.faults[1] == "--warmup must be less than 1, not 1.0"


def test_every_default_is_inside_its_range() -> None:
    for entry in entries():
        if entry.default is not None and entry.setting.range is not None:
            assert entry.setting.range.fault(entry.default) is None
    assert Range(least=0).fault(float("inf")) == "must be a finite number"


def test_errors_are_one_tree() -> None:
    assert issubclass(DataError, TrainingError)
    error = DataError("is wrong", source="a.csv", line=3)
    assert (str(error), error.source, error.line) == ("a.csv:3: is wrong", "a.csv", 3)


def _show(progress: BarProgress | LineProgress | Progress) -> None:
    with progress:
        progress.note("a [note]")
        progress.begin("epoch 3/20", texts=200, later=400)
        for step in range(4):
            progress.advance(50, loss=1 / (step + 1), accuracy=0.25 * step)
        progress.epoch_done(EPOCH_REPORT)


def test_lines_come_every_ten_seconds_and_after_every_epoch() -> None:
    times = iter([0.0, 4.0, 11.0, 12.0, 22.0])
    stream = io.StringIO()
    _show(LineProgress(stream, clock=lambda: next(times)))
    assert stream.getvalue().splitlines() == [
        "a [note]",
        "epoch 3/20: 100/200, step 2, loss 0.5000, accuracy 0.2500, 9 texts/s, 0:55 left",
        "epoch 3/20: 200/200, step 4, loss 0.2500, accuracy 0.7500, 9 texts/s, 0:44 left",
        "epoch 3: loss 0.2500, validation accuracy 0.9000, macro-F1 0.8000, 1,234 texts/s, 1.5 s",
    ]


def test_the_bar_is_drawn_on_terminals_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    stream = io.StringIO()
    times = iter(range(100))
    console = Console(file=stream, force_terminal=True, width=160, force_interactive=True)
    _show(BarProgress(console, clock=lambda: float(next(times))))
    shown = stream.getvalue()
    for part in ("a [note]", "epoch 3/20", "epoch 3: loss 0.2500"):
        assert part in shown
    assert shown.rstrip().endswith("\x1b[?25h"), "the cursor is shown again"
    assert isinstance(progress_for(io.StringIO()), LineProgress)


def test_silence_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    _show(Progress())
    assert capsys.readouterr() == ("", "")


def test_durations_look_like_a_clock() -> None:
    assert [duration(s) for s in (0, 42.4, 725, 11220)] == ["0:00", "0:42", "12:05", "3:07:00"]


def _printed(report: FitReport) -> str:
    stream = io.StringIO()
    print_fit(report, Console(file=stream, width=80))
    return stream.getvalue()


def test_the_closing_table_ends_with_a_command_that_can_be_copied() -> None:
    shown = _printed(replace(FIT_REPORT, output="runs/" + "long/" * 30 + "My Task.safetensors"))
    *_, line = shown.splitlines()
    assert line.endswith("long/My Task.safetensors' --name my-task")
    assert line.startswith("to publish it there: ")
    *_, serve, _ = shown.splitlines()
    assert serve == f"to serve it: {command_line('service', 'serve')}"
    other = replace(FIT_REPORT, settings={"backbone": "my bert"})
    (own,) = _printed(other).splitlines()[-2:-1]
    assert own.startswith("to serve it: IDSPAM_BACKBONE='my bert' ")
    assert "warning" not in shown
    assert "test" not in shown
    assert "search" not in shown
    assert "/My Task.safetensors, and its model card: runs/My Task.md\n" in shown


def test_the_closing_table_compares_the_chosen_trial_with_the_first() -> None:
    tried = {"dropout": 0.1}
    first = TrialReport(1, tried, TrialOutcome.FINISHED, 0.75, 3, 1.0, chosen=False)
    second = TrialReport(2, tried, TrialOutcome.FINISHED, 0.875, 3, 1.0, chosen=True)
    shown = _printed(replace(FIT_REPORT, trials=(first, second)))
    expected = "search: trial 2 of 2 (validation accuracy 0.8750; the first, without a search: "
    assert f"{expected}0.7500)\n" in shown
    failed = replace(first, outcome=TrialOutcome.FAILED, accuracy=None)
    assert f"{expected}-)\n" in _printed(replace(FIT_REPORT, trials=(failed, second)))


@pytest.mark.parametrize(
    ("changes", "warning"),
    [
        ({"validation": BAD}, "on validation, no better than always answering the majority class"),
        ({"validation": Metrics(0.8, 0.8, 0.6)}, "on validation, no better than a head alone"),
        (
            {"test": BAD, "majority": Baseline(BAD, BAD)},
            "on test, no better than always answering the majority class",
        ),
        (
            {"validation": None, "majority": Baseline(None, None)},
            "nothing was measured: there are no validation and no test rows",
        ),
    ],
)
def test_a_result_no_better_than_a_baseline_comes_with_a_warning(
    changes: dict[str, Metrics | Baseline | None], warning: str
) -> None:
    assert f"warning: {warning}" in _printed(replace(FIT_REPORT, **changes))  # type: ignore[arg-type]  # any field


def test_the_json_has_the_baselines_of_the_test_rows_if_there_are_any() -> None:
    validated = json.loads(FIT_REPORT.to_json())
    assert (validated["majority"], validated["head_only"]) == (0.5, 0.8)
    assert validated["baselines"]["head_only"] == {
        "validation": {"accuracy": 0.8, "macro_f1": 0.7, "matthews": 0.6},
        "test": None,
    }
    tested = json.loads(replace(FIT_REPORT, test=GOOD, majority=Baseline(BAD, GOOD)).to_json())
    assert tested["majority"] == 0.9


def test_a_figure_that_is_not_finite_is_null_in_the_json() -> None:
    report = replace(
        FIT_REPORT, epochs=(replace(EPOCH_REPORT, loss=float("nan")),), seconds=float("inf")
    )
    content = json.loads(report.to_json())
    assert content["epochs"][0]["loss"] is None
    assert content["seconds"] is None
