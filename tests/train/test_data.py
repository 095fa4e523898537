"""Labelled texts: every format read alike, every broken input refused at its line."""

import csv
import gzip
import hashlib
import json
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from train.data.dataset import Example, check_labels, read_examples
from train.errors import DataError

ROWS = [
    ('free, "call" now', "spam"),
    ("see you at\nnoon", "ham"),
    ("naïve café 🙂", "ham"),
    ("", "ham"),
]


def _jsonl() -> bytes:
    return b"".join(json.dumps({"text": t, "label": y}).encode() + b"\n" for t, y in ROWS)


def _separated(path: Path) -> bytes:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["label", "text"])
        writer.writerows([label, text] for text, label in ROWS)
    return path.read_bytes()


def _write(folder: Path, extension: str) -> Path:
    path = folder / f"rows{extension}"
    plain = extension.removesuffix(".gz")
    if plain == ".parquet":
        columns = {"text": [text for text, _ in ROWS], "label": [label for _, label in ROWS]}
        parquet.write_table(pa.table(columns | {"other": [0.5] * len(ROWS)}), path)
        return path
    data = _separated(folder / f"plain{plain}") if plain == ".csv" else _jsonl()
    path.write_bytes(gzip.compress(data) if extension.endswith(".gz") else data)
    return path


def _refusal(path: Path, content: bytes | str) -> str:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(DataError) as caught:
        read_examples(str(path))
    message = str(caught.value)
    assert "\n" not in message
    return message.replace(f"{path}", "F")


@pytest.mark.parametrize(
    "extension", [".jsonl", ".jsonl.gz", ".csv", ".csv.gz", ".parquet", ".CSV"]
)
def test_every_format_gives_the_same_examples(tmp_path: Path, extension: str) -> None:
    path = _write(tmp_path, extension) if extension != ".CSV" else _write(tmp_path, ".csv")
    if extension == ".CSV":
        path = path.rename(tmp_path / "rows.CSV")
    dataset = read_examples(str(path))
    assert dataset.examples == tuple(Example(text, None, label) for text, label in ROWS)
    assert dataset.labels == ("ham", "spam")
    assert dataset.source == str(path)


@pytest.mark.parametrize("extension", [".tsv", ".tsv.gz", ".TSV"])
def test_a_quote_in_tsv_is_a_character(tmp_path: Path, extension: str) -> None:
    rows = [
        ('"Hello, how are you', "ham"),
        ("win cash now", "spam"),
        ('and he said bye"', "spam"),
        ('he wrote "no" twice', "ham"),
        ('"quoted" word', "spam"),
    ]
    data = "".join("\t".join(row) + "\n" for row in [("text", "label"), *rows]).encode()
    path = tmp_path / f"rows{extension}"
    path.write_bytes(gzip.compress(data) if extension.endswith(".gz") else data)
    assert read_examples(str(path)).examples == tuple(Example(t, None, y) for t, y in rows)


