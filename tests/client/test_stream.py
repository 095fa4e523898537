"""Streams of both clients, on the real service and on ones that fail."""

import asyncio
import itertools
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from service.client import (
    AsyncClient,
    Client,
    Input,
    InvalidCall,
    NotAllowed,
    Refused,
    Result,
    Retries,
    Unanswered,
    UnexpectedAnswer,
    Unreachable,
)
from service.client.types import Text
from tests.support.cut_off import CutOff
from tests.support.either_client import either
from tests.support.http_service import RunningService, serve
from tests.support.tiny_models import make_adapter, make_backbone


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    with serve(tmp_path_factory.mktemp("adapters"), STALL_SECONDS="1") as running:
        running.put("a", make_adapter(make_backbone()))
        yield running


@pytest.fixture(params=["blocking", "awaited"])
def client(request: pytest.FixtureRequest, live: RunningService) -> Iterator[Client]:
    with either(request.param, live.url) as client:
        yield client


def inputs(number: int) -> Iterator[Input]:
    return (Input("free " * (index % 9), id=str(index)) for index in range(number))


@pytest.mark.slow
def test_any_number_of_inputs_is_answered_in_order(client: Client) -> None:
    answers = list(client.stream(inputs(3000), "a", top_k=1))
    assert [answer.id for answer in answers] == [str(index) for index in range(3000)]
    assert all(isinstance(answer, Result) and len(answer.scores) == 1 for answer in answers)
    assert list(client.stream([], "a")) == []


def test_the_answers_are_those_of_predict(client: Client) -> None:
    texts: list[Text] = ["free win", Input("my card", "is bad"), Input("é\n\u2028", id="x")]
    streamed = [answer for answer in client.stream(texts, "a") if isinstance(answer, Result)]
    expected = client.predict(texts, "a")
    assert [(item.id, item.label, item.tokens) for item in streamed] == [
        (item.id, item.label, item.tokens) for item in expected
    ]
    for found, item in zip(streamed, expected, strict=True):
        assert found.score == pytest.approx(item.score, abs=1e-5)


def test_an_input_without_an_answer_says_why_and_the_others_go_on(client: Client) -> None:
    texts: list[Text] = ["ok", Input("x", id="bad", adapter="none"), "ok", "win " * 600]
    first, bad, ok, long = client.stream(texts, "a", truncate=False)
    assert isinstance(first, Result)
    assert isinstance(bad, Unanswered)
    assert (bad.id, bad.error.type) == ("bad", "adapter_not_found")
    assert isinstance(ok, Result)
    assert isinstance(long, Unanswered)
    assert long.error.details[0].startswith("text: 602 tokens")


def test_what_cannot_be_sent_is_refused_before_anything_is(client: Client) -> None:
    with pytest.raises(InvalidCall, match="one text"):
        client.stream("text", "a")
    with pytest.raises(InvalidCall, match="int among the inputs"):
        list(client.stream([3], "a"))  # type: ignore[list-item]


def test_an_option_that_the_service_refuses_is_an_error(client: Client) -> None:
    with pytest.raises(Refused, match="top_k"):
        list(client.stream(["x"], "a", top_k=0))


def test_an_error_of_the_inputs_is_the_callers(client: Client) -> None:
    def broken() -> Iterator[str]:
        yield "text"
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        list(client.stream(broken(), "a"))


@pytest.mark.parametrize("bad", ["\ud800", 5], ids=["surrogate", "number"])
def test_answers_before_an_input_that_cannot_be_sent_come_first(
    live: RunningService, bad: Any
) -> None:
    answers: list[Result | Unanswered] = []
    with Client(live.url) as client, pytest.raises(InvalidCall):
        answers.extend(client.stream(["ok"] * 300 + [bad, "after"], "a"))
    assert len(answers) == 300


@pytest.mark.slow
def test_no_more_inputs_are_held_than_stated(live: RunningService) -> None:
    read = taken = most = 0

    def counted() -> Iterator[str]:
        nonlocal read, most
        for _ in range(30_000):
            read += 1
            most = max(most, read - taken)
            yield ""

    with Client(live.url) as client:
        for _ in client.stream(counted(), "a", top_k=1):
            taken += 1
    assert taken == 30_000
    assert most <= 9000


@pytest.mark.slow
def test_inputs_that_come_slowly_are_answered_as_they_come(live: RunningService) -> None:
    """The service ends a stream that is silent; the next input opens another one."""

    def slow() -> Iterator[str]:
        for wait in (0, 0.1, 2.5, 0):
            time.sleep(wait)
            yield "text"

    with Client(live.url) as client:
        assert len(list(client.stream(slow(), "a"))) == 4


async def test_inputs_of_an_async_iterable_are_answered_while_others_are_awaited(
    live: RunningService,
) -> None:
    answered = asyncio.Event()

    async def two() -> AsyncIterator[str]:
        yield "first"
        await asyncio.wait_for(answered.wait(), 10)
        yield "second"

    async with AsyncClient(live.url) as client:
        count = 0
        async for _ in client.stream(two(), "a"):
            count += 1
            answered.set()
    assert count == 2


def test_a_caller_that_stops_ends_the_stream(live: RunningService) -> None:
    with Client(live.url) as client:
        some = list(itertools.islice(client.stream(itertools.repeat("x"), "a"), 10))
    assert len(some) == 10
    for _ in range(200):
        if not any(thread.name == "stream" for thread in threading.enumerate()):
            break
        time.sleep(0.05)
    assert not any(thread.name == "stream" for thread in threading.enumerate())


@pytest.mark.slow
@pytest.mark.parametrize("every", [2000, 20_000])
def test_lost_connections_lose_and_repeat_nothing(live: RunningService, every: int) -> None:
    """A proxy cuts each connection after so many bytes of answers."""
    with (
        CutOff(live.url, every=every) as proxy,
        Client(proxy.url, retries=Retries(attempts=1000, first=0.01, longest=0.05)) as client,
    ):
        answers = list(client.stream(inputs(400), "a", top_k=1))
        assert proxy.cuts > 2
    assert [answer.id for answer in answers] == [str(index) for index in range(400)]
    assert all(isinstance(answer, Result) for answer in answers)


def test_a_service_that_is_gone_is_an_error_after_all_attempts() -> None:
    client = Client("http://127.0.0.1:9", retries=Retries(attempts=3, first=0.01))
    with client, pytest.raises(Unreachable, match="no service answers"):
        list(client.stream(["x"], "a"))


@pytest.mark.parametrize(
    "answer", [b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nhello\n", b"no HTTP\r\n\r\n"]
)
def test_another_server_is_an_error(answer: bytes) -> None:
    with (
        CutOff("", every=0, answer=answer) as other,
        Client(other.url) as client,
        pytest.raises(UnexpectedAnswer, match=r"not HTTP|not answer as this service"),
    ):
        list(client.stream(["x"], "a"))


def test_a_wrong_key_is_an_error_at_once(tmp_path: Path) -> None:
    with (
        serve(tmp_path, API_KEYS="right", wait=False) as running,
        Client(running.url, api_key="x") as client,
        pytest.raises(NotAllowed),
    ):
        list(client.stream(["x"], "a"))
