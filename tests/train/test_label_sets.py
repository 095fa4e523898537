"""Sets of labels in data: how they are read, refused, split and counted."""

import json
import random
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from tests.support.label_sets import label_sets, write_jsonl
from train.data.dataset import (
    Dataset,
    Example,
    check_same_task,
    check_trainable,
    dataset_of,
    read_examples,
    split_validation,
)
from train.data.label_sets import hold_out_texts
from train.data.task_data import load_task
from train.errors import DataError, SettingsError
from train.loop.encoded_splits import classes_of
from train.metrics import Metric

JSONL = """{"text": "the door is stuck and it squeaks", "label": ["squeak", "door"]}
{"text": "the door is stuck", "label": ["door"]}
{"text": "all is well", "label": []}
"""
SETS = [("door", "squeak"), ("door",), ()]


def _file(folder: Path, name: str, content: str) -> str:
    path = folder / name
    path.write_text(content)
    return str(path)


def _refusal(source: str, **options: str) -> str:
    with pytest.raises(DataError) as caught:
        read_examples(source, **options)
    return str(caught.value).replace(source, "F")


def test_a_list_is_a_set_of_labels_and_an_empty_one_is_none(tmp_path: Path) -> None:
    data = read_examples(_file(tmp_path, "a.jsonl", JSONL))
    assert [row.label for row in data.examples] == SETS
    assert data.multi_label
    assert data.labels == ("door", "squeak")
    assert classes_of(data, data.labels).tolist() == [[1, 1], [1, 0], [0, 0]]


def test_parquet_lists_are_sets_of_labels(tmp_path: Path) -> None:
    labels = [["squeak", "door"], ["door"], []]
    table = pa.table({"text": ["a", "b", "c"], "label": pa.array(labels, pa.list_(pa.string()))})
    parquet.write_table(table, tmp_path / "a.parquet")
    data = read_examples(str(tmp_path / "a.parquet"))
    assert [row.label for row in data.examples] == SETS


@pytest.mark.parametrize("separator", [";", ",", "|", " ", "/", "\t"])
def test_a_separator_divides_the_labels_of_a_cell(tmp_path: Path, separator: str) -> None:
    source = _file(
        tmp_path, "a.csv", f'text,label\na,"squeak{separator}door"\nb, door \nc,\nd,"  "\n'
    )
    data = read_examples(source, label_separator=separator)
    assert [row.label for row in data.examples] == [*SETS, ()]


def test_spaces_around_a_separator_are_left_out(tmp_path: Path) -> None:
    source = _file(tmp_path, "a.tsv", "text\tlabel\na\t squeak ;  door\n")
    assert read_examples(source, label_separator=";").examples[0].label == ("door", "squeak")


def test_a_string_is_one_label_without_a_separator(tmp_path: Path) -> None:
    data = read_examples(_file(tmp_path, "a.csv", "text,label\na,squeak;door\nb,door\n"))
    assert not data.multi_label
    assert data.labels == ("door", "squeak;door")


def test_numbers_are_sorted_as_numbers(tmp_path: Path) -> None:
    rows = '{"text": "a", "label": [10, 2]}\n{"text": "b", "label": ["1"]}\n'
    data = read_examples(_file(tmp_path, "a.jsonl", rows))
    assert data.labels == ("1", "2", "10")


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        ('"door"', "'label' is no list, but a list at F:1: give every row a list, or none"),
        ("null", "'label' is no list, but a list at F:1"),
        ('["door", "door"]', "'label' has 'door' twice"),
        ("[1, 1.0]", "'label' has '1' twice"),
        ('["door", ["x"]]', "'label' is of type list, expected a string"),
        ('["door", null]', "'label' is missing (null)"),
        ('["door", ""]', "'label' is empty"),
        ('["door", 1.5]', "'label' is 1.5: labels are names or whole numbers"),
        ('["Door", "door "]', "label 'door ' looks like 'door' at F:1"),
        ('["cafe\\u0301", "caf\\u00e9"]', "label 'caf\\xe9' looks like 'cafe\\u0301' at F:2"),
        ('["1", "1.0"]', "label '1.0' is the same number as '1' at F:2"),
        ('["a\\nb"]', "'label': the label 'a\\nb' has the control character U+000A"),
        ('["' + "x" * 257 + '"]', "'label' has 257 characters, at most 256"),
        ('["\\ud83d"]', "'label' holds half of a surrogate pair"),
    ],
)
def test_a_broken_set_of_labels_is_named(tmp_path: Path, label: str, expected: str) -> None:
    first = '{"text": "a", "label": ["door"]}\n'
    source = _file(tmp_path, "a.jsonl", f'{first}{{"text": "b", "label": {label}}}\n')
    message = _refusal(source)
    assert message.startswith(f"F:2: {expected}")
    assert "\n" not in message


