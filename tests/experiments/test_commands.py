"""`python -m train compare | transfer | ablate`: flags, tables, exit codes."""

from pathlib import Path

import pytest

from train.cli import main

COMMON = ("--epochs", "1", "--batch-size", "16", "--device", "cpu", "--jobs", "1", "--quiet")


def _run(workspace: Path, output: Path, *arguments: str) -> int:
    common = ("--backbone", str(workspace / "bert"), "--data-root", str(workspace / "data"))
    return main([*arguments, *common, "--output", str(output), *COMMON])


@pytest.mark.slow
def test_compare_writes_a_table_and_prints_its_path(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--tasks", "sst2", "--methods", "idspam,head-only", "--seeds", "0,1")
    assert _run(workspace, tmp_path / "out", "compare", *flags) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    assert "idspam" in shown.out
    assert "head-only" in shown.out
    lines = (tmp_path / "out" / "results.csv").read_text().splitlines()
    assert sum(line.startswith("sst2,idspam,") for line in lines) > 0
    assert "| idspam |" in (tmp_path / "out" / "report.md").read_text()
    # Once more: everything is there already.
    assert _run(workspace, tmp_path / "out", "compare", *flags) == 0


@pytest.mark.slow
def test_ablate_takes_switches_and_a_preset(workspace: Path, tmp_path: Path) -> None:
    flags = ("--tasks", "sst2", "--seeds", "0", "--switches", "final_activation")
    assert _run(workspace, tmp_path, "ablate", *flags, "--preset", "paper") == 0
    report = (tmp_path / "report.md").read_text()
    assert "| relu *default* |" in report
    assert "Prompt length" not in report


@pytest.mark.slow
def test_transfer_measures_in_both_directions(workspace: Path, tmp_path: Path) -> None:
    flags = ("--tasks", "sst2,imdb", "--methods", "head-only", "--seeds", "0")
    assert _run(workspace, tmp_path, "transfer", *flags) == 0
    report = (tmp_path / "report.md").read_text()
    assert "sst2 → imdb" in report
    assert "imdb → sst2" in report
    assert "not run" not in report


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("compare", "--seeds", "one"), "not whole numbers separated by commas: one"),
        (("compare", "--methods", "idspam,magic"), "methods: magic is none of"),
        (("compare", "--tasks", "nowhere"), "nowhere: no file, no folder and none of the tasks"),
        (("compare", "--tasks", "cola"), "without --data-root"),
        (("ablate", "--switches", "colour"), "switches: colour is none of"),
        (("transfer", "--tasks", "sst2"), "sst2 has no partner among the others"),
        (("compare", "--lr", "-1"), "--lr must be greater than 0"),
        (("compare", "--tasks", "{sets}"), "all 2 rows have no label; at least one is needed"),
        (("ablate", "--tasks", "{sets}"), "all 2 rows have no label; at least one is needed"),
        (
            ("compare", "--tasks", "{sets}", "--label-separator", "::"),
            "--label-separator '::': expected one character",
        ),
    ],
)
def test_an_impossible_experiment_is_one_line_on_stderr_and_code_2(
    workspace: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    expected: str,
) -> None:
    sets = workspace / "sets.jsonl"
    sets.write_text('{"text": "a", "label": []}\n{"text": "b", "label": []}\n')
    arguments = tuple(argument.format(sets=sets) for argument in arguments)
    assert _run(workspace, tmp_path / "out", *arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert expected in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
