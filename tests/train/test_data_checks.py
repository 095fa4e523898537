"""What `fit` says about its data, and what `evaluate` says about every row, on a tiny backbone."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.support.families import save
from tests.support.label_sets import label_sets
from tests.support.training import dataset
from train.cli import main
from train.data.dataset import Example

LEAK = "my good card is now on the call with you"


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bert")
    save("bert", folder)
    return folder


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _distinct(rows: int, *, several: bool, paired: bool) -> list[Example]:
    """Rows whose texts are not near each other: a number in words of their own letters."""
    made = (label_sets(rows, seed=1) if several else dataset(rows, seed=1)).examples
    return [
        Example(
            f"{chr(97 + index % 26) * 9} {chr(97 + index // 26) * 9} {row.text}",
            f"{chr(97 + index % 26) * 12} {chr(97 + index // 26) * 12}" if paired else None,
            row.label,
        )
        for index, row in enumerate(made)
    ]


def _write(name: str, rows: Sequence[Example]) -> None:
    lines = [
        {
            "text": row.text,
            **({} if row.text_pair is None else {"text_pair": row.text_pair}),
            "label": row.label,
        }
        for row in rows
    ]
    Path(name).write_text("".join(json.dumps(line) + "\n" for line in lines))


def _fit(bert: Path, *more: str) -> list[str]:
    argv = ["fit", "--train", "train.jsonl", "--test", "test.jsonl", "--backbone", str(bert)]
    argv += ["--device", "cpu", "--epochs", "1", "--no-progress", "--report", "r.json"]
    return [*argv, "--output", "x.safetensors", *more]


def _table(name: str) -> list[dict[str, str]]:
    with Path(name).open(newline="") as file:
        return list(csv.DictReader(file))


def _report() -> dict[str, Any]:
    content: dict[str, Any] = json.loads(Path("r.json").read_text())
    return content


@pytest.mark.slow
@pytest.mark.parametrize(("several", "paired"), [(False, False), (False, True), (True, False)])
def test_leaks_and_conflicts_are_reported_and_dropped_on_demand(
    folder: Path, bert: Path, capsys: pytest.CaptureFixture[str], several: bool, paired: bool
) -> None:
    assert folder.is_dir()
    rows = _distinct(90, several=several, paired=paired)
    pair = "the second text of it" if paired else None
    one, other = (("praise",), ("card", "fault")) if several else ("good", "bad")
    train, test = rows[:70], rows[70:]
    # Lines 71 to 74.
    train += [Example(LEAK, pair, one), Example("call now", pair, one)]
    train += [Example("call now", pair, other), Example("x " * 300, pair, one)]
    test += [Example(LEAK.upper() + "!", pair, one), train[3]]
    _write("train.jsonl", train)
    _write("test.jsonl", test)
    assert main(_fit(bert, "--validation-fraction", "0")) == 0
    out, err = capsys.readouterr()
    said = "2 of 22 test rows are also in train (1 the same, 1 nearly)"
    assert said in err
    assert f"data: {said}" in out
    assert "2 training rows have other labels than a row with their text (2 the same" in out
    assert "--drop-leaks trains without rows that leak" in out
    assert "texts are cut to" in out
    listed = {(row["kind"], row["line"], row["other_line"]) for row in _table("x.repeats.csv")}
    assert {
        ("leak, same text", "4", "22"),
        ("leak", "71", "21"),
        ("conflict, same text", "72", "73"),
        ("conflict, same text", "73", "72"),
    } <= listed
    before, checks = _report(), _report()["checks"]
    assert {"seen": "train", "judged": "test", "rows": 22, "exact": 1, "near": 1} in checks["leaks"]
    assert checks["dropped"] == {}
    suspects = _table("x.suspects.csv")
    assert len(suspects) == before["data"]["train"]["rows"]
    assert checks["suspects"] == sum(row["likely_wrong"] == "yes" for row in suspects)
    assert checks["reading"]["train"]["cut"] >= 1
    card = Path("x.md").read_text()
    assert "| rows of `test` with nearly the text of a row of `train` | 1 |" in card

    assert main(_fit(bert, "--validation-fraction", "0", "--drop-leaks", "--overwrite")) == 0
    after = _report()
    dropped = after["checks"]["dropped"]
    assert dropped["train"] == 4
    assert after["data"]["train"]["rows"] == before["data"]["train"]["rows"] - 4
    assert after["data"]["test"]["rows"] == 22
    assert not {"4", "71", "72", "73"} & {row["line"] for row in _table("x.suspects.csv")}
    assert "--drop-leaks left out 4 train rows" in capsys.readouterr().out


@pytest.mark.slow
def test_rare_labels_and_texts_that_the_tokenizer_cannot_read_are_named(
    folder: Path, bert: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert folder.is_dir()
    rows = _distinct(60, several=False, paired=False)
    rare = [Example(f"{chr(97 + index) * 20}", None, "rare [label]") for index in range(3)]
    strange = "\u4e00" * 20
    unread = [Example(f"{strange} {chr(97 + index) * 5}", None, "good") for index in range(4)]
    _write("train.jsonl", rows + rare + unread)
    _write("test.jsonl", rows[:5])
    assert main(_fit(bert, "--validation", "test.jsonl")) == 0
    out, _ = capsys.readouterr()
    assert "data: labels with fewer than 10 training rows: 'rare [label]' (3)" in out
    reading = _report()["checks"]["reading"]
    assert reading["train"]["unreadable"] >= 4
    unreadable = f"{reading['train']['unreadable']} of 67 train texts have more than a tenth"
    assert unreadable in out
    assert 0 < reading["train"]["unknown"] < 1


@pytest.mark.slow
def test_lists_replace_nothing_but_lists_and_go_when_there_is_nothing_to_list(
    folder: Path, bert: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = _distinct(60, several=False, paired=False)
    _write("train.jsonl", rows[:50])
    _write("test.jsonl", rows[40:])
    for name in ("x.repeats.csv", "x.suspects.csv"):
        Path(name).write_text("text,label\nmine,good\n")
        before = sorted(folder.iterdir())
        assert main(_fit(bert)) == 2
        *_, line = capsys.readouterr().err.splitlines()
        assert line.startswith(f"error: {name} is not a list of rows by fit and would be replaced")
        assert sorted(folder.iterdir()) == before
        Path(name).unlink()
    assert main(_fit(bert)) == 0
    assert Path("x.repeats.csv").exists()
    _write("test.jsonl", rows[50:])
    assert main(_fit(bert, "--overwrite")) == 0
    assert not Path("x.repeats.csv").exists()
    _write("test.jsonl", rows[:50])
    before = sorted(folder.iterdir())
    assert main(_fit(bert, "--drop-leaks", "--overwrite")) == 2
    *_, line = capsys.readouterr().err.splitlines()
    assert line == "error: train.jsonl: --drop-leaks leaves no train rows: all 45 repeat other rows"
    assert sorted(folder.iterdir()) == before


@pytest.mark.slow
@pytest.mark.parametrize(("several", "paired"), [(False, False), (False, True), (True, False)])
def test_evaluate_writes_a_row_for_every_text(
    folder: Path, bert: Path, capsys: pytest.CaptureFixture[str], several: bool, paired: bool
) -> None:
    rows = _distinct(60, several=several, paired=paired)
    _write("train.jsonl", rows[:40])
    _write("test.jsonl", rows[40:])
    assert main(_fit(bert)) == 0
    argv = ["evaluate", "--adapter", "x.safetensors", "--data", "test.jsonl"]
    argv += ["--backbone", str(bert), "--device", "cpu", "--no-progress", "--report", "e.json"]
    assert main([*argv, "--rows", "rows.csv"]) == 0
    out, _ = capsys.readouterr()
    for part in ("95 % interval", "calibration error", "precision", "written: rows.csv"):
        assert part in out
    assert main([*argv, "--rows", "rows.jsonl"]) == 0
    report = json.loads(Path("e.json").read_text())
    table, lines = _table("rows.csv"), Path("rows.jsonl").read_text().splitlines()
    assert len(table) == len(lines) == 20
    share = report["exact_match" if several else "accuracy"]
    assert sum(row["correct"] == "yes" for row in table) / 20 == pytest.approx(share)
    for number, (row, line) in enumerate(zip(table, map(json.loads, lines), strict=True)):
        assert row["line"] == str(line["line"]) == str(number + 1)
        assert row["text"] == line["text"] == rows[40 + number].text
        assert line["text_pair"] == rows[40 + number].text_pair
        assert set(line["scores"]) == {entry["label"] for entry in report["labels"]}
        assert float(row["score"]) == pytest.approx(line["score"], abs=1e-6)
        if several:
            assert json.loads(row["label"]) == list(rows[40 + number].labels)
            assert json.loads(row["predicted"]) == line["predicted"]
        else:
            assert line["predicted"] == max(line["scores"], key=line["scores"].__getitem__)
            assert line["score"] == max(line["scores"].values())
            assert line["label_score"] == line["scores"][line["label"]]
    for name, fault in (
        ("rows.txt", "--rows rows.txt: must end in .csv or .jsonl"),
        ("test.jsonl", "--rows test.jsonl: this is the file that is read"),
        ("no/rows.csv", "--rows no/rows.csv: there is no folder no"),
    ):
        before = sorted(folder.iterdir())
        assert main([*argv, "--rows", name]) == 2
        assert capsys.readouterr().err.splitlines()[-1] == f"error: {fault}"
        assert sorted(folder.iterdir()) == before
