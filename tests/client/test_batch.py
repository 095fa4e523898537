"""Arguments that are refused before anything is sent, how inputs become requests, and waits."""

from collections.abc import Iterable, Iterator
from datetime import UTC, datetime

import pytest

from service.client import InvalidCall, Rejected, Retries
from service.client import operations as calls
from service.client.batch import MAX_CHARACTERS, Chunk, chunks_of, renumbered
from service.client.retry import parse_retry_after
from service.client.types import Text


def test_retry_after_holds_seconds_or_a_date() -> None:
    now = datetime(2026, 10, 21, 7, 28, tzinfo=UTC)
    assert parse_retry_after("Wed, 21 Oct 2026 07:28:09 GMT", now=now) == 9
    assert parse_retry_after("Wed, 21 Oct 2020 07:28:00 GMT", now=now) == 0
    assert parse_retry_after("12") == 12
    for nothing in (None, "", "soon", "-3", "1.5", "nan", "٣"):
        assert parse_retry_after(nothing) is None


def test_waits_double_up_to_the_longest_and_half_of_each_is_random() -> None:
    retries = Retries(attempts=10**6, seconds=1e9, first=1.0, longest=8.0)
    for chance in (0.0, 0.999):
        waits = [
            retries.wait(attempt=attempt, elapsed=0.0, retry_after=None, chance=chance)
            for attempt in (1, 2, 3, 4, 5, 100_000)
        ]
        whole = [1, 2, 4, 8, 8, 8]
        assert waits == [pytest.approx(seconds * (0.5 + chance / 2)) for seconds in whole]


@pytest.mark.parametrize(
    "numbers", [{"attempts": 0}, {"seconds": 0}, {"first": 0}, {"seconds": float("nan")}]
)
def test_impossible_retries_are_refused(numbers: dict[str, float]) -> None:
    with pytest.raises(InvalidCall):
        Retries(**numbers)  # type: ignore[arg-type]  # what the test is about


def test_inputs_are_split_by_number_and_by_length() -> None:
    def split(inputs: Iterable[Text], per_request: int) -> list[Chunk]:
        chunks = chunks_of(inputs, per_request=per_request)
        return [chunk for chunk in chunks if isinstance(chunk, Chunk)]

    chunks = split((f"{number}" for number in range(7)), 3)
    assert [len(item.inputs) for item in chunks] == [3, 3, 1]
    assert [item.first for item in chunks] == [0, 3, 6]
    long = "x" * (MAX_CHARACTERS // 2 + 1)
    chunks = split(["a", long, long, "b", long * 3, "c"], 100)
    assert [len(chunk.inputs) for chunk in chunks] == [2, 2, 1, 1]
    assert list(chunks_of([], per_request=3)) == []


def test_only_the_inputs_of_the_next_request_are_read() -> None:
    seen: list[int] = []

    def inputs() -> Iterator[str]:
        for number in range(100):
            seen.append(number)
            yield "x"

    next(chunks_of(inputs(), per_request=5))
    assert len(seen) == 5


def test_an_error_counts_inputs_from_the_first_of_all() -> None:
    error = Rejected(
        422, type="t", message="inputs.3.text: no; inputs.12: no", details=["inputs.3.text: no"]
    )
    moved = renumbered(error, 100)
    assert type(moved) is Rejected
    assert moved.message == "inputs.103.text: no; inputs.112: no"
    assert moved.details == ("inputs.103.text: no",)


@pytest.mark.parametrize("name", ["", "A", "a b", "..", ".", "a/b", "a" * 65, "ü", "a@b"])
def test_an_invalid_name_is_not_sent(name: str) -> None:
    for make in (
        lambda: calls.show(name),
        lambda: calls.delete(name, if_match=None),
        lambda: calls.download(name, None),
    ):
        with pytest.raises(InvalidCall, match="adapter name"):
            make()


@pytest.mark.parametrize("revision", ["", "x", "AB", "a" * 65, '"'])
def test_an_invalid_revision_is_not_sent(revision: str) -> None:
    with pytest.raises(InvalidCall, match="revision"):
        calls.rollback("a", revision, if_match=None)
    with pytest.raises(InvalidCall, match="revision"):
        calls.delete("a", if_match=revision)


def test_inputs_that_are_not_texts_are_not_sent() -> None:
    for wrong in (b"x", ["a", b"x"], ["a", ("b", "c")], "\ud800"):
        with pytest.raises(InvalidCall):
            calls.predict(wrong, "a", {})  # type: ignore[arg-type]  # what the test is about
    with pytest.raises(InvalidCall, match="request id"):
        calls.predict("x", "a", {"request_id": "two words"})
