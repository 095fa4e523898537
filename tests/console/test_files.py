"""How the console reads files: its own modules, run in the browser."""

import gzip
import json
from typing import Any

import pytest
from playwright.sync_api import Browser

from tests.support.browser import Console, open_console
from tests.support.service_process import ReadyService

pytestmark = pytest.mark.slow

_READ = """async ([name, bytes, cut]) => {
  const {read} = await import("./console/parts/files.js");
  const whole = new Uint8Array(bytes);
  // Pieces of any length: a character or a quote may be cut in two.
  const pieces = [];
  for (let at = 0; at < whole.length; at += cut) pieces.push(whole.slice(at, at + cut));
  const start = (to) => { pieces.forEach((piece) => to.enqueue(piece)); to.close(); };
  const stream = () => new ReadableStream({start});
  const records = [];
  try {
    for await (const record of read({name, stream})) records.push(record);
  } catch (error) {
    return {records, error: error.message};
  }
  return {records, error: null};
}"""
CASES: list[tuple[str, str, list[Any]]] = [
    ("t.csv", 'a,b\n1,"x, ""y"""\n', [["1", 'x, "y"']]),
    ("t.csv", 'a,b\r\n"two\r\nlines",z\r\n', [["two\r\nlines", "z"]]),
    ("t.csv", "a;b\n1;2,5\n", [["1", "2,5"]]),
    ("t.csv", "a\n\n x \n", [[" x "]]),
    ("t.csv", 'a\n"last"', [["last"]]),
    ("t.csv", 'a\n""\r\n\n"x"\n""', [[""], ["x"], [""]]),
    ("t.csv", 'a,b\n,""\n', [["", ""]]),
    ("t.tsv", 'a\tb\n1,5\tx"y\n', [["1,5", 'x"y']]),
    ("t.txt", "one\r\n\n  \ntwo 🎉", ["one", "two 🎉"]),
    ("t.jsonl", '"x"\n{"text": "é"}\n', ["x", {"text": "é"}]),
    ("t.jsonl", "[1]\nnull\n3\n", [None, None, None]),
]


@pytest.fixture(scope="module")
def page(browser: Browser, zoo: ReadyService) -> Any:
    with open_console(browser, zoo.url) as console:
        yield console


@pytest.mark.parametrize(("name", "text", "values"), CASES)
def test_records_are_the_same_however_the_file_comes(
    page: Console, name: str, text: str, values: list[Any]
) -> None:
    for cut in (1, 2, 3, 7, 10_000):
        found = page.run(_READ, [name, list(text.encode()), cut])
        assert found["error"] is None
        assert [record["value"] for record in found["records"]] == values, json.dumps(found)


def test_lines_are_counted_as_an_editor_counts_them(page: Console) -> None:
    table = 'a,b\n"x\ny",1\n\nz,2\n'
    found = page.run(_READ, ["t.csv", list(table.encode()), 5])
    assert [record["line"] for record in found["records"]] == [2, 5]
    found = page.run(_READ, ["t.txt", list(b"a\n\nb"), 1])
    assert [record["line"] for record in found["records"]] == [1, 3]


def test_a_byte_order_mark_and_packed_files_are_read(page: Console) -> None:
    found = page.run(_READ, ["t.csv", list("\ufefftext\nx\n".encode()), 2])
    assert found["records"][0]["columns"] == ["text"]
    packed = gzip.compress(b"one\ntwo\n")
    found = page.run(_READ, ["t.txt.gz", list(packed), 4])
    assert [record["value"] for record in found["records"]] == ["one", "two"]
    found = page.run(_READ, ["t.txt.gz", list(packed[:-6]), 4])
    assert found["error"] == "t.txt.gz: this is not a whole gzip file"


def test_what_is_written_is_read_back(page: Console) -> None:
    cells = ["plain", 'a "quoted" one', "two\nlines", "x,y", "", "🎉"]
    found = page.run(
        """async cells => {
          const {csvLine, read} = await import("./console/parts/files.js");
          const text = csvLine(cells.map((_, at) => `c${at}`)) + csvLine(cells);
          const records = [];
          for await (const record of read(new File([text], "t.csv"))) records.push(record);
          return records;
        }""",
        cells,
    )
    assert [record["value"] for record in found] == [cells]


def test_a_labelled_line_of_json_keeps_what_was_written(page: Console) -> None:
    lines = {
        '{"id": 1234567890123456789, "price": 10.0} ': '{"id": 1234567890123456789, "price": 10.0,',
        "{}": "{",
        '"a \\u00e9"': '{"text":"a é",',
        '{"cut': '{"text":"{\\"cut",',
        "[1]": '{"text":"[1]",',
        '{"p": 1, "b": 2}': '{"b":2,',
    }
    found = page.run(
        """async text => {
          const {jsonLine, read} = await import("./console/parts/files.js");
          const lines = [], file = new File([text], "t.jsonl");
          for await (const record of read(file)) lines.push(jsonLine(record, "p", {x: "}"}));
          return lines;
        }""",
        "\n".join(lines),
    )
    expected = [f'{begun}"p":{{"x":"}}"}}}}\n' for begun in lines.values()]
    expected[-1] = '{"p":{"x":"}"},"b":2}\n'
    assert found == expected