def test_a_cell_may_be_as_long_as_the_file(tmp_path: Path) -> None:
    text = "word " * 100_000
    for name, content in {
        "a.csv": f'text,label\n"{text}",x\n',
        "a.tsv": f"text\tlabel\n{text}\tx\n",
    }.items():
        (tmp_path / name).write_text(content)
        assert read_examples(str(tmp_path / name)).examples == (Example(text, None, "x"),)


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (["11", "2", "0", "10", "1"], ("0", "1", "2", "10", "11")),
        (["-1", "10", "+2", "-0.5", ".25", "3."], ("-1", "-0.5", ".25", "+2", "3.", "10")),
        (["10", "9" * 60, "9" * 59 + "8"], ("10", "9" * 59 + "8", "9" * 60)),
        (["10", "2", "none"], ("10", "2", "none")),
        (["v10", "v2"], ("v10", "v2")),
        (["1e3", "20"], ("1e3", "20")),
        (["inf", "2", "10"], ("10", "2", "inf")),
    ],
)
def test_labels_are_in_numeric_order_only_if_all_are_numbers(
    tmp_path: Path, labels: list[str], expected: tuple[str, ...]
) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text,label\n" + "".join(f"t,{label}\n" for label in labels))
    assert read_examples(str(path)).labels == expected


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ("1.0", "1", "label '1' is the same number as '1.0'"),
        ("+7", "007", "label '007' is the same number as '+7'"),
        ("1.0", " 1", "label ' 1' is the same number as '1.0'"),
        ("spam", "spam ", "label 'spam ' looks like 'spam'"),
        ("spam", "\u00a0spam", r"label '\xa0spam' looks like 'spam'"),
        ("not spam", "not\u00a0spam", r"label 'not\xa0spam' looks like 'not spam'"),
        ("spam", "sp\u200bam", r"label 'sp\u200bam' looks like 'spam'"),
        ("caf\u00e9", "cafe\u0301", r"label 'cafe\u0301' looks like 'caf\xe9'"),
    ],
)
@pytest.mark.parametrize("extension", [".csv", ".jsonl", ".parquet"])
def test_two_spellings_of_a_label_are_refused_with_a_row_of_each(
    tmp_path: Path, extension: str, first: str, second: str, expected: str
) -> None:
    path = tmp_path / f"a{extension}"
    labels = ["other", first, first, second, second]
    if extension == ".csv":
        content = "text,label\n" + "".join(f"t,{label}\n" for label in labels)
        path.write_text(content, encoding="utf-8")
    elif extension == ".jsonl":
        rows = ({"text": "t", "label": label} for label in labels)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        parquet.write_table(pa.table({"text": ["t"] * 5, "label": labels}), path)
    message = _refusal(path, path.read_bytes())
    at, row = (5, 3) if extension == ".csv" else (4, 2)
    hint = "write them the same way, or rename one"
    assert message == f"F:{at}: {expected} at F:{row}: {hint}"