@pytest.mark.parametrize(
    ("cell", "expected"),
    [
        ("door;;squeak", "'label' is 'door;;squeak': ';' with no label beside it"),
        ("door;", "'label' is 'door;': ';' with no label beside it"),
        (";", "'label' is ';': ';' with no label beside it"),
        ("door; door", "'label' has 'door' twice"),
        ("1;1.0", "label '1.0' is the same number as '1' at F:3"),
    ],
)
def test_a_broken_cell_of_labels_is_named(tmp_path: Path, cell: str, expected: str) -> None:
    source = _file(tmp_path, "a.csv", f"text,label\na,door\nb,{cell}\n")
    assert _refusal(source, label_separator=";").startswith(f"F:3: {expected}")


def test_a_label_that_holds_the_separator_is_refused(tmp_path: Path) -> None:
    source = _file(tmp_path, "a.jsonl", '{"text": "a", "label": ["door;squeak"]}\n')
    said = _refusal(source, label_separator=";")
    assert said == "F:1: label 'door;squeak' holds the separator ';'"


@pytest.mark.parametrize(
    "separator", ["", ";;", "a", "Z", "7", "é", '"', "'", ".", "-", "+", "\n", "\0"]
)
def test_an_unknown_separator_is_refused(tmp_path: Path, separator: str) -> None:
    source = _file(tmp_path, "a.jsonl", JSONL)
    with pytest.raises(SettingsError, match=r"--label-separator .*: expected one character"):
        read_examples(source, label_separator=separator)


@pytest.mark.parametrize(
    ("rows", "separator", "expected"),
    [
        ([(), ()], None, "all 2 rows have no label; at least one is needed"),
        ([("a",), ("a",)], None, "all 2 rows have the same labels: 'a'"),
        ([("a;b",), ("a",)], "|", "no row has two labels with '|' between them"),
    ],
)
def test_sets_that_teach_nothing_are_refused(
    rows: list[tuple[str, ...]], separator: str | None, expected: str
) -> None:
    data = dataset_of(
        "F", [Example(f"t{n}", None, labels) for n, labels in enumerate(rows)], sha256=""
    )
    with pytest.raises(DataError, match=f"^F: {expected}".replace("|", r"\|")):
        check_trainable(data, label_separator=separator)


def test_one_label_is_enough_where_some_texts_lack_it() -> None:
    check_trainable(
        dataset_of("F", [Example("a", None, ("x",)), Example("b", None, ())], sha256="")
    )


def test_sets_and_single_labels_are_not_one_task() -> None:
    sets = label_sets(4, seed=1)
    single = dataset_of("one.csv", [Example("a", None, label) for label in sets.labels], sha256="")
    with pytest.raises(DataError, match=r"one\.csv: has one label a text, sets-1 has several"):
        check_same_task(sets, single)
    with pytest.raises(DataError, match=r"sets-1: has several labels a text, one\.csv has one"):
        check_same_task(single, sets)
    unknown = dataset_of("more", [Example("a", None, ("praise", "other"))], sha256="")
    with pytest.raises(DataError, match="labels that sets-1 does not have: 'other'"):
        check_same_task(sets, unknown)


