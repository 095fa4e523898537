"""Tasks by name, by folder and by file, from local files; and what is held out of them."""

import gzip
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train.data.dataset import Dataset, Example, split_validation
from train.data.task_data import MOST_HELD_OUT, hold_out, load_task, with_something_to_report
from train.errors import DataError
from train.metrics import Metric


def _write(folder: Path, split: str, *rows: tuple[str, ...]) -> Path:
    """A split in the local layout; rows of text, [text_pair,] label."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = b"".join(
        json.dumps(
            {"text": row[0], "label": row[-1]} | ({"text_pair": row[1]} if row[2:] else {})
        ).encode()
        + b"\n"
        for row in rows
    )
    path = folder / f"{split}.jsonl.gz"
    path.write_bytes(gzip.compress(lines))
    return path


def _refusal(source: str, data_root: Path | None = None) -> str:
    with pytest.raises(DataError) as caught:
        load_task(source, data_root=data_root)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_named_task_is_read_from_the_data_root(tmp_path: Path) -> None:
    _write(tmp_path / "mrpc", "train", ("a", "b", "equivalent"), ("c", "d", "not_equivalent"))
    path = _write(tmp_path / "mrpc", "validation", ("e", "f", "equivalent"))
    data = load_task("mrpc", data_root=tmp_path)
    assert (data.name, data.metric) == ("mrpc", Metric.ACCURACY_F1)
    assert data.train.examples[1] == Example("c", "d", "not_equivalent")
    assert data.validation is not None
    assert data.validation.source == str(path)
    assert data.test is None
    assert data.notes == ("train 2 of 3,668", "validation 1 of 408")


def test_notes_compare_rows_with_the_official_ones(tmp_path: Path) -> None:
    rows = [(f"t{index}", ("choice1", "choice2")[index % 2]) for index in range(500)]
    paired = [(text, "p", label) for text, label in rows]
    _write(tmp_path / "copa", "train", *paired[:400])
    _write(tmp_path / "copa", "validation", *paired[:101])
    _write(tmp_path / "copa", "test", *paired[:499])
    assert load_task("copa", data_root=tmp_path).notes == (
        "validation 101, officially 100",
        "test 499 of 500",
    )
    _write(tmp_path / "sms_spam", "train", ("a", "ham"), ("b", "spam"))
    _write(tmp_path / "sms_spam", "test", ("c", "ham"))
    assert load_task("sms_spam", data_root=tmp_path).notes == (
        "train 2 of 5,574",
        "test 1: there is no official split of this name",
    )


def test_a_task_that_the_data_root_lacks_names_the_path_and_the_hub(tmp_path: Path) -> None:
    assert _refusal("rte", tmp_path) == (
        f"{tmp_path / 'rte'}: no such folder; without --data-root, hub:nyu-mll/glue:rte is read"
    )
    assert _refusal("amazon_reviews", tmp_path).endswith("no such folder; not on the hub")
    assert _refusal("amazon_reviews") == "amazon_reviews: not on the hub: give --data-root"


def test_rows_of_another_task_are_refused(tmp_path: Path) -> None:
    path = _write(tmp_path / "sst2", "train", ("a", "neg"), ("b", "pos"))
    assert _refusal("sst2", tmp_path) == (
        f"{path}: labels that the task sst2 does not have: 'neg', 'pos'"
    )
    _write(tmp_path / "sst2", "train", ("a", "p", "negative"), ("b", "p", "positive"))
    assert _refusal("sst2", tmp_path) == f"{path}: the rows of sst2 are single texts"
    path = _write(tmp_path / "rte", "train", ("a", "entailment"), ("b", "not_entailment"))
    assert _refusal("rte", tmp_path) == f"{path}: the rows of rte are pairs of texts"
    _write(tmp_path / "sst2", "train", ("a", "negative"), ("b", "negative"))
    assert "all 2 rows have the label 'negative'" in _refusal("sst2", tmp_path)


def test_a_folder_is_a_task_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = tmp_path / "mine"
    _write(mine, "train", ("a", "x"), ("b", "y"))
    (mine / "test.csv").write_text("text,label\nc,x\n")
    data = load_task(str(mine), data_root=tmp_path / "unused")
    assert (data.name, data.metric, data.notes) == ("mine", Metric.ACCURACY, ())
    assert (len(data.train), data.validation) == (2, None)
    assert data.test is not None
    assert data.test.examples == (Example("c", None, "x"),)
    monkeypatch.chdir(mine)
    assert load_task(".", data_root=None).name == "mine"


def test_a_folder_that_is_no_task_is_refused(tmp_path: Path) -> None:
    message = _refusal(str(tmp_path))
    assert message.startswith(f"{tmp_path}: no file train (.jsonl, .jsonl.gz, .csv, ")
    path = _write(tmp_path, "train", ("a", "x"), ("b", "y"))
    (tmp_path / "train.csv").write_text("text,label\nc,x\n")
    assert _refusal(str(tmp_path)).endswith(
        "which one is the split train: train.jsonl.gz, train.csv?"
    )
    path.unlink()
    (tmp_path / "train.csv").write_text("text,label\nc,x\nd,y\n")
    _write(tmp_path, "test", ("e", "z"))
    assert "labels that" in _refusal(str(tmp_path))


def test_a_file_is_training_rows_alone(tmp_path: Path) -> None:
    path = _write(tmp_path, "news.2024", ("a", "x"), ("b", "y"))
    data = load_task(str(path), data_root=None)
    assert (data.name, data.metric, data.validation, data.test) == (
        "news",
        Metric.ACCURACY,
        None,
        None,
    )


def test_an_unknown_name_is_told_those_that_exist() -> None:
    assert _refusal("sst-2").startswith(
        "sst-2: no file, no folder and none of the tasks mnli, qnli"
    )


def _rows(*labels: str) -> Dataset:
    rows = tuple(Example(f"t{index}", None, label) for index, label in enumerate(labels))
    return Dataset("rows", "0" * 64, rows)


_DATASETS = st.lists(
    st.tuples(st.integers(0, 25), st.sampled_from("xyz")), min_size=2, max_size=60
).map(
    lambda rows: Dataset("s", "0" * 64, tuple(Example(f"t{n}", None, label) for n, label in rows))
)


@given(_DATASETS, st.integers(0, 3))
@settings(max_examples=150, deadline=None)
def test_held_out_rows_are_the_rest_and_share_no_text(dataset: Dataset, seed: int) -> None:
    labels_of = {
        row.text: {other.label for other in dataset.examples if other.text == row.text}
        for row in dataset.examples
    }
    sure = [next(iter(labels)) for labels in labels_of.values() if len(labels) == 1]
    if max(map(sure.count, sure), default=0) < 2:
        with pytest.raises(DataError, match=r"^s: too few texts to hold some out$"):
            hold_out(dataset, seed=seed)
        return
    train, held = hold_out(dataset, seed=seed)
    assert sorted(map(str, train.examples + held.examples)) == sorted(map(str, dataset.examples))
    texts = {row.text for row in held.examples}
    assert texts.isdisjoint(row.text for row in train.examples)
    assert train.labels == dataset.labels
    assert 1 <= len(texts) <= max(1, round(0.1 * len(labels_of)))
    assert hold_out(dataset, seed=seed) == (train, held)


def test_a_tenth_is_held_out_of_every_label_but_no_more_than_the_most() -> None:
    small = _rows(*(["x"] * 300 + ["y"] * 100))
    train, held = hold_out(small, seed=1)
    assert [row.label for row in held.examples] == ["x"] * 30 + ["y"] * 10
    assert len(train) == 360
    assert hold_out(small, seed=2)[1] != held
    large = _rows(*(["x"] * 30_000 + ["y"] * 10_000))
    held = hold_out(large, seed=1)[1]
    assert len(held) == MOST_HELD_OUT == 2000
    assert sum(row.label == "y" for row in held.examples) == 500


def test_repeated_texts_do_not_make_more_than_the_most() -> None:
    texts = [index if index < 10_000 else index % 40 for index in range(30_000)]
    rows = tuple(Example(f"t{text}", None, "xy"[text % 2]) for text in texts)
    dataset = Dataset("s", "0" * 64, rows)
    unbounded = []
    for seed in range(4):
        _, most = split_validation(dataset, fraction=MOST_HELD_OUT / len(rows), seed=seed)
        unbounded.append(len(most))
        train, held = hold_out(dataset, seed=seed)
        assert len(train) + len(held) == len(rows)
        assert 600 < len(held) <= MOST_HELD_OUT
        assert {row.text for row in train.examples}.isdisjoint(row.text for row in held.examples)
    assert max(unbounded) > MOST_HELD_OUT, "otherwise this shows nothing"


def test_a_task_without_rows_to_report_on_gets_some_of_its_training_rows(tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"text {i}", "label": "ab"[i % 2]}) for i in range(50)]
    (tmp_path / "mine.jsonl").write_text("\n".join(lines))
    task = load_task(str(tmp_path / "mine.jsonl"), data_root=None)
    assert task.validation is None
    divided = with_something_to_report(task)
    assert divided.validation is not None
    assert (len(divided.train), len(divided.validation)) == (40, 10)
    assert sorted(divided.train.examples + divided.validation.examples, key=str) == sorted(
        task.train.examples, key=str
    )
    assert "10 of its 50 rows" in divided.notes[-1]
    assert with_something_to_report(divided) is divided