def test_labels_that_differ_in_what_one_sees_are_different_labels(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text,label\na,spam\nb,Spam\nc,s pam\nd,caf\u00e9\ne,cafe\nf,1\ng,1.5\n")
    assert len(read_examples(str(path)).labels) == 7


def test_another_files_spelling_of_a_label_is_named_with_the_known_one(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text,label\na,spam \nb,1.0\nc,new\n")
    with pytest.raises(DataError) as caught:
        check_labels(read_examples(str(path)), ["1", "spam"], known_to="train.csv")
    known = "'1.0' (it has '1'), 'new', 'spam ' (it has 'spam')"
    assert str(caught.value) == f"{path}: labels that train.csv does not have: {known}"


def test_the_hash_is_that_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a", "label": "b"}\n')
    assert read_examples(str(path)).sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    packed = tmp_path / "a.jsonl.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert read_examples(str(packed)).sha256 == hashlib.sha256(packed.read_bytes()).hexdigest()


def test_a_byte_order_mark_blank_lines_and_carriage_returns_are_no_content(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b"\xef\xbb\xbftext,label\r\n\r\na,x\r\nb,y\r\n\r\n")
    assert read_examples(str(path)).examples == (Example("a", None, "x"), Example("b", None, "y"))
    lines = tmp_path / "a.jsonl"
    lines.write_bytes(b'\xef\xbb\xbf{"text": "a", "label": "x"}\r\n   \r\n')
    assert read_examples(str(lines)).examples == (Example("a", None, "x"),)


def test_other_columns_are_read_by_their_names(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("premise,hypothesis,gold,text\np,h,yes,t\n")
    dataset = read_examples(
        str(path), text_column="premise", text_pair_column="hypothesis", label_column="gold"
    )
    assert dataset.examples == (Example("p", "h", "yes"),)
    assert dataset.paired


def test_a_pair_column_is_used_where_it_exists_and_ignored_where_it_is_empty(
    tmp_path: Path,
) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text,text_pair,label\na,b,x\n")
    assert read_examples(str(path)).examples == (Example("a", "b", "x"),)
    path.write_text("text,text_pair,label\na,,x\n")
    assert read_examples(str(path)).examples == (Example("a", None, "x"),)


def test_the_pair_column_as_text_is_not_also_the_pair(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text_pair,label\na,x\n")
    assert read_examples(str(path), text_column="text_pair").examples == (Example("a", None, "x"),)


def test_one_column_cannot_be_two_things(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text,label\na,x\n")
    with pytest.raises(DataError, match="twice: text, text"):
        read_examples(str(path), label_column="text")


def test_whole_numbers_and_truth_values_become_label_names(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    values = ["1", "-3", "2.0", "true", '"1.5"']
    path.write_text("".join(f'{{"text": "t", "label": {value}}}\n' for value in values))
    labels = [example.label for example in read_examples(str(path)).examples]
    assert labels == ["1", "-3", "2", "True", "1.5"]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('{"text": "a", "label": "x"', "not JSON: Expecting ',' delimiter at column 27"),
        ("[1, 2]", "a JSON list, expected an object"),
        ('{"text": "a"}', "no column 'label'; there are: 'text'"),
        ('{"text": null, "label": "x"}', "'text' is missing (null)"),
        ('{"text": NaN, "label": "x"}', "'text' is missing (null)"),
        ('{"text": "a", "label": null}', "'label' is missing (null)"),
        ('{"text": "a", "label": NaN}', "'label' is missing (null)"),
        ('{"text": "a", "label": 1.5}', "'label' is 1.5: labels are names or whole numbers"),
        ('{"text": "a", "label": Infinity}', "'label' is of type float, expected a string"),
        (
            '{"text": "a", "label": ["x"]}',
            "'label' is a list, but no list at F:1: give every row",
        ),
        ('{"text": "a", "label": "  "}', "'label' is empty"),
        ('{"text": 7, "label": "x"}', "'text' is of type int, expected a string"),
        ('{"text": "\\ud83d", "label": "x"}', "'text' holds half of a surrogate pair"),
        ('{"text": "a", "label": "x", "text_pair": "b"}', "'text_pair' is given, but the rows"),
        ('{"text": "a", "label": ' + "1" * 5000 + "}", "not JSON: Exceeds the limit"),
        ("[" * 100_000, "not JSON: "),
    ],
)
def test_a_broken_json_line_is_named(tmp_path: Path, line: str, expected: str) -> None:
    message = _refusal(tmp_path / "a.jsonl", f'{{"text": "fine", "label": "x"}}\n\n{line}\n')
    assert message.startswith(f"F:3: {expected}")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"text,label\na,x\nb,y,z\n", "F:3: 3 fields, the header has 2"),
        (b"text,label\na\n", "F:2: 1 fields, the header has 2"),
        (b'text,label\na,x\n"b\nc,y\n', "F:3: broken row: unexpected end of data"),
        (b'text,label\n"a"b,x\n', "F:2: broken row: ',' expected after '\"'"),
        (b'text,label\n"a\nb",x\n"c\nd",x,\n', "F:4: 3 fields, the header has 2"),
        (b"text,label\na,x\nb\xff,y\n", "F:3: not UTF-8: byte 0xff at position 2"),
        (b"text,label,text\na,x,b\n", "F:1: column 'text' appears twice"),
        (b"body,class\na,x\n", "F:1: no columns 'text', 'label'; there are: 'body', 'class'"),
        (b"text;label\na;x\n", "F:1: no columns 'text', 'label'; there are: 'text;label'"),
        (b"text,label\na,\n", "F:2: 'label' is empty"),
        (b"text,label\n", "F: holds no rows"),
        (b"\n\n", "F: holds no rows"),
        (b"", "F: the file is empty"),
        (
            gzip.compress(b"text,label\n", mtime=0),
            "F:1: compressed with gzip: its name must end in .gz",
        ),
    ],
)
def test_a_broken_csv_row_is_named(tmp_path: Path, content: bytes, expected: str) -> None:
    assert _refusal(tmp_path / "a.csv", content) == expected


def test_broken_gzip_is_named_with_how_far_it_was_read(tmp_path: Path) -> None:
    whole = gzip.compress(b'{"text": "a", "label": "x"}\n' * 3)
    path = tmp_path / "a.jsonl.gz"
    assert _refusal(path, b"text").startswith("F: broken gzip after line 0")
    assert _refusal(path, whole[:-9]).startswith("F: broken gzip after line ")
    assert _refusal(path, whole[:-4] + b"\0\0\0\0").startswith("F: broken gzip after line 3")


def test_broken_parquet_is_named(tmp_path: Path) -> None:
    path = _write(tmp_path, ".parquet")
    whole = path.read_bytes()
    assert _refusal(path, whole[:-10]).startswith("F: unreadable Parquet after row 0: ")
    parquet.write_table(pa.table({"text": ["a"], "klass": ["x"]}), path)
    assert "no column 'label'; there are: 'text', 'klass'" in _refusal(path, path.read_bytes())
    parquet.write_table(pa.table({"text": ["a", None], "label": ["x", "y"]}), path)
    assert _refusal(path, path.read_bytes()) == "F:2: 'text' is missing (null)"
    parquet.write_table(pa.table({"text": [b"\xff"], "label": ["x"]}), path)
    assert _refusal(path, path.read_bytes()) == "F:1: 'text' is of type bytes, expected a string"


def test_categories_and_whole_numbers_of_parquet_are_labels(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    parquet.write_table(
        pa.table({"text": ["a", "b"], "label": pa.array(["x", "y"]).dictionary_encode()}), path
    )
    assert read_examples(str(path)).labels == ("x", "y")
    parquet.write_table(pa.table({"text": ["a", "b"], "label": [0, 1]}), path)
    assert read_examples(str(path)).labels == ("0", "1")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("missing.jsonl", "no such file"),
        ("a.txt", "unknown extension '.txt'; supported: .jsonl, .jsonl.gz, .csv,"),
        ("folder.csv", "a folder, expected a file"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused_by_name(
    tmp_path: Path, name: str, expected: str
) -> None:
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(DataError) as caught:
        read_examples(str(tmp_path / name))
    assert str(caught.value).startswith(f"{tmp_path / name}: {expected}")


def test_pairs_and_single_texts_do_not_mix(tmp_path: Path) -> None:
    message = _refusal(tmp_path / "a.csv", "text,text_pair,label\na,b,x\nc,,y\n")
    assert message == "F:3: 'text_pair' is missing or empty, but other rows have one"


def test_a_pair_column_that_was_asked_for_is_needed_in_every_row(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text,text_pair,label\na,,x\n")
    with pytest.raises(DataError, match=":2: 'text_pair' is missing or empty"):
        read_examples(str(path), text_pair_column="text_pair")


HUB_CARD = """---
configs:
- config_name: default
  data_files:
  - {split: train, path: train.jsonl}
  - {split: test, path: test.jsonl}
  - {split: unlabelled, path: unlabelled.jsonl}
dataset_info:
  features:
  - {name: text, dtype: string}
  - name: label
    dtype:
      class_label:
        names: {'0': ham, '1': spam}
---
"""


@pytest.fixture
def hub_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that the hub's library loads as it loads a repository."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "mini"
    folder.mkdir()
    (folder / "README.md").write_text(HUB_CARD)
    for split, labels in {"train": (0, 1), "test": (1, 0), "unlabelled": (-1, -1)}.items():
        rows = [{"text": f"{split} {label}", "label": label} for label in labels]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_a_hub_data_set_is_read_by_name_and_split(hub_folder: Path) -> None:
    train = read_examples(f"hub:{hub_folder}")
    assert train.examples == (Example("train 0", None, "ham"), Example("train 1", None, "spam"))
    test = read_examples(f"hub:{hub_folder}@test")
    assert test.examples == (Example("test 1", None, "spam"), Example("test 0", None, "ham"))
    assert read_examples(f"hub:{hub_folder}", split="test").sha256 == test.sha256
    assert test.sha256 != train.sha256


def test_a_hub_data_set_that_cannot_be_used_is_refused_in_one_line(hub_folder: Path) -> None:
    for name, expected in {
        f"hub:{hub_folder}@nope": "give a local .jsonl, .csv, .tsv or .parquet file instead",
        f"hub:{hub_folder}/absent": "give a local .jsonl, .csv, .tsv or .parquet file instead",
        f"hub:{hub_folder}@unlabelled": ":1: label -1 has no name: this split is not labelled",
        "hub:a:b:c:d": "expected hub:name[:config][@split]",
    }.items():
        with pytest.raises(DataError) as caught:
            read_examples(name)
        assert expected in str(caught.value)
    with pytest.raises(DataError, match="no column 'text_b'; there are: 'text', 'label'"):
        read_examples(f"hub:{hub_folder}", text_column="text_b")


def test_rows_share_their_label_objects(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(_jsonl() * 5000)
    dataset = read_examples(str(path))
    assert len(dataset) == 20_000
    assert len({id(example.label) for example in dataset.examples}) == 2
