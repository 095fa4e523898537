"""One call from attempt to answer, without a network: when and how often it is repeated."""

import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import pytest

from service.client import (
    Busy,
    Conflict,
    Failed,
    NotAllowed,
    NotFound,
    Refused,
    Rejected,
    Retries,
    UnexpectedAnswer,
    Unreachable,
)
from service.client import operations as calls
from service.client.errors import refusal_of
from service.client.retry import Attempt, Call, Exchange, Exchanger, NoReply, Outcome, Reply

T = TypeVar("T")

URL = "http://here:8000"
LOST = NoReply("reset by peer", sent=True)
UNHEARD = NoReply("connection refused", sent=False)
DATA = b"an adapter's bytes"
REVISION = hashlib.sha256(DATA).hexdigest()
PUBLISHED = {"name": "a", "revision": REVISION, "created": True, "changed": True}


def reply(status: int, content: object, **headers: str) -> Reply:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Reply(status, named, json.dumps(content).encode())


def refusal(status: int, type: str, **headers: str) -> Reply:
    error = {"type": type, "message": "words", "details": ["inputs.3: long"]}
    return reply(status, {"error": error}, x_request_id="abc", **headers)


class Clock:
    """Time that only passes while an exchange waits, or an attempt takes some."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def exchanger(clock: Clock, **retries: float) -> Exchanger:
    numbers = {"attempts": 4, "seconds": 60.0, "first": 1.0, "longest": 3.0} | retries
    policy = Retries(**numbers)  # type: ignore[arg-type]  # whole numbers among them
    return Exchanger(URL, policy, clock=clock, chance=lambda: 0.5)


def run(
    exchange: Exchange[T], outcomes: Sequence[Outcome], clock: Clock, *, takes: float = 0.0
) -> tuple[T, list[Attempt]]:
    """The answer after these outcomes, and all attempts that were made."""
    attempts: list[Attempt] = []
    left = iter(outcomes)
    try:
        attempts.append(next(exchange))
        while True:
            clock.now += attempts[-1].delay + takes
            outcome = next(left, None)
            assert outcome is not None, "one attempt too many"
            attempts.append(exchange.send(outcome))
    except StopIteration as done:
        assert not list(left)
        return done.value, attempts


READING: dict[str, Callable[[], Call[Any]]] = {
    "show": lambda: calls.show("a"),
    "predict": lambda: calls.predict("x", "a", {}),
    "metrics": lambda: calls.metrics(()),
    "upload": lambda: calls.upload("a", DATA, if_match=None, if_none_match=None),
    "rollback to one": lambda: calls.rollback("a", "0c9d", if_match=None),
    "download": lambda: calls.download("a", None),
}
ONCE_ONLY: dict[str, Callable[[], Call[Any]]] = {
    "rollback": lambda: calls.rollback("a", None, if_match=None),
    "rollback over one": lambda: calls.rollback("a", "0c9d", if_match="77"),
    "delete": lambda: calls.delete("a", if_match=None),
    "upload over one": lambda: calls.upload("a", DATA, if_match="77", if_none_match=None),
    "upload of a new name": lambda: calls.upload("a", DATA, if_match=None, if_none_match="*"),
}


@pytest.mark.parametrize("name", READING)
@pytest.mark.parametrize(
    "outcome", [LOST, UNHEARD, refusal(429, "overloaded"), refusal(503, "unavailable")]
)
def test_a_harmless_call_is_repeated_after_every_temporary_failure(
    name: str, outcome: Outcome
) -> None:
    clock = Clock()
    exchange = exchanger(clock)(READING[name]())
    with pytest.raises((Unreachable, Busy)):
        run(exchange, [outcome] * 4, clock)
    assert clock.now == pytest.approx(100 + (1 + 2 + 3) * 0.75)


@pytest.mark.parametrize("name", ONCE_ONLY)
def test_a_change_is_not_repeated_once_the_service_may_have_received_it(name: str) -> None:
    for outcome, error in ((LOST, Unreachable), (refusal(503, "unavailable"), Busy)):
        clock = Clock()
        with pytest.raises(error):
            run(exchanger(clock)(ONCE_ONLY[name]()), [outcome], clock)
        assert clock.now == 100


@pytest.mark.parametrize("name", ONCE_ONLY)
def test_a_change_is_repeated_if_the_service_did_not_begin_it(name: str) -> None:
    for outcome in (UNHEARD, refusal(503, "not_ready"), refusal(429, "overloaded")):
        clock = Clock()
        _, attempts = run(
            exchanger(clock)(ONCE_ONLY[name]()), [outcome, reply(200, PUBLISHED)], clock
        )
        assert attempts[0].request == attempts[1].request
        assert len(attempts) == 2


def test_a_wait_is_as_long_as_the_service_asks() -> None:
    clock = Clock()
    outcomes = [refusal(503, "unavailable", retry_after=text) for text in ("7", "0", " 2 ")]
    _, attempts = run(exchanger(clock)(calls.show("a")), [*outcomes, detail()], clock)
    assert [attempt.delay for attempt in attempts] == [0, 7, 0, 2]


def test_a_wait_beyond_the_time_limit_is_not_begun() -> None:
    clock = Clock()
    with pytest.raises(Busy) as caught:
        run(
            exchanger(clock, seconds=9.0)(calls.show("a")),
            [refusal(429, "overloaded", retry_after="3600")],
            clock,
        )
    assert clock.now == 100
    assert caught.value.retry_after == 3600


def test_the_duration_of_attempts_counts_too() -> None:
    clock = Clock()
    with pytest.raises(Unreachable):
        run(exchanger(clock, seconds=11.0)(calls.show("a")), [LOST, LOST], clock, takes=5.0)
    assert clock.now == pytest.approx(100 + 5 + 0.75 + 5)


@pytest.mark.parametrize("status", [400, 404, 409, 412, 413, 422, 500, 504, 307])
def test_other_refusals_are_not_repeated(status: int) -> None:
    clock = Clock()
    with pytest.raises(Refused) as caught:
        run(exchanger(clock)(calls.show("a")), [refusal(status, "some_type")], clock)
    error = caught.value
    assert (error.status, error.type, error.message) == (status, "some_type", "words")
    assert (error.details, error.request_id) == (("inputs.3: long",), "abc")
    assert str(error) == f"{status} some_type: words"


def test_every_status_has_its_error_class() -> None:
    kinds = {401: NotAllowed, 403: NotAllowed, 404: NotFound, 412: Conflict, 429: Busy, 503: Busy}
    kinds |= {400: Rejected, 413: Rejected, 422: Rejected, 500: Failed, 504: Failed}
    assert {status: refusal_of(status) for status in kinds} == kinds


@pytest.mark.parametrize(
    "body", [b"", b"<html>bad gateway</html>", b"[]", b'{"error": "no"}', b"\xff\xfe", b'{"a": 1}']
)
def test_an_error_of_another_server_is_an_error(body: bytes) -> None:
    clock = Clock()
    with pytest.raises(Failed) as caught:
        run(exchanger(clock)(calls.show("a")), [Reply(502, {}, body)], clock)
    assert caught.value.type == ""
    assert caught.value.message


@pytest.mark.parametrize(
    "body", [b"", b"<html>", b"[]", b"{}", b"\xff", b'{"results": [], "timings_ms": null}']
)
def test_an_answer_of_another_server_is_unexpected(body: bytes) -> None:
    clock = Clock()
    with pytest.raises(UnexpectedAnswer, match=URL):
        run(exchanger(clock)(calls.predict("x", "a", {})), [Reply(200, {}, body)], clock)


def test_too_few_results_are_unexpected() -> None:
    content = {"results": [], "timings_ms": {"tokenize": 0, "queue": 0, "inference": 0}}
    with pytest.raises(UnexpectedAnswer, match="0 results for 1 inputs"):
        run(exchanger(Clock())(calls.predict("x", "a", {})), [reply(200, content)], Clock())


def test_a_file_without_its_revisions_hash_is_refused() -> None:
    with pytest.raises(UnexpectedAnswer, match="not this file's"):
        run(
            exchanger(Clock())(calls.upload("a", b"other", if_match=None, if_none_match=None)),
            [reply(200, PUBLISHED)],
            Clock(),
        )
    whole = Reply(200, {"etag": f'"{REVISION}"'}, DATA)
    file, _ = run(exchanger(Clock())(calls.download("a", None)), [whole], Clock())
    assert (file.revision, file.data) == (REVISION, DATA)
    cut = Reply(200, {"etag": f'"{REVISION}"'}, DATA[:-1])
    with pytest.raises(UnexpectedAnswer, match="did not arrive"):
        run(exchanger(Clock())(calls.download("a", None)), [cut], Clock())


def summary(name: str) -> dict[str, object]:
    fields = ("method", "backbone", "prompt_length", "created", "size", "reason", "revision")
    return {"name": name, "state": "ready", "labels": []} | dict.fromkeys(fields)


def detail() -> Reply:
    return reply(200, summary("a") | {"revisions": [], "spec": None, "of a later version": 1})


def test_every_page_is_requested_and_may_be_repeated() -> None:
    clock = Clock()
    pages: list[Outcome] = [
        reply(200, {"adapters": [summary("a"), summary("b")], "next_cursor": "b"}),
        LOST,
        reply(200, {"adapters": [summary("c")], "next_cursor": None}),
    ]
    adapters, attempts = run(calls.adapters(exchanger(clock)), pages, clock)
    assert [adapter.name for adapter in adapters] == ["a", "b", "c"]
    asked = [attempt.request.params for attempt in attempts]
    assert asked == [{"limit": "1000"}, *[{"limit": "1000", "cursor": "b"}] * 2]


def test_a_list_that_never_ends_is_an_error() -> None:
    page = reply(200, {"adapters": [], "next_cursor": "b"})
    with pytest.raises(UnexpectedAnswer, match="goes back"):
        run(calls.adapters(exchanger(Clock())), [page, page], Clock())
