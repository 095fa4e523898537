"""Reading text files; the tests of both users, `predict` and training, have the broken inputs."""

import gzip
from pathlib import Path

import pytest

from cli.text_files import Columns, open_text, read_table


class Bad(Exception):
    pass


def fault(message: str, *, line: int | None = None) -> Bad:
    return Bad(message, line)


def test_a_table_starts_with_its_header_and_counts_lines(tmp_path: Path) -> None:
    path = tmp_path / "x.csv.gz"
    path.write_bytes(gzip.compress(b'\xef\xbb\xbf\r\na,b\r\n"1\n2",3\r\n\r\n4,5\r\n'))
    with open_text(path, fault) as file:
        rows = list(read_table(file, Columns(("a",)), delimiter=","))
        assert file.position == file.total == path.stat().st_size
    assert rows == [(3, {"a": "1\n2", "b": "3"}), (6, {"a": "4", "b": "5"})]


def test_every_fault_is_the_callers_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_bytes(b"a,a\n")
    with pytest.raises(Bad) as caught, open_text(path, fault) as file:
        list(read_table(file, Columns((), ("a",)), delimiter=","))
    assert caught.value.args == ("column 'a' appears twice", 1)
    with pytest.raises(Bad) as caught, open_text(tmp_path / "none", fault):
        pass
    assert caught.value.args == ("cannot be read: No such file or directory", None)


def test_missing_columns_are_named_with_those_that_exist() -> None:
    columns = Columns(("text", "label"), ("id",))
    assert columns.of(["id", "label", "x", "text"]) == ["text", "label", "id"]
    with pytest.raises(Bad) as caught:
        columns.check([f"c{number}" for number in range(22)], fault, line=7)
    message, line = caught.value.args
    assert message.startswith("no columns 'text', 'label'; there are: 'c0', 'c1', ")
    assert message.endswith("'c19' and 2 more")
    assert line == 7


def test_a_line_over_the_limit_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_bytes(b"1234\n12345\n")
    with open_text(path, fault, max_line_bytes=5) as file:
        lines = file.lines()
        assert next(lines) == "1234\n"
        with pytest.raises(Bad) as caught:
            next(lines)
    assert caught.value.args == ("longer than 5 bytes", 2)
