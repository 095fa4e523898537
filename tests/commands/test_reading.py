"""The inputs of `predict`: every format, every bad line by its number, one line at a time."""

import gzip
import io
import json
import sys
from pathlib import Path

import pytest

from cli.shell import CommandFailed
from cli.text_files import csv_row
from service.client import Input
from service.commands.reading import (
    MAX_LINE_BYTES,
    READERS,
    Record,
    TextColumns,
    format_of,
    name_of,
    open_inputs,
)


def read(path: Path, columns: TextColumns | None = None) -> list[Record]:
    with open_inputs(str(path)) as source:
        return list(READERS[format_of(path.name)](source, columns or TextColumns()))


def written(folder: Path, name: str, content: bytes) -> Path:
    path = folder / name
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return path


def fault(path: Path, columns: TextColumns | None = None) -> str:
    with pytest.raises(CommandFailed) as caught:
        read(path, columns)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", ["x.txt", "x", "x.log", "x.txt.gz"])
def test_every_line_is_a_text_even_an_empty_one(tmp_path: Path, name: str) -> None:
    content = "\ufefffirst\r\n\n  spaced \nlöng\x00\nlast".encode()
    records = read(written(tmp_path, name, content))
    assert [item.input for item in records] == ["first", "", "  spaced ", "löng\x00", "last"]
    assert [item.line for item in records] == [1, 2, 3, 4, 5]
    assert read(written(tmp_path, f"empty-{name}", b"")) == []
    assert len(read(written(tmp_path, f"ended-{name}", b"a\nb\n"))) == 2


def test_positions_count_the_bytes_that_were_read(tmp_path: Path) -> None:
    path = written(tmp_path, "x.txt", "ä\nbc\n".encode())
    with open_inputs(str(path)) as source:
        assert source.total == 6
        assert [item.position for item in READERS["text"](source, TextColumns())] == [3, 6]
    packed = written(tmp_path, "x.txt.gz", b"ab\n" * 1000)
    with open_inputs(str(packed)) as source:
        last = list(READERS["text"](source, TextColumns()))[-1]
        assert last.position == source.total == packed.stat().st_size


@pytest.mark.parametrize("name", ["x.jsonl", "x.JSONL", "x.jsonl.gz"])
def test_json_lines_are_objects_or_strings(tmp_path: Path, name: str) -> None:
    content = (
        b'{"text": "a", "label": "ignored", "id": null}\n\n'
        b'{"text": "", "text_pair": "b", "adapter": "c@77", "id": "d"}\n"e"\n'
    )
    records = read(written(tmp_path, name.lower() if name.endswith("gz") else name, content))
    assert [item.input for item in records] == [Input("a"), Input("", "b", "c@77", "d"), "e"]
    assert [item.line for item in records] == [1, 3, 4]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b'{"text": 3}', "Expected `str`, got `int` - at `$.text`"),
        (b'{"texts": "a"}', "missing required field `text`"),
        (b"[1]", "got `array`"),
        (b'{"text": "a"', "not JSON"),
        (b"plain text", "not JSON"),
        (b'"\\ud800"', "not JSON"),
        (b'{"text": "\xff"}', "not UTF-8: byte 0xff at position 11"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: bytes, words: str) -> None:
    path = written(tmp_path, "x.jsonl", b'"fine"\n' + line + b'\n"fine"\n')
    message = fault(path)
    assert message.startswith(f"{path}, line 2: ")
    assert words in message


def test_tables_are_read_by_column(tmp_path: Path) -> None:
    content = 'id,text,adapter,more\n1,"a, ""b""\nc",,x\n,d,e,y\n'
    records = read(written(tmp_path, "x.csv", content.encode()))
    assert [item.input for item in records] == [
        Input('a, "b"\nc', id="1"),
        Input("d", adapter="e"),
    ]
    assert [item.line for item in records] == [2, 4]
    pairs = read(written(tmp_path, "x.tsv.gz", b"text\ttext_pair\na\t\nb\tc\n"))
    assert [item.input for item in pairs] == [Input("a", ""), Input("b", "c")]
    named = TextColumns("question", "answer")
    chosen = read(written(tmp_path, "y.csv", b"question,answer\nq,a\n"), named)
    assert chosen[0].input == Input("q", "a")


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        (TextColumns("id"), Input("1", "p", "a")),
        (TextColumns("adapter"), Input("a", "p", id="1")),
        (TextColumns("text_pair"), Input("p", adapter="a", id="1")),
        (TextColumns("text", "id"), Input("t", "1", "a")),
        (TextColumns("text_pair", "text"), Input("p", "t", "a", "1")),
        (TextColumns('a "b"\\'), Input("q", "p", "a", "1")),
    ],
)
def test_any_column_may_hold_the_text_and_is_then_nothing_else(
    tmp_path: Path, columns: TextColumns, expected: Input
) -> None:
    row = {"text": "t", "text_pair": "p", "adapter": "a", "id": "1", 'a "b"\\': "q"}
    lines = written(tmp_path, "x.jsonl", json.dumps(row).encode())
    table = csv_row(row.keys()) + csv_row(row.values())
    for path in (lines, written(tmp_path, "x.csv", table.encode())):
        assert [item.input for item in read(path, columns)] == [expected]


