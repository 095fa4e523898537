"""`predict --format` and `--with`: what an answer has beside the service's own."""

import csv
import io
import json
from pathlib import Path

import pytest

from service.client import Result, Score
from service.commands.writing import EXTRAS, WRITERS, Answered
from tests.support.http_service import RunningService, serve
from tests.support.typed_commands import refused, typed

TEXTS = ("free win now", "a, b", 'say "card"', "")


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    path = tmp_path / "texts.txt"
    path.write_text("".join(f"{line}\n" for line in TEXTS))
    return path


def rows_of(content: str, delimiter: str = ",") -> list[dict[str, str]]:
    if delimiter == "\t":
        return list(csv.DictReader(io.StringIO(content), delimiter="\t", quoting=csv.QUOTE_NONE))
    return list(csv.DictReader(io.StringIO(content)))


@pytest.mark.slow
def test_csv_has_the_text_the_row_and_every_score(live: RunningService, texts: Path) -> None:
    words = ("predict", str(texts), "--adapter", "a", "--url", live.url, "--format", "csv")
    done = typed(*words, "--with", "all")
    assert (done.returncode, done.stderr) == (0, "")
    rows = rows_of(done.stdout)
    assert [row["text"] for row in rows] == [*TEXTS]
    assert [row["row"] for row in rows] == ["1", "2", "3", "4"]
    answers = live.predict(adapter="a", inputs=list(TEXTS))["results"]
    for row, answer in zip(rows, answers, strict=True):
        assert row["label"] == answer["label"]
        assert float(row["score"]) == answer["score"]
        for score in answer["scores"]:
            assert float(row[f"score {score['label']}"]) == score["score"]
        assert row["truncated"] == "false"
    plain = rows_of(typed(*words).stdout)
    assert not {"row", "text", "score ham"} & plain[0].keys()
    assert [row["label"] for row in plain] == [row["label"] for row in rows]


@pytest.mark.slow
def test_the_name_of_the_output_tells_the_format(
    live: RunningService, texts: Path, tmp_path: Path
) -> None:
    words = ("predict", str(texts), "--adapter", "a", "--url", live.url, "--with", "row,text")
    for name, delimiter in (("out.csv", ","), ("out.tsv", "\t")):
        assert typed(*words, "--output", str(tmp_path / name)).returncode == 0
        rows = rows_of((tmp_path / name).read_text(), delimiter)
        assert [row["row"] for row in rows] == ["1", "2", "3", "4"]
    assert typed(*words, "--output", str(tmp_path / "out")).returncode == 0
    lines = (tmp_path / "out").read_text().splitlines()
    assert [(item["row"], item["text"]) for item in map(json.loads, lines)] == list(
        enumerate(TEXTS, start=1)
    )


def test_scores_of_other_labels_have_no_columns_in_one_table(live: RunningService) -> None:
    lines = '{"text": "x", "adapter": "a"}\n{"text": "x", "adapter": "b"}\n'
    words = ("predict", "-", "--input-format", "jsonl", "--url", live.url)
    line = refused(*words, "--format", "csv", "--with", "scores", stdin=lines)
    assert "line 2: adapter b gives scores of other labels" in line
    assert "--format jsonl has all" in line
    without = typed(*words, "--format", "csv", stdin=lines)
    assert [row["adapter"] for row in rows_of(without.stdout)] == ["a", "b"]


@pytest.mark.slow
def test_without_an_adapter_the_sentence_says_which_there_are(
    live: RunningService, texts: Path, tmp_path: Path
) -> None:
    assert refused("predict", str(texts), "--url", live.url) == (
        "service: --adapter is missing: give one of a, b\n"
    )
    with serve(tmp_path / "empty") as empty:
        line = refused("predict", str(texts), "--url", empty.url)
        assert "the service has no adapter that is ready" in line
        (tmp_path / "new").mkdir()


@pytest.mark.slow
def test_json_that_nobody_called_json_is_not_taken_for_texts(
    live: RunningService, tmp_path: Path
) -> None:
    path = tmp_path / "mails.json"
    path.write_text('{"text": "free"}\n')
    words = ("--adapter", "a", "--url", live.url)
    line = refused("predict", str(path), *words)
    assert f"{path}, line 1: this looks like JSON: --input-format jsonl" in line
    assert typed("predict", str(path), *words, "--input-format", "jsonl").returncode == 0
    as_text = typed("predict", str(path), *words, "--input-format", "text", "--with", "text")
    assert json.loads(as_text.stdout)["text"] == '{"text": "free"}'
    line = refused("batch", str(path), str(tmp_path / "out.jsonl"), *words)
    assert "this looks like JSON" in line


@pytest.mark.parametrize("form", [*WRITERS])
def test_a_pair_a_set_of_labels_and_an_abstention_are_in_every_format(form: str) -> None:
    from service.client import Input

    result = Result(
        "7",
        "a",
        "f" * 64,
        "x",
        0.5,
        (Score("x", 0.5), Score("y", 0.25)),
        3,
        True,
        labels=("x", "y"),
        abstained=True,
    )
    answered = Answered(2, 5, Input("one\ttwo\nlines", "pair"), result)
    content = WRITERS[form](EXTRAS)(answered).decode()
    if form == "jsonl":
        item = json.loads(content)
        assert (item["row"], item["text"], item["text_pair"]) == (2, "one\ttwo\nlines", "pair")
        assert item["labels"] == ["x", "y"]
        return
    if form == "readable":
        assert content.startswith("x 0.500 (abstained)")
        assert "pair" in content
        return
    (row,) = rows_of(content, "\t" if form == "tsv" else ",")
    assert row["text"].split() == ["one", "two", "lines"]
    assert (row["text_pair"], row["labels"], row["abstained"]) == ("pair", "x y", "true")
    assert (row["score x"], row["score y"]) == ("0.5", "0.25")


def test_unknown_extras_are_named() -> None:
    line = refused("predict", "-", "--with", "row,colour")
    assert "'colour': expected some of row, text, scores, or all" in line
