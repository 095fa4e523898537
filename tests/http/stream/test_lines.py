"""Lines of a body, however it is cut."""

import random
from unittest import mock

import pytest

from service.http.stream.lines import LineSplitter


def split(*chunks: bytes, most: int = 100) -> list[tuple[int, bytes | None, int]]:
    splitter, lines = LineSplitter(most), []
    for chunk in chunks:
        splitter.feed(chunk)
        while (line := splitter.next()) is not None:
            lines.append((line.number, line.content, line.size))
    splitter.end()
    while (line := splitter.next()) is not None:
        lines.append((line.number, line.content, line.size))
    return lines


@pytest.mark.parametrize("seed", range(5))
def test_lines_are_the_same_wherever_a_body_is_cut(seed: int) -> None:
    rng = random.Random(seed)
    contents = [b"x" * rng.randrange(0, 60) for _ in range(200)]
    body = b"\n".join(contents)
    chunks = []
    while body:
        size = rng.choice((1, 2, 7, 50, 1000))
        chunks.append(body[:size])
        body = body[size:]
    expected = [
        (number, content, len(content)) for number, content in enumerate(contents, 1) if content
    ]
    assert split(*chunks) == expected


def test_blank_lines_are_counted_and_not_given() -> None:
    assert [(number, content) for number, content, _ in split(b"\n \t\r\na\r\n\n\nb")] == [
        (3, b"a\r"),
        (6, b"b"),
    ]


def test_a_long_line_is_not_kept_and_the_next_one_is() -> None:
    splitter = LineSplitter(10)
    for _ in range(100):
        splitter.feed(b"x" * 50)
        assert splitter.next() is None
        assert splitter.held <= 10
    splitter.feed(b"\nok\n")
    long, following = splitter.next(), splitter.next()
    assert long is not None
    assert following is not None
    assert (long.number, long.content, long.size) == (1, None, 5000)
    assert (following.number, following.content) == (2, b"ok")


def test_a_line_of_exactly_the_limit_is_kept() -> None:
    assert split(b"x" * 10 + b"\n" + b"y" * 11 + b"\n", most=10) == [
        (1, b"x" * 10, 10),
        (2, None, 11),
    ]


def test_a_chunk_of_blank_lines_is_skipped_at_once_and_counted() -> None:
    """Each of them as an object took so long that other requests waited."""
    blank = b"\n \r\n\t\n" * 20_000
    splitter = LineSplitter(2**20)
    splitter.feed(b" " + blank + b"  a\n" + blank + b"b\n")
    with mock.patch.object(splitter, "_line", wraps=splitter._line) as made:
        found = [splitter.next(), splitter.next()]
    assert [(line.number, line.content) for line in found if line] == [
        (60_001, b"  a"),
        (120_002, b"b"),
    ]
    assert made.call_count == 2


def test_a_blank_line_that_is_too_long_is_no_blank_line() -> None:
    assert split(b"\n" + b" " * 30 + b"\nx\n", most=20) == [(2, None, 30), (3, b"x", 1)]
