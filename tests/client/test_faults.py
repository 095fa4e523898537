"""Servers that break: dropped connections, incomplete answers, pages of other servers."""

import asyncio
import socket
import time
from collections.abc import Callable
from itertools import chain, repeat
from typing import Any

import pytest

from service.client import (
    AsyncClient,
    Client,
    Failed,
    InvalidCall,
    Refused,
    Rejected,
    Retries,
    UnexpectedAnswer,
    Unreachable,
)
from service.client.errors import describe
from service.client.retry import ONCE
from tests.support.broken_server import HELD, answer, broken, results

QUICK = Retries(attempts=3, first=0.01, longest=0.02)
HEALTH: dict[str, Any] = {"status": "ok", "reason": None, "details": {}}
PUBLISHED = {"name": "a", "revision": "0c9d", "created": False, "changed": True}


def test_a_prediction_is_repeated_when_the_connection_breaks() -> None:
    cut = results(1)[:-7].replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
    for first in (None, cut, b"nonsense\r\nConnection: close\r\n\r\n"):
        with (
            broken(first, None, results(1)) as server,
            Client(server.url, retries=QUICK) as client,
        ):
            assert client.predict("x", "a")[0].label == "ham"
            assert server.requests == ["POST /v1/predict HTTP/1.1"] * 3
            assert len(set(server.bodies)) == 1


def test_a_change_that_may_have_happened_is_not_repeated() -> None:
    doubtful: list[Callable[[Client], object]] = [
        lambda client: client.rollback("a"),
        lambda client: client.delete("a"),
        lambda client: client.upload("a", b"x", if_none_match="*"),
    ]
    for ask in doubtful:
        with broken(None) as server, Client(server.url, retries=QUICK) as client:
            with pytest.raises(Unreachable, match="the connection broke"):
                ask(client)
            assert len(server.requests) == 1


def test_a_rollback_to_a_named_revision_is_repeated() -> None:
    with broken(None, answer(PUBLISHED)) as server, Client(server.url, retries=QUICK) as client:
        assert client.rollback("a", "0c9d").changed
        assert len(server.requests) == 2


def test_an_unreachable_service_is_retried_and_the_error_names_its_address() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    every: list[Callable[[Client], object]] = [
        lambda client: client.rollback("a"),
        lambda client: client.adapters(),
    ]
    for ask in every:
        with Client(f"http://127.0.0.1:{port}", retries=QUICK) as client:
            began = time.monotonic()
            with pytest.raises(Unreachable, match=f"no service answers: http://127.0.0.1:{port}"):
                ask(client)
            assert time.monotonic() - began < 5


@pytest.mark.slow
def test_a_late_answer_is_an_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with Client(url, seconds=0.2, retries=Retries(attempts=1)) as client:
            with pytest.raises(Unreachable, match="timed out"):
                client.metrics()
            began = time.monotonic()
            with pytest.raises(Unreachable):
                client.predict("x", "a", timeout_ms=500)
            assert time.monotonic() - began >= 0.6


NOT_OURS = "; not the service's answer: is this its address, or does a proxy refuse?"
NGINX = b"""<html>\r\n<head><title>405 Not Allowed</title></head>\r\n<body>\r\n<center><h1>405 Not
Allowed</h1></center>\r\n<hr><center>nginx/1.22.1</center>\r\n</body>\r\n</html>\r\n"""


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        (NGINX, "405 Not Allowed", "405: Not Allowed"),
        (b"<html><h1>Bad\nGateway</h1>", "502 Bad Gateway", "502: Bad Gateway"),
        (b"<!DOCTYPE html><style>a{}</style><p>No &amp; no", "415 Oh", "415: No & no"),
        (b"<title>\x1b[2J\xff</title>", "413 Oh", "413: [2J\ufffd"),
        (b"", "415 Oh", "415: Unsupported Media Type"),
        (b"", "405 Oh", "405: Method Not Allowed"),
        (b"", "599 Oh", "599: no message"),
        (b'{"error": {"type": "too_la', "413 Oh", '413: {"error": {"type": "too_la'),
        (b'{"error": "text"}', "400 Oh", "400: text"),
        (b'{"error": 3}', "400 Oh", '400: {"error": 3}'),
        (b'["error"]', "407 Oh", '407: ["error"]'),
        (b"null", "401 Oh", "401: null"),
        (b"x" * 100_000, "431 Oh", "431: " + "x" * 200),
        (b"", "301 Oh\r\nLocation: https://other/", "301: redirected to https://other/"),
    ],
)
def test_another_servers_refusal_is_one_clear_line(body: bytes, status: str, said: str) -> None:
    code, *headers = status.split("\r\n")
    with broken(answer(body, code, *headers)) as server, Client(server.url, retries=ONCE) as client:
        with pytest.raises(Refused) as caught:
            client.adapters()
        assert str(caught.value) == said
        assert describe(caught.value) == said + NOT_OURS
        assert describe(caught.value).isprintable()