def test_a_task_of_sets_is_judged_by_micro_f1(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", label_sets(30, seed=1))
    assert load_task(str(tmp_path), data_root=None).metric is Metric.MICRO_F1
    (tmp_path / "train.jsonl").rename(tmp_path / "b.jsonl")
    assert load_task(str(tmp_path / "b.jsonl"), data_root=None).metric is Metric.MICRO_F1
    _file(tmp_path, "c.csv", "text,label\na,x;y\nb,x\nc,\n")
    task = load_task(str(tmp_path / "c.csv"), data_root=None, label_separator=";")
    assert (task.metric, task.train.labels) == (Metric.MICRO_F1, ("x", "y"))


def test_a_known_task_has_one_label_a_text(tmp_path: Path) -> None:
    (tmp_path / "sst2").mkdir()
    write_jsonl(tmp_path / "sst2" / "train.jsonl", label_sets(30, seed=1))
    with pytest.raises(DataError, match="has several labels a text, the task sst2 has one label"):
        load_task("sst2", data_root=tmp_path)


def _counts(data: Dataset) -> Counter[str]:
    return Counter(label for row in data.examples for label in row.labels or ("",))


def test_every_label_keeps_its_share_when_rows_are_held_out() -> None:
    data = label_sets(2000, seed=4)
    examples = tuple(
        Example(f"{row.text} {n}", None, row.label) for n, row in enumerate(data.examples)
    )
    train, held = split_validation(Dataset("x", "", examples), fraction=0.2, seed=0)
    assert len(train) + len(held) == len(examples)
    whole = _counts(data)
    assert len(whole) == 4
    for label, count in _counts(held).items():
        assert count == pytest.approx(0.2 * whole[label], abs=2)
    # Texts have several labels: not every share can be met to the text.
    assert len(held) == pytest.approx(400, rel=0.03)
    # The order of the rows stays, and the seed decides.
    numbers = [int(row.text.rsplit(" ", 1)[1]) for row in held.examples]
    assert numbers == sorted(numbers)
    assert held == split_validation(Dataset("x", "", examples), fraction=0.2, seed=0)[1]
    assert held != split_validation(Dataset("x", "", examples), fraction=0.2, seed=1)[1]


def test_texts_whose_rows_disagree_stay_in_training() -> None:
    rows = [Example("same", None, ("a",)), Example("same", None, ("b",))] * 5
    rows += [Example(f"text {n}", None, ("a", "b")[: n % 3]) for n in range(30)]
    for seed in range(20):
        _, held = split_validation(dataset_of("x", rows, sha256=""), fraction=0.5, seed=seed)
        assert "same" not in {row.text for row in held.examples}


LABELLED = st.dictionaries(
    st.integers(), st.frozensets(st.sampled_from("abcdef")).map(sorted), min_size=1, max_size=60
)


@pytest.mark.slow
@given(LABELLED, st.floats(0.01, 0.9), st.integers(0, 5))
@settings(max_examples=200, deadline=None)
def test_every_label_keeps_a_text_and_shares_are_near(
    labels_of: dict[int, list[str]], fraction: float, seed: int
) -> None:
    held = hold_out_texts(labels_of, fraction, random.Random(seed))
    assert held <= labels_of.keys()
    whole = Counter(label for labels in labels_of.values() for label in labels)
    out = Counter(label for text in held for label in labels_of[text])
    for label, count in whole.items():
        assert out[label] < count
    could = [
        text for text, labels in labels_of.items() if all(whole[label] > 1 for label in labels)
    ]
    enough = len(labels_of) - sum(not labels for labels in labels_of.values()) > 1
    if could and enough and any(labels_of[text] for text in could):
        assert held
    assert held == hold_out_texts(labels_of, fraction, random.Random(seed))


def test_the_hash_of_rows_tells_sets_from_labels() -> None:
    one = dataset_of("x", [Example("a", None, "b")], sha256=None)
    sets = dataset_of("x", [Example("a", None, ("b",))], sha256=None)
    assert one.sha256 != sets.sha256


def test_labelled_files_are_read_for_their_texts_alone(tmp_path: Path) -> None:
    from service.commands.reading import READERS, TextColumns, format_of, open_inputs

    for name, content in (
        ("a.jsonl", JSONL),
        ("a.csv", "text,label\nx,a;b\ny,\n"),
        ("a.tsv", "text\tlabel\nx\ta,b\ny\t\n"),
    ):
        path = _file(tmp_path, name, content)
        with open_inputs(path) as file:
            texts = [record.input for record in READERS[format_of(path)](file, TextColumns())]
        assert len(texts) == content.count("\n") - (not name.endswith("jsonl"))


def test_a_file_of_sets_is_the_file_that_was_written(tmp_path: Path) -> None:
    data = label_sets(20, seed=9)
    read = read_examples(str(write_jsonl(tmp_path / "a.jsonl", data)))
    assert read.examples == data.examples
    assert json.loads((tmp_path / "a.jsonl").read_text().splitlines()[0])["label"] == list(
        data.examples[0].labels
    )