def test_a_fault_names_the_field_as_it_is_called(tmp_path: Path) -> None:
    columns = TextColumns("id", "b")
    for line, words in (
        (b'{"id": 1, "b": ""}', "Expected `str`, got `int` - at `$.id`"),
        (b'{"id": "", "b": null}', "Expected `str`, got `null` - at `$.b`"),
        (b'{"id": ""}', "missing required field `b`"),
        (b'{"id": "", "b": "", "adapters": 3}', "at `$.adapters`"),
        (b"[]", "got `array`"),
    ):
        assert words in fault(written(tmp_path, "x.jsonl", line), columns)
    with pytest.raises(CommandFailed, match="'text' is named for the text and for the second"):
        TextColumns("text", "text")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"body\nx\n", "line 1: no column 'text'; there are: 'body'"),
        (b"text,text\nx,y\n", "line 1: column 'text' appears twice"),
        (b"text,more\nx\n", "line 2: 1 fields, the header has 2"),
        (b'text\nx\n"y', "line 3: broken row: unexpected end of data"),
        (b"text\n\xff\n", "line 2: not UTF-8"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, content: bytes, words: str) -> None:
    assert words in fault(written(tmp_path, "x.csv", content))


def test_a_quote_in_tsv_is_a_character(tmp_path: Path) -> None:
    content = b'text\tid\n"Hello, how are you\t1\nand he said bye"\t2\n"quoted" word\t3\n'
    records = read(written(tmp_path, "x.tsv", content))
    texts = ['"Hello, how are you', 'and he said bye"', '"quoted" word']
    assert [record.input for record in records] == [
        Input(text, id=str(number)) for number, text in enumerate(texts, start=1)
    ]
    assert [record.line for record in records] == [2, 3, 4]


def test_a_cell_may_be_as_long_as_a_line(tmp_path: Path) -> None:
    long = "x" * 1_000_000
    for name in ("x.csv", "x.tsv"):
        assert read(written(tmp_path, name, f"text\n{long}\n".encode()))[0].input == Input(long)


@pytest.mark.slow
def test_a_row_that_no_service_accepts_is_not_held_in_memory(tmp_path: Path) -> None:
    lines = b"never closed\n" * (MAX_LINE_BYTES // 13 + 1)
    path = written(tmp_path, "x.csv", b'text\na\n"' + lines + lines)
    assert fault(path) == f"{path}, line 3: row is longer than {MAX_LINE_BYTES} bytes"
    many = written(tmp_path, "many.csv", b"text\n" + lines)
    assert len(read(many)) == MAX_LINE_BYTES // 13 + 1


def test_a_column_that_was_asked_for_must_exist(tmp_path: Path) -> None:
    path = written(tmp_path, "x.csv", b"text\na\n")
    assert "no column 'second'" in fault(path, TextColumns("text", "second"))


def test_files_that_cannot_be_opened_or_unpacked_are_named(tmp_path: Path) -> None:
    assert "No such file" in fault(tmp_path / "none.txt")
    assert "Is a directory" in fault(tmp_path)
    assert "broken gzip" in fault(tmp_path / _write(tmp_path / "x.gz", b"no gzip"))
    cut = gzip.compress(b"line\n" * 10_000)[:-20]
    assert "broken gzip" in fault(tmp_path / _write(tmp_path / "cut.gz", cut))
    hidden = tmp_path / _write(tmp_path / "x.txt", gzip.compress(b"a"))
    assert "line 1: compressed with gzip: its name must end in .gz" in fault(hidden)


def _write(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    return path.name


def test_a_line_that_no_service_accepts_is_not_held_in_memory(tmp_path: Path) -> None:
    path = written(tmp_path, "x.txt", b"a\n" + b"x" * (MAX_LINE_BYTES + 1) + b"\nb\n")
    assert fault(path) == f"{path}, line 2: longer than {MAX_LINE_BYTES} bytes"


def test_one_line_is_read_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    content = io.BytesIO(b"a\nb\nc\n")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(content))
    with open_inputs("-") as source:
        assert name_of("-") == "standard input"
        assert source.total is None
        records = READERS["text"](source, TextColumns())
        assert next(records).input == "a"
        assert content.tell() == 2