@pytest.mark.parametrize("body", [NGINX, b"", b'{"status": "ok", "rea', b"[]", b"\xff\xfe"])
def test_a_200_of_another_server_is_one_clear_line(body: bytes) -> None:
    with broken(answer(body)) as server, Client(server.url, retries=ONCE) as client:
        with pytest.raises(UnexpectedAnswer) as caught:
            client.ready()
        said = describe(caught.value)
        assert said.startswith(f"{server.url} answered 200, but not as this service does: ")
        assert said.isprintable()


def test_another_server_is_not_taken_for_this_one() -> None:
    contents: list[object] = [b"<html>welcome</html>", {"hello": "world"}, [], b""]
    for content in contents:
        with broken(answer(content)) as server, Client(server.url, retries=QUICK) as client:
            with pytest.raises(UnexpectedAnswer):
                client.predict("x", "a")
            with pytest.raises(UnexpectedAnswer):
                client.ready()
            assert len(server.requests) == 2
    away = answer(b"", "307 Temporary Redirect", "Location: http://127.0.0.1:1/")
    with broken(away) as server, Client(server.url) as client, pytest.raises(Rejected):
        client.adapters()


@pytest.mark.slow
def test_the_client_waits_as_long_as_the_service_asks() -> None:
    error = {"error": {"type": "unavailable", "message": "draining", "details": []}}
    busy = answer(error, "503 Service Unavailable", "Retry-After: 1")
    with broken(busy, answer(HEALTH)) as server, Client(server.url) as client:
        began = time.monotonic()
        assert client.metrics()
        assert time.monotonic() - began >= 1.0


def test_a_hook_that_spoils_a_request_is_an_error_and_nothing_is_sent() -> None:
    with broken(answer(HEALTH)) as server:

        def spoil(request: object) -> None:
            request.headers["x-a"] = "b\r\nc: d"  # type: ignore[attr-defined]  # httpx's

        with (
            Client(server.url, event_hooks={"request": [spoil]}) as client,
            pytest.raises(InvalidCall),
        ):
            client.predict("x", "a")
        assert server.requests == []


def test_one_failed_request_among_many_comes_after_all_earlier_results() -> None:
    internal = {"error": {"type": "internal", "message": "internal error", "details": []}}
    received = []

    def ask(client: Client) -> None:
        for result in client.classify(["x"] * 20, "a", per_request=4, in_flight=1):
            received.append(result)

    with broken(results(4), results(4), answer(internal, "500 Oh")) as server:
        with Client(server.url, retries=QUICK) as client, pytest.raises(Failed):
            ask(client)
        assert len(received) == 8
        assert len(server.requests) == 3


def test_a_caller_that_stops_early_does_not_wait_for_requests_in_flight() -> None:
    endless = chain(["x"], repeat(HELD))
    with broken(results(1)) as server:
        began = time.monotonic()
        with Client(server.url) as client:
            answers = client.classify(endless, "a", per_request=1, in_flight=4)
            assert next(answers).label == "ham"
            answers.close()
        assert time.monotonic() - began < 5


async def test_a_caller_that_stops_early_cancels_the_requests_in_flight() -> None:
    endless = chain(["x"], repeat(HELD))
    with broken(results(1)) as server:
        began, before = time.monotonic(), len(asyncio.all_tasks())
        async with AsyncClient(server.url) as client:
            answers = client.classify(endless, "a", per_request=1, in_flight=4)
            assert (await anext(answers)).label == "ham"
            await answers.aclose()
            assert len(asyncio.all_tasks()) == before
        assert time.monotonic() - began < 5
